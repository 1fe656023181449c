"""What the activity pipeline reads: formats, files, fields, and what it makes of them."""

import gzip
import io
import json
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import fastavro
import pytest

from beam_pipelines.activity import main
from beam_pipelines.demo import DemoTraffic
from beam_pipelines.io import files
from beam_pipelines.transforms import sessions
from tests.runs import (
    NINE,
    TABLES,
    dead_letters,
    enriched,
    event,
    lines_of,
    query,
    summary,
    tables,
    verdicts,
    written,
)

AS_OF = "--as_of=2026-01-05T12:00:00Z"

MORNING = [
    event(0, "ann", "/a", "session_start"),
    event(1, "ann", "/a"),
    event(59.999999, "bob", "/a"),
    event(60, "bob", "/b"),
    event(65, "ann", "/b", event_id="e1"),
    event(65, "ann", "/b", event_id="e1"),  # a re-send
    event(66, "ann", "/b", event_id="e2"),
    event(70, "ann", "/b", "click"),
    event(80, "ann", "/b", "session_end"),
    event(81, "cat", "/a", "session_end"),  # ends nothing
    event(3_700, "bob", "/a", "click"),
]


def nine(minute: int, second: float = 0) -> datetime:
    return NINE + timedelta(minutes=minute, seconds=second)


MORNING_TABLES = {
    "page_view_counts": [
        (nine(0), nine(1), "/a", 2),
        (nine(1), nine(2), "/b", 3),
    ],
    "active_users": [
        (nine(-4), nine(1), 2),
        *((nine(start), nine(start + 5), 3) for start in (-3, -2, -1, 0, 1)),
        *((nine(start), nine(start + 5), 1) for start in (57, 58, 59, 60, 61)),
    ],
    "user_sessions": [
        ("ann", nine(0), nine(0, 80), 80.0, 3, 1, "session_end"),
        ("bob", nine(0, 59.999999), nine(1), 0.000001, 2, 0, "timeout"),
        ("bob", nine(61, 40), nine(61, 40), 0.0, 0, 1, "timeout"),
    ],
}


def test_events_of_a_file_become_tables_lake_and_enriched_events(tmp_path):
    source, out = written(tmp_path / "a.ndjson", lines_of(MORNING)), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out) == MORNING_TABLES
    assert verdicts(out) == {"on_time": 11, "accepted": 10, "duplicate": 1}
    assert summary(out)["ignored_session_ends"] == 1
    assert summary(out)["rows_written"]["lake"] == 11
    assert dead_letters(out) == []
    accepted = [*MORNING[:5], *MORNING[6:]]
    assert sorted(map(as_text, enriched(out))) == sorted(
        as_text(
            record
            | {
                "event_time": record["event_time"].replace("+00:00", "Z"),
                "processing_time": "2026-01-05T12:00:00Z",
            }
        )
        for record in accepted
    )


def as_text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


@pytest.mark.parametrize(
    ("name", "end"),
    [("a.json", b"\r\n"), ("a.ndjson.gz", b"\n"), ("a.gz", b"\r\n"), ("a", b" \n")],
)
def test_line_ends_and_compression_change_nothing(name, end, tmp_path):
    source, out = written(tmp_path / name, lines_of(MORNING), end), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out) == MORNING_TABLES
    assert dead_letters(out) == []


def test_the_last_line_needs_no_newline_and_gzip_may_have_members(tmp_path):
    first, rest = lines_of(MORNING[:4]), lines_of(MORNING[4:])
    members = [gzip.compress(b"\n".join(first) + b"\n"), gzip.compress(b"\n".join(rest))]
    (tmp_path / "a.gz").write_bytes(b"".join(members))
    assert main([f"--input={tmp_path}/a.gz", f"--output={tmp_path}/out", AS_OF]) == 0
    assert tables(tmp_path / "out") == MORNING_TABLES


def test_the_order_of_lines_changes_nothing(tmp_path):
    source, out = written(tmp_path / "a.ndjson", lines_of(reversed(MORNING))), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out) == MORNING_TABLES


