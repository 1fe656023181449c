"""What the activity pipeline reads: formats, files, fields, and what it makes of them."""

import gzip
import io
import json
import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import fastavro
import numpy as np
import pytest

from beam_pipelines.activity import main
from beam_pipelines.demo import DemoTraffic
from beam_pipelines.io import files
from beam_pipelines.transforms import sessions
from tests.murmur import hash_of, texts_of, twin_of
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


def test_two_users_of_one_hash_have_sessions_of_their_own(tmp_path):
    stranger = twin_of("ann")
    records = [
        event(0, "ann", event_id="e0"),
        event(60, "ann", event_id="e1"),
        event(120, stranger, event_id="e2"),
        event(180, stranger, kind="session_end", event_id="e3"),
        event(240, "ann", event_id="e4"),
    ]
    source, out = written(tmp_path / "a.ndjson", lines_of(records)), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out)["user_sessions"] == sorted(
        [
            ("ann", nine(0), nine(4), 240.0, 3, 0, "timeout"),
            (stranger, nine(2), nine(3), 60.0, 1, 0, "session_end"),
        ]
    )


def test_a_key_tells_events_apart_that_are_made_to_be_one(tmp_path, monkeypatch, capfd):
    records = [
        event(0, "ann", event_id=twin_of("e-1")),
        event(0, "bob", event_id="e-1"),
        event(0, "bob", event_id="e-1"),
    ]
    source, out = written(tmp_path / "a.ndjson", lines_of(records)), tmp_path / "out"
    run = [f"--input={source}", f"--output={out}", AS_OF]
    assert main(run) == 0
    assert verdicts(out) == {"on_time": 3, "accepted": 1, "duplicate": 2}

    monkeypatch.setenv("HASH_KEY", "a key of many bytes")
    keyed = [*run, "--hash_key=env:HASH_KEY"]
    assert main(keyed) == 2  # other results lie there
    assert "settings.hash_key was absent, is" in capfd.readouterr().err
    assert main([*keyed, "--overwrite"]) == 0
    assert verdicts(out) == {"on_time": 3, "accepted": 2, "duplicate": 1}
    assert query(out, "SELECT count(*) FROM events") == [(2,)]

    monkeypatch.setenv("HASH_KEY", "another of many bytes")
    assert main(keyed) == 2
    assert "settings.hash_key was " in capfd.readouterr().err
    left = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"many bytes" not in left


def test_made_users_raise_no_count_above_the_events_of_its_window(tmp_path):
    made = texts_of(np.arange(4096, dtype=np.uint64) << np.uint64(52))  # an infinite estimate
    records = [event(0, user) for user in (*made, "ann", "ann")]
    source, out = written(tmp_path / "a.ndjson", lines_of(records)), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", "--dedupe=coordinates", AS_OF]) == 0
    assert tables(out)["active_users"] == [
        (nine(start), nine(start + 5), 4098) for start in range(-4, 1)
    ]


def test_users_whose_hashes_meet_in_other_minutes_end_no_run(tmp_path):
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1  # what first_names mixes minutes in by
    minute = int(NINE.timestamp()) // 60
    meets = hash_of("ann") ^ (minute * golden & mask) ^ ((minute + 1) * golden & mask)
    (stranger,) = texts_of([meets])
    source = written(tmp_path / "a.ndjson", lines_of([event(10, "ann"), event(70, stranger)]))
    out = tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out)["user_sessions"] == sorted(
        [
            ("ann", nine(0, 10), nine(0, 10), 0.0, 1, 0, "timeout"),
            (stranger, nine(1, 10), nine(1, 10), 0.0, 1, 0, "timeout"),
        ]
    )


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


