"""Single values as times."""

from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pytest

from beam_pipelines.kernels.epoch import epoch_micros

US = 1_767_603_603_000_001  # 2026-01-05T09:00:03.000001Z


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        (datetime(2026, 1, 5, 9, 0, 3, 1, tzinfo=UTC), None),
        (datetime(2026, 1, 5, 10, 30, 3, 1, tzinfo=timezone(timedelta(hours=1.5))), None),
        ("2026-01-05T09:00:03.000001Z", None),
        ("2026-01-05t10:00:03.0000019+01:00", None),
        (US, "us"),
        (np.int64(US), "us"),
        (US * 1000 + 999, "ns"),
    ],
)
def test_a_time_is_read_to_the_microsecond(value, unit):
    assert epoch_micros(value, "event_time", unit) == US


@pytest.mark.parametrize(
    ("value", "unit", "micros"),
    [
        (10**11, "ms", 10**14),
        (-(10**11), "ms", -(10**14)),
        (0, "s", 0),  # nothing is coarser than seconds
        (253_402_300_799, "s", 253_402_300_799_000_000),
        (datetime(1970, 1, 1, tzinfo=UTC), None, 0),
        ("1969-12-31T23:59:59Z", None, -1_000_000),
    ],
)
def test_old_times_are_taken_where_they_can_not_be_mistaken(value, unit, micros):
    assert epoch_micros(value, "event_time", unit) == micros


@pytest.mark.parametrize(
    ("value", "unit", "message"),
    [
        (1_700_000_000, "ms", r"is 1970-01-20T16:13:20.*\(if these are s: time_unit='s'\)"),
        (1_700_000_000, "us", "time_unit='s'"),
        (1_700_000_000_000, "us", "time_unit='ms'"),
        (1_700_000_000_000_000, "ns", "time_unit='us'"),
        (10**11 - 1, "ms", "times before 1973-03-03 are taken as datetimes or text only"),
        (0, "ms", r"that is 1970-01-01T00:00:00\+00:00; times before 1973-03-03"),
        (1_700_000_000_000, "s", "outside the years 1 to 9999; is it of a finer unit"),
        (
            1_700_000_000,
            None,
            r"is the integer 1700000000, of no unit; .* one of s, ms",
        ),
        (1.5, "s", "is 1.5 of type float; times are aware datetimes"),
        (np.float64(1.5), None, "of type float64"),
        (True, "s", "of type bool"),
        (date(2026, 1, 5), None, "of type date"),
        (datetime(2026, 1, 5), None, "without a time zone; make it aware"),
        ("2026-01-05 09:00", None, "'2026-01-05 09:00'; as text it is RFC 3339"),
        ("2026-01-05T09:00:03", None, "with a time zone"),
    ],
)
def test_what_may_mean_another_time_is_refused(value, unit, message):
    with pytest.raises(ValueError, match=message):
        epoch_micros(value, "event_time", unit)