def test_several_files_are_one_input(tmp_path):
    lines, out = lines_of(MORNING), tmp_path / "out"
    for i, part in enumerate((lines[:3], lines[3:6], lines[5:])):  # one line twice more
        written(tmp_path / f"{i}.log{'.gz' * (i % 2)}", part)
    assert main([f"--input={tmp_path}/*.log*", f"--output={out}", AS_OF]) == 0
    assert tables(out) == MORNING_TABLES
    assert verdicts(out) == {"on_time": 12, "accepted": 10, "duplicate": 2}
    assert len(list((out / "lake").rglob("*.parquet"))) == 3


def test_a_blank_line_is_a_dead_letter_of_its_own(tmp_path):
    lines, out = lines_of(MORNING), tmp_path / "out"
    source = written(tmp_path / "a.ndjson", [*lines[:2], b"", b"  ", *lines[2:]])
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out) == MORNING_TABLES
    start = len(lines[0]) + len(lines[1]) + 2
    assert [
        (letter["topic"], letter["offset"], letter["payload"], letter["reason"])
        for letter in dead_letters(out)
    ] == [
        (str(source), start, b"", "empty_payload"),
        (str(source), start + 1, b"  ", "empty_payload"),
    ]


def test_foreign_names_are_mapped(tmp_path):
    kinds = {"page_view": "pageview", "click": "tap"}
    foreign = [
        {
            "ts": record["event_time"],
            "uid": record["user_id"],
            "path": record["page_url"],
            "what": kinds.get(record["event_type"], record["event_type"]),
            "key": record.get("event_id"),
            "event_time": "not read",
        }
        for record in MORNING
    ]
    source, out = written(tmp_path / "a.ndjson", lines_of(foreign)), tmp_path / "out"
    flags = [
        "--fields=event_time=ts,user_id=uid,page_url=path,event_type=what,event_id=key",
        "--event_types=pageview=page_view,tap=click",
    ]
    assert main([f"--input={source}", f"--output={out}", AS_OF, *flags]) == 0
    assert tables(out) == MORNING_TABLES


@pytest.mark.parametrize("codec", ["null", "deflate"])
def test_an_avro_file_gives_what_its_events_as_json_give(codec, tmp_path):
    text = [{"name": name, "type": "string"} for name in ("user_id", "page_url", "event_type")]
    schema = {
        "type": "record",
        "name": "Event",
        "fields": [
            {"name": "event_time", "type": {"type": "long", "logicalType": "timestamp-micros"}},
            *text,
            {"name": "event_id", "type": ["null", "string"], "default": None},
            {"name": "ignored", "type": "double", "default": 0.5},
        ],
    }
    records = [
        record | {"event_time": datetime.fromisoformat(record["event_time"])} for record in MORNING
    ]
    container = io.BytesIO()
    fastavro.writer(container, schema, records, codec=codec)
    (tmp_path / "a.avro").write_bytes(container.getvalue())
    out = tmp_path / "out"
    assert main([f"--input={tmp_path}/a.avro", f"--output={out}", AS_OF]) == 0
    assert tables(out) == MORNING_TABLES
    assert verdicts(out) == {"on_time": 11, "accepted": 10, "duplicate": 1}


ACCESS_LOG = [
    b'192.0.2.7 - - [05/Jan/2026:10:00:01 +0100] "GET /a HTTP/1.1" 200 512 "-" "curl"',
    b'192.0.2.7 - - [05/Jan/2026:10:00:01 +0100] "GET /a HTTP/1.1" 200 512 "-" "curl"',
    b'example.org - ann [05/Jan/2026:09:00:59 +0000] "GET /b?q=1" 304 -',
    b'192.0.2.8 - - [05/Jan/2026:09:00:30 +0000] "-" 408 0 "-" "-"',
    b'192.0.2.9 - - [05/Jan/2026:09:00:30 +0000] "GET /\xff HTTP/1.0" 404 1',
    b"a line of something else",
]