def test_epoch_seconds_are_refused_with_the_remedy_and_milliseconds_are_read(tmp_path):
    seconds = [record | {"event_time": unix_ms(record) // 1_000} for record in MORNING]
    milliseconds = [record | {"event_time": unix_ms(record)} for record in MORNING]
    lines = lines_of([*seconds, *milliseconds] * 4)  # enough to be cut by their layout
    source, out = written(tmp_path / "a.ndjson", lines), tmp_path / "out"
    flags = [f"--input={source}", f"--output={out}", AS_OF, "--dedupe=payload"]
    assert main(flags) == 0
    assert verdicts(out) == {"invalid": 44, "on_time": 44, "accepted": 10, "duplicate": 34}
    assert query(out, "SELECT DISTINCT year(event_time) FROM events") == [(2026,)]
    assert {letter["reason"] for letter in dead_letters(out)} == {"epoch_seconds"}
    assert dead_letters(out)[0]["message"] == (
        "event_time is 1767603600, which must be seconds; send milliseconds since 1970 "
        "(1767603600000) or an RFC 3339 text"
    )


def unix_ms(record: Mapping[str, Any]) -> int:
    return int(datetime.fromisoformat(record["event_time"]).timestamp() * 1_000)


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


def test_an_avro_file_that_claims_records_of_no_bytes_stops_the_run(tmp_path, capsys):
    container = io.BytesIO()
    nothing = {"type": "record", "name": "r", "fields": [{"name": "a", "type": "null"}]}
    fastavro.writer(container, nothing, [{"a": None}] * 64, codec="null")
    (tmp_path / "a.avro").write_bytes(container.getvalue())
    assert main([f"--input={tmp_path}/a.avro", f"--output={tmp_path}/out", AS_OF]) == 1
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith(f"The run failed: {tmp_path}/a.avro can't be read as an Avro")
    assert complaint.endswith("is broken: it says that its 0 bytes hold 64 records")


def test_epoch_seconds_in_avro_are_refused_whatever_their_type(tmp_path):
    text = [{"name": name, "type": "string"} for name in ("user_id", "page_url", "event_type")]
    stamp = {"type": "long", "logicalType": "timestamp-millis"}
    for name, kind in (("long", "long"), ("millis", stamp)):
        fields = [{"name": "event_time", "type": kind}, *text]
        records = [
            event(0) | {"event_time": number}
            for number in (unix_ms(event(0)) // 1_000, unix_ms(event(0)))
        ]
        with (tmp_path / f"{name}.avro").open("wb") as stream:
            fastavro.writer(stream, {"type": "record", "name": "e", "fields": fields}, records)
    out = tmp_path / "out"
    assert main([f"--input={tmp_path}/*.avro", f"--output={out}", AS_OF]) == 0
    assert tables(out)["page_view_counts"] == [(nine(0), nine(1), "/a", 1)]
    assert verdicts(out) == {"invalid": 2, "on_time": 2, "accepted": 1, "duplicate": 1}
    assert {letter["reason"] for letter in dead_letters(out)} == {"epoch_seconds"}


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


def test_the_log_of_other_virtual_hosts_counts_its_clients(tmp_path):
    (tmp_path / "logs").mkdir()
    written(tmp_path / "logs" / "access.log", ACCESS_LOG[:2])
    others = [b"example.com:80 " + ACCESS_LOG[0], b"example.com " + ACCESS_LOG[0]]
    written(tmp_path / "logs" / "other_vhosts_access.log", others)
    out = tmp_path / "out"
    assert main([f"--input={tmp_path}/logs/*.log", f"--output={out}", AS_OF]) == 0
    assert tables(out)["page_view_counts"] == [(nine(0), nine(1), "/a", 3)]
    assert query(out, "SELECT user_id, page_views FROM user_sessions") == [("192.0.2.7", 3)]
    assert [(letter["payload"], letter["reason"]) for letter in dead_letters(out)] == [
        (others[1], "not_access_log")
    ]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_beside_its_file_counts_nothing_twice_and_is_named(link, tmp_path, capsys):
    log = written(tmp_path / "access-2026-01-05.log", ACCESS_LOG[:1] * 10)
    link(log, tmp_path / "access.log")  # as Apache's rotatelogs -L makes one
    patterns, out = f"{tmp_path}/*.log,{tmp_path}/./access.log", tmp_path / "out"
    assert main([f"--input={patterns}", f"--output={out}", AS_OF]) == 0
    assert tables(out)["page_view_counts"] == [(nine(0), nine(1), "/a", 10)]
    lake = f"{out}/lake/**/*.parquet"
    assert query(out, f"SELECT DISTINCT topic FROM '{lake}'") == [(str(log),)]
    complaints = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(complaints) == 2
    assert all("it is the same file as" in line for line in complaints)


def test_a_file_name_that_is_not_utf8_is_misuse(tmp_path, capsys):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.ndjson", "wb") as stream:
        stream.write(lines_of([event(0)])[0])
    assert main([f"--input={tmp_path}/c*.ndjson", f"--output={tmp_path}/out"]) == 2
    assert r"/caf\xe9.ndjson' is not UTF-8" in capsys.readouterr().err


def test_a_line_that_never_seems_to_end_is_a_dead_letter_of_its_beginning(tmp_path, capsys):
    """20 MiB in a gzip file of 20 kB; the lines around it count."""
    lines, out = lines_of([event(0), event(1)]), tmp_path / "out"
    source = written(tmp_path / "a.ndjson.gz", [lines[0], b"x" * (20 << 20), lines[1]])
    assert main([f"--input={source}", f"--output={out}", AS_OF]) == 0
    assert tables(out)["page_view_counts"] == [(nine(0), nine(1), "/a", 2)]
    [letter] = dead_letters(out)
    assert (letter["reason"], letter["offset"]) == ("too_large", len(lines[0]) + 1)
    assert letter["message"] == "at least 8388608 bytes; at most 1048576 fit"
    assert letter["payload"] == b"x" * (8 << 20)
    assert "has 20971520 bytes; its dead letter keeps the first" in capsys.readouterr().err


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
    assert main([f"--input={source}", f"--output={out}", "--format=ndjson"]) == 1
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
