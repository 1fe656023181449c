from datetime import UTC, datetime, timedelta, timezone

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beam_pipelines.kernels.rfc3339 import (
    EPOCH_SECONDS,
    NOT_A_TIME,
    OK,
    OUT_OF_RANGE,
    from_epoch_ms,
    from_epoch_ms_one,
    parse,
    parse_one,
)
from beam_pipelines.model.records import MAX_EVENT_TIME_US, MIN_EVENT_TIME_US

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND = 1_000_000
GOOD = {
    "1970-01-01T00:00:00Z": 0,
    "1970-01-01T00:00:00.000001Z": 1,
    "1969-12-31T23:59:59.999999Z": -1,
    "1970-01-01T00:00:01.1234567Z": 1_123_456,
    "1970-01-01T00:00:01.123456789Z": 1_123_456,
    "1970-01-01T00:00:01.12345678901234567890Z": 1_123_456,
    "1970-01-01T00:00:01.5Z": 1_500_000,
    "1970-01-01t00:00:01z": SECOND,
    "1970-01-01 00:00:01+00:00": SECOND,
    "1970-01-01T00:00:01-00:00": SECOND,
    "1970-01-01T05:45:00.25+05:45": 250_000,
    "1969-12-31T14:00:00-10:00": 0,
    "2000-02-29T00:00:00Z": 951_782_400 * SECOND,
    "2016-12-31T23:59:60Z": 1_483_228_800 * SECOND,
    "2017-01-01T00:59:60.5+01:00": 1_483_228_800 * SECOND + 500_000,
    "0001-01-01T00:00:00Z": MIN_EVENT_TIME_US,
    "0000-12-31T23:00:00-01:00": MIN_EVENT_TIME_US,
    "9999-12-31T23:59:59.999999Z": MAX_EVENT_TIME_US,
}
OUTSIDE = [
    "0000-12-31T23:59:59Z",
    "0000-02-29T00:00:00Z",
    "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:59-00:01",
    "9999-12-31T23:59:60Z",
]
BAD = [
    "",
    "Z",
    "yesterday",
    "2026-01-01",
    "2026-01-01T12:00:00",
    "2026-01-01T12:00:00.Z",
    "2026-01-01T12:00Z",
    "2026-01-01X12:00:00Z",
    "2026-01-01T24:00:00Z",
    "2026-01-01T12:60:00Z",
    "2026-01-01T12:00:61Z",
    "2026-01-01T12:00:60Z",
    "2026-01-01T12:00:00.12a456Z",
    "2026-01-01T12:00:00.12345678aZ",
    "2026-01-01T12:00:00,5Z",
    "2026-01-01T12:00:00+0100",
    "2026-01-01T12:00:00+24:00",
    "2026-01-01T12:00:00+01:60",
    "2026-01-01T12:00:00*01:00",
    "2026-01-01T12:00:00,01:00",
    "2026-00-01T12:00:00Z",
    "2026-13-01T12:00:00Z",
    "2026-01-00T12:00:00Z",
    "2026-04-31T12:00:00Z",
    "2026-02-29T12:00:00Z",
    "1900-02-29T12:00:00Z",
    "+026-01-01T12:00:00Z",
    "2026-01-01T12:00:00Z ",
    " 2026-01-01T12:00:00Z",
    "\uff12026-01-01T12:00:00Z",
    "2026-01-01T12:00:00\0Z",
    "1767225600000",
]


@pytest.mark.parametrize(("text", "micros"), GOOD.items())
def test_times_are_read(text, micros):
    assert parse_one(text) == (micros, OK)


@pytest.mark.parametrize("text", OUTSIDE)
def test_times_outside_of_the_years_1_to_9999_are_told_apart(text):
    assert parse_one(text)[1] == OUT_OF_RANGE


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_time_is_refused(text):
    assert parse_one(text)[1] == NOT_A_TIME


def agree(texts):
    expected = [parse_one(text) for text in texts]
    micros, status = parse(pa.array(texts, pa.string()))
    assert status.tolist() == [s for _, s in expected]
    assert micros.tolist() == [value if s == OK else 0 for value, s in expected]


def test_columns_agree_with_single_times_whatever_surrounds_them():
    texts = [*GOOD, *OUTSIDE, *BAD]
    agree(texts)
    agree(texts * 20)
    for text in texts:
        agree([text])
        agree([text, text])


offsets = st.builds(
    lambda minutes: timezone(timedelta(minutes=minutes)), st.integers(-23 * 60, 23 * 60)
)
moments = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=offsets)


@given(st.lists(moments, max_size=20), st.sampled_from(["auto", "seconds", "milliseconds"]))
def test_what_python_writes_is_read_back(times, precision):
    texts = [time.isoformat(timespec=precision) for time in times]
    micros, status = parse(pa.array(texts, pa.string()))
    assert status.tolist() == [OK] * len(times)
    read = [datetime.fromisoformat(text) - EPOCH for text in texts]
    assert micros.tolist() == [time // timedelta(microseconds=1) for time in read]


parts = st.tuples(
    st.sampled_from(["0000", "0001", "1969", "1970", "2000", "2024", "2026", "9999", "19a0"]),
    st.sampled_from(["-01-01", "-02-29", "-12-31", "-06-31", "-13-01", "-1-010", "/01/01"]),
    st.sampled_from(["T", "t", " ", "_", ""]),
    st.sampled_from(["00:00:00", "23:59:60", "23:59:59", "24:00:00", "12:30:7", "1230:07:"]),
    st.sampled_from(["", ".", ".5", ".123456", ".1234567", ".12345678", ".123456789", ".1:"]),
    st.sampled_from(["Z", "z", "+00:00", "-23:59", "+24:00", "-00:60", "+0100", "", "é", "ÿ:00"]),
).map("".join)


@given(st.lists(parts, max_size=30))
@example([])
def test_columns_agree_with_single_times(texts):
    agree(texts)


def test_columns_may_be_sliced_hold_nulls_and_bytes_that_are_no_text():
    column = pa.array([b"x", None, b"1970-01-01T00:00:01Z", b"\xff\xfe" * 10, b"y"], pa.binary())
    micros, status = parse(column.slice(1, 3))
    assert micros.tolist() == [0, SECOND, 0]
    assert status.tolist() == [NOT_A_TIME, OK, NOT_A_TIME]


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-(10**14), 10**15), max_size=20))
@example([-1, MIN_EVENT_TIME_US // 1000 - 1, MIN_EVENT_TIME_US // 1000])
@example([MAX_EVENT_TIME_US // 1000, MAX_EVENT_TIME_US // 1000 + 1])
@example([10**8 - 1, 10**8, 10**11 - 1, 10**11])
def test_epoch_milliseconds_agree_with_single_ones(values):
    micros, status = from_epoch_ms(pa.array(values, pa.int64()).to_numpy())
    expected = [from_epoch_ms_one(value) for value in values]
    assert status.tolist() == [s for _, s in expected]
    assert micros.tolist() == [value if s == OK else 0 for value, s in expected]


def test_seconds_of_the_years_1973_to_5138_are_told_from_milliseconds():
    refused = [int(datetime(year, 4, 1, tzinfo=UTC).timestamp()) for year in (1973, 2026, 5138)]
    assert [from_epoch_ms_one(second) for second in refused] == [(0, EPOCH_SECONDS)] * 3
    taken = [int(datetime(year, 4, 1, tzinfo=UTC).timestamp()) * 1000 for year in (1, 1969, 1973)]
    assert [from_epoch_ms_one(ms) for ms in (0, *taken)] == [(ms * 1000, OK) for ms in (0, *taken)]