def test_lines_of_an_access_log_are_page_views_each_of_its_own(tmp_path):
    source, out = written(tmp_path / "access.log", ACCESS_LOG), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out)["page_view_counts"] == [
        (nine(0), nine(1), "/\\xff", 1),
        (nine(0), nine(1), "/a", 2),
        (nine(0), nine(1), "/b?q=1", 1),
    ]
    assert query(out, "SELECT user_id, page_views FROM user_sessions ORDER BY ALL") == [
        ("192.0.2.7", 2),
        ("192.0.2.9", 1),
        ("example.org", 1),
    ]
    assert [(letter["payload"], letter["reason"]) for letter in dead_letters(out)] == [
        (ACCESS_LOG[3], "no_target"),
        (ACCESS_LOG[5], "not_access_log"),
    ]


SAME_TIME = [
    event(0, event_id="e1"),
    event(0, event_id="e1", url="/a", more="other bytes"),
    event(0, event_id="e2"),
    event(1, event_id="e1"),
    event(2),
    event(2),
]


@pytest.mark.parametrize(
    ("dedupe", "accepted"),
    [("auto", 4), ("event_id", 4), ("payload", 5), ("coordinates", 6), ("none", 6)],
)
def test_dedupe_says_what_makes_two_records_one(dedupe, accepted, tmp_path):
    source, out = written(tmp_path / "a.ndjson", lines_of(SAME_TIME)), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF, f"--dedupe={dedupe}"]) == 0
    assert verdicts(out).get("accepted") == accepted
    assert verdicts(out).get("duplicate", 0) == 6 - accepted
    assert query(out, "SELECT sum(views) FROM page_view_counts") == [(accepted,)]
    assert query(out, "SELECT count(*) FROM events") == [(accepted,)]


GARBAGE = [b"\x00\xff\xfe", b"{}", b"[1]", b"NaN", b"", b'{"event_time":"x"}', b"[" * 5_000]


def test_a_file_of_garbage_gives_dead_letters_and_empty_tables(tmp_path):
    source, out = written(tmp_path / "a", GARBAGE), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", "--format=ndjson"]) == 0
    assert [letter["payload"] for letter in dead_letters(out)] == GARBAGE
    assert [letter["reason"] for letter in dead_letters(out)] == [
        "bad_text",
        "missing_field",
        "not_an_object",
        "bad_number",
        "empty_payload",
        "bad_time",
        "too_deep",
    ]
    assert verdicts(out) == {"invalid": 7}
    assert tables(out) == {name: [] for name in TABLES}
    assert query(out, "FROM events") == []
    assert enriched(out) == []


def test_an_empty_file_gives_empty_tables(tmp_path):
    source, out = written(tmp_path / "a", []), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", "--format=ndjson"]) == 0
    assert summary(out)["read"] == 0
    assert tables(out) == {name: [] for name in TABLES}
    assert query(out, "FROM events") == []


def test_the_time_given_as_now_judges_the_future(tmp_path):
    source = written(tmp_path / "a.ndjson", lines_of([event(0), event(600)]))
    for as_of_s, on_time in ((300, 2), (299.999, 1)):
        out = tmp_path / f"out{on_time}"
        as_of = (NINE + timedelta(seconds=as_of_s)).isoformat()
        assert main([f"--input={source}", f"--output={out}", f"--as_of={as_of}"]) == 0
        assert verdicts(out)["on_time"] == on_time
    (letter,) = dead_letters(tmp_path / "out1")
    assert (letter["reason"], letter["stage"]) == ("future", "lateness")
    assert letter["seconds_late"] == -300.001
    assert letter["payload"] == lines_of([event(600)])[0]


def test_now_is_when_the_newest_file_changed(tmp_path):
    for name, age_s in (("old", 50), ("new", 0)):
        path = written(tmp_path / f"{name}.ndjson", lines_of([event(0, user=name)]))
        at_s = NINE.timestamp() - age_s
        os.utime(path, (at_s, at_s))
    assert main([f"--input={tmp_path}/*.ndjson", f"--output={tmp_path}/out"]) == 0
    now = {row["processing_time"] for row in enriched(tmp_path / "out")}
    assert now == {"2026-01-05T09:00:00Z"}


def test_the_first_and_last_instants_of_the_calendar_count(tmp_path):
    times = ("0001-01-01T00:00:00Z", "1969-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z")
    source = written(
        tmp_path / "a.ndjson", lines_of(event(0) | {"event_time": time} for time in times)
    )
    out, last = tmp_path / "out", "--as_of=9999-12-31T23:59:59Z"
    assert main([f"--input={source}", f"--output={out}", last]) == 0
    first_us, end_us = -62_135_596_800_000_000, 253_402_300_800_000_000
    starts = [first_us, -60_000_000, end_us - 60_000_000]
    counted = query(out, "SELECT epoch_us(window_start), views FROM page_view_counts ORDER BY 1")
    assert counted == [(start, 1) for start in starts]
    windows = query(out, "SELECT epoch_us(window_start), active_users FROM active_users ORDER BY 1")
    assert windows == [
        (start + slide * 60_000_000, 1) for start in starts for slide in (-4, -3, -2, -1, 0)
    ]
    assert query(out, "SELECT epoch_us(session_start) FROM user_sessions ORDER BY 1") == [
        (first_us,),
        (-1,),
        (end_us - 1,),
    ]
    assert query(out, "SELECT count(DISTINCT event_date) FROM events") == [(3,)]


def test_one_event_a_day_for_ten_years_costs_what_its_events_cost(tmp_path, monkeypatch):
    days = 3_650
    scanned = []

    def counting_scan(still_open, rows, until_us, rule):
        scanned.append(len(still_open) + len(rows))
        return scan(still_open, rows, until_us, rule)

    scan = sessions.scan
    monkeypatch.setattr(sessions, "scan", counting_scan)
    lines = lines_of(event(day * 86_400, user=f"user {day % 7}") for day in range(-days, 0))
    source, out = written(tmp_path / "a.ndjson", lines), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert query(out, "SELECT count(*), sum(views) FROM page_view_counts") == [(days, days)]
    assert query(out, "SELECT count(*), sum(active_users) FROM active_users") == [
        (5 * days, 5 * days)
    ]
    assert query(
        out,
        "SELECT count(*), sum(page_views), max(duration_s), any_value(ended_by) FROM user_sessions",
    ) == [(days, days, 0.0, "timeout")]
    assert len(list((out / "lake").glob("event_date=*"))) == days
    # One fold for every minute that has an event, or less; the calendar has 5,256,000.
    assert len(scanned) <= days + 8
    assert sum(scanned) <= 3 * days


def demo_lines(records: int) -> list[bytes]:
    payloads = DemoTraffic(records, seed=8).payloads(0)["payload"].to_pylist()
    return [payload for payload in payloads if payload is not None and b"\n" not in payload]


@pytest.mark.parametrize(
    ("range_bytes", "block_bytes", "batch_records"),
    [(64 << 20, 10_000, 20_000), (64 << 20, 2 << 20, 7), (50_000, 7_000, 20_000), (97, 64, 100)],
)
def test_a_plain_file_read_in_ranges_is_what_it_is_when_compressed(
    range_bytes, block_bytes, batch_records, tmp_path, monkeypatch
):
    lines = demo_lines(40 if range_bytes < 100 else 2_000)
    plain, packed = (written(tmp_path / name, lines) for name in ("a.ndjson", "a.ndjson.gz"))
    as_of = f"--as_of={DemoTraffic(2_000).as_of_us // 1_000}"
    assert main([f"--input={packed}", f"--output={tmp_path}/packed", as_of]) == 0
    monkeypatch.setattr(files, "RANGE_BYTES", range_bytes)
    monkeypatch.setattr(files, "MAX_BATCH_RECORDS", batch_records)
    sizes = {"range_bytes": range_bytes, "block_bytes": block_bytes}
    monkeypatch.setattr(files.read_lines, "__kwdefaults__", sizes)
    assert main([f"--input={plain}", f"--output={tmp_path}/plain", as_of]) == 0
    assert tables(tmp_path / "plain") == tables(tmp_path / "packed")
    assert enriched(tmp_path / "plain") == enriched(tmp_path / "packed")
    letters, others = (
        [letter | {"topic": ""} for letter in dead_letters(tmp_path / name)]
        for name in ("plain", "packed")
    )
    assert letters == others
    ranges = {path.name for path in (tmp_path / "plain" / "lake").rglob("*.parquet")}
    assert (len(ranges) > 1) == (range_bytes < plain.stat().st_size)
