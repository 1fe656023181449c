"""Whole runs against an oracle that shares nothing with them, and mutants that it must catch."""

import ast
import gzip
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from beam_pipelines import activity
from beam_pipelines.demo import TRUTH, DemoTraffic
from beam_pipelines.model.batches import Rows
from beam_pipelines.model.records import TIMESTAMP
from beam_pipelines.transforms.aggregate import CountDistinctPerWindow, CountPerWindow
from beam_pipelines.transforms.dedupe import Deduplicate
from beam_pipelines.transforms.rows import FilterRows
from beam_pipelines.transforms.sessions import Sessionize
from tests.io.contract import KEYS, LONG, shortened_form, stored_form
from tests.oracle.oracle import RAW, Oracle, Rules, write_raw
from tests.runs import event, lines_of, query, written

ORACLE = Path(__file__).with_name("oracle")
ACCESS_LOG = Path(__file__).parents[2] / "shared" / "data" / "apache_combined.log.gz"
AS_OF_US = 1_767_603_600_000_000  # 2026-01-05T09:00:00Z


def oracle_of(traffic: DemoTraffic, folder: Path, **rules: Any) -> Oracle:
    raw = folder / "raw.parquet"
    write_raw(raw, (("demo", traffic.payloads(i)) for i in range(traffic.chunks)))
    return Oracle(raw, "ndjson", Rules(traffic.as_of_us, **rules))


def run(output: Path, *flags: str) -> int:
    return activity.main([f"--output={output}", *flags])


def test_the_oracle_imports_nothing_of_ours():
    modules = sorted(ORACLE.glob("*.py"))
    imported = {
        name
        for path in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    assert [path.name for path in modules] == ["naive_sketch.py", "oracle.py", "topic.py"]
    assert not [name for name in imported if name and name.startswith("beam")]
    assert {"duckdb", "json", "tests.oracle.naive_sketch"} < imported


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_demo_run_leaves_what_the_oracle_says(seed, tmp_path):
    traffic = DemoTraffic(60_000, seed)
    oracle = oracle_of(traffic, tmp_path)
    assert run(tmp_path / "out", "--demo_events=60000", f"--seed={seed}") == 0
    assert oracle.differences(tmp_path / "out") == []
    assert truths_not_shared(oracle, traffic) == []


def truths_not_shared(oracle: Oracle, traffic: DemoTraffic) -> list[tuple[Any, ...]]:
    """Return the records of which the generator and the oracle think differently."""
    time = TRUTH.get_field_index("event_time")
    plain = TRUTH.set(time, pa.field("event_time", pa.int64()))
    chunks = [traffic.truth(i).cast(plain) for i in range(traffic.chunks)]
    oracle.sql.register("truth", pa.Table.from_batches(chunks))
    of_the_oracle = """
        SELECT
            "offset", verdict,
            CASE WHEN verdict <> 'invalid'
                THEN min("offset") OVER (PARTITION BY verdict = 'invalid', identity) END AS event,
            coalesce("offset" > event, false) AS is_resend,
            event_us, user_id, page_url, event_type
        FROM records
    """
    of_the_generator = """
        SELECT
            "offset", verdict::VARCHAR, event, is_resend,
            event_time, user_id, page_url, event_type::VARCHAR
        FROM truth
    """
    return [
        row
        for these, those in (
            (of_the_oracle, of_the_generator),
            (of_the_generator, of_the_oracle),
        )
        for row in oracle.rows(f"({these}) EXCEPT ALL ({those})")
    ]


@pytest.mark.parametrize("dedupe", ["payload", "coordinates", "none"])
def test_what_makes_two_records_one_is_as_the_oracle_says(dedupe, tmp_path):
    oracle = oracle_of(DemoTraffic(8_000, seed=4), tmp_path, dedupe=dedupe)
    assert run(tmp_path / "out", "--demo_events=8000", "--seed=4", f"--dedupe={dedupe}") == 0
    assert oracle.differences(tmp_path / "out") == []


def test_other_windows_and_time_rules_are_as_the_oracle_says(tmp_path):
    rules = {
        "out_of_orderness_s": 30,
        "allowed_lateness_s": 0,
        "future_tolerance_s": 1,
        "window_s": 7,
        "users_window_s": 100,
        "users_period_s": 30,
        "session_gap_s": 40,
    }
    oracle = oracle_of(DemoTraffic(20_000, seed=5), tmp_path, **rules)
    flags = [f"--{name}={value}" for name, value in rules.items()]
    assert run(tmp_path / "out", "--demo_events=20000", "--seed=5", *flags) == 0
    assert oracle.differences(tmp_path / "out") == []


def oracle_of_lines(path: Path, lines: list[bytes], format: str, rules: Rules) -> Oracle:
    offsets = [0]
    for line in lines[:-1]:
        offsets.append(offsets[-1] + len(line) + 1)
    records = pa.RecordBatch.from_pydict(
        {
            "payload": pa.array(lines, pa.binary()),
            "offset": pa.array(offsets, pa.int64()),
            "append_time": pa.nulls(len(lines), TIMESTAMP),
        }
    )
    raw = path.with_name("raw.parquet")
    write_raw(raw, [(str(path), records)])
    return Oracle(raw, format, rules)


def as_logged(line: bytes) -> bytes:
    return line


def behind_virtual_hosts(line: bytes) -> bytes:
    return (b"example.com:443 " if len(line) % 2 else b"[2001:db8::1]:80 ") + line


def in_a_format_of_ones_own(line: bytes) -> bytes:
    kinds = (b"example.com ", b"", b"example.com:80 ", b"::1 ", b"h:http ", b"h:1 ", b"")
    return kinds[len(line) % 7] + line


@pytest.mark.skipif(not ACCESS_LOG.exists(), reason=f"{ACCESS_LOG} isn't there")
@pytest.mark.parametrize("write", [as_logged, behind_virtual_hosts, in_a_format_of_ones_own])
def test_a_real_access_log_gives_what_the_oracle_says(write, tmp_path):
    lines = [write(line) for line in gzip.decompress(ACCESS_LOG.read_bytes()).splitlines()]
    log = written(tmp_path / "access.log", lines)
    oracle = oracle_of_lines(log, lines, "access_log", Rules(AS_OF_US, dedupe="coordinates"))
    assert run(tmp_path / "out", f"--input={log}", f"--as_of={AS_OF_US // 1000}") == 0
    assert oracle.differences(tmp_path / "out") == []


def test_numbers_for_times_give_what_the_oracle_says(tmp_path):
    numbers = ("0", "-1", "99999999", "100000000", "1767603600", "99999999999", "100000000000")
    others = ("1767603600000", "1767603600.5", '"1767603600"', "-1767603600")
    record = b'{"event_time":%s,"user_id":"u","page_url":"/","event_type":"page_view"}'
    lines = [record % number.encode() for number in (*numbers, *others)]
    source = written(tmp_path / "a.ndjson", lines)
    oracle = oracle_of_lines(source, lines, "ndjson", Rules(AS_OF_US))
    assert run(tmp_path / "out", f"--input={source}", f"--as_of={AS_OF_US // 1000}") == 0
    assert oracle.differences(tmp_path / "out") == []


def of_lines(lines: Sequence[bytes], path: Path) -> Oracle:
    """Write lines to a file, and return what the oracle knows of a run over it."""
    starts = [0, *accumulate(len(line) + 1 for line in lines)][:-1]
    columns = {
        "payload": pa.array(lines, pa.binary()),
        "offset": pa.array(starts, pa.int64()),
        "append_time": pa.nulls(len(lines), TIMESTAMP),
    }
    raw = path.with_suffix(".parquet")
    write_raw(raw, [(str(written(path, lines)), pa.RecordBatch.from_pydict(columns))])
    return Oracle(raw, "ndjson", Rules(AS_OF_US))


def test_texts_too_long_for_a_key_and_what_they_are_shortened_to_count_apart(tmp_path):
    texts = [*KEYS, shortened_form(shortened_form(LONG[0])), "é" * 1_000]
    users = [*texts, "u" * 900_000]
    events = [event(i, user=user, url=f"/{i // 2}") for i, user in enumerate(2 * users)]
    events += [event(i, url=text) for i, text in enumerate(2 * texts)]
    path = tmp_path / "long.ndjson"
    oracle = of_lines(lines_of(events), path)
    assert run(tmp_path / "out", f"--input={path}", f"--as_of={AS_OF_US // 1000}") == 0
    assert oracle.differences(tmp_path / "out") == []
    views = "SELECT page_url, views FROM page_view_counts WHERE NOT page_url SIMILAR TO '/[0-9]+'"
    assert sorted(query(tmp_path / "out", views)) == sorted((stored_form(t), 2) for t in texts)
    views = "SELECT user_id, page_views FROM user_sessions WHERE user_id <> 'ann'"
    assert sorted(query(tmp_path / "out", views)) == sorted((stored_form(u), 2) for u in users)


class Small(NamedTuple):
    """A short stream, what the oracle knows of it, and two of its page views."""

    flags: tuple[str, ...]
    oracle: Oracle
    event: tuple[int, str]  # on time; its time (µs) and user
    late_event: tuple[int, str]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    oracle = oracle_of(DemoTraffic(12_000, seed=6), tmp_path_factory.mktemp("small"))
    query = """
        SELECT event_us, user_id FROM accepted
        WHERE event_type = 'page_view' AND verdict = '{}'
        ORDER BY ALL LIMIT 1 OFFSET 9
    """
    event, late_event = (oracle.rows(query.format(verdict))[0] for verdict in ("on_time", "late"))
    return Small(("--demo_events=12000", "--seed=6"), oracle, event, late_event)


class Altered(beam.PTransform):
    """A stage whose batches are changed on their way in or out."""

    def __init__(self, stage: beam.PTransform, where: str, change: Callable[[Rows], Rows]) -> None:
        super().__init__()
        self.stage, self.where, self.change = stage, where, change

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        if self.where == "before":
            return self._changed(batches) | self.stage
        return self._changed(batches | self.stage)

    def _changed(self, batches: beam.PCollection) -> beam.PCollection:
        kept = batches.element_type
        return batches | self.where >> beam.Map(self.change).with_output_types(kept)


def is_event(rows: pa.RecordBatch, event: tuple[int, str]) -> pa.BooleanArray:
    time_us, user = event
    at = pc.equal(rows["event_time"].cast(pa.int64()), time_us)
    return pc.and_(at, pc.equal(rows["user_id"], user))


def dropped(rows: Rows, event: tuple[int, str]) -> Rows:
    return rows.filter(pc.invert(is_event(rows, event)))


def doubled(rows: Rows, event: tuple[int, str]) -> Rows:
    return pa.concat_batches([rows, rows.filter(is_event(rows, event))])


def moved(rows: Rows, by_s: int) -> Rows:
    place = rows.schema.get_field_index("event_time")
    elsewhere = pc.add(rows["event_time"].cast(pa.int64()), by_s * 1_000_000).cast(TIMESTAMP)
    return rows.set_column(place, rows.schema.field(place), elsewhere)


def split(sessions: Rows) -> Rows:
    """Split the longest session of a batch, just before its last event."""
    *rows, longest = sorted(sessions.to_pylist(), key=lambda row: row["duration_s"])
    last = longest | {"session_start": longest["session_end"], "duration_s": 0.0, "page_views": 0}
    return pa.RecordBatch.from_pylist([*rows, longest, last], schema=sessions.schema)


class Mutant(NamedTuple):
    """What is wrong at a stage of the pipeline, and which results show it."""

    stage: type[beam.PTransform]
    where: str
    change: Callable[[Small], Callable[[Rows], Rows]]
    shown_by: set[str]


COUNTED_FROM_EVENTS = {"page_view_counts", "user_sessions", "enriched", "summary.json"}
MUTANTS = {
    "an event is dropped": Mutant(
        Deduplicate,
        "after",
        lambda small: partial(dropped, event=small.event),
        COUNTED_FROM_EVENTS | {"active_users"},
    ),
    "an event is doubled": Mutant(
        Deduplicate,
        "after",
        lambda small: partial(doubled, event=small.event),
        COUNTED_FROM_EVENTS,
    ),
    "a late view is ignored": Mutant(
        FilterRows,
        "before",
        lambda small: partial(dropped, event=small.late_event),
        {"page_view_counts", "summary.json"},
    ),
    "one view counts twice": Mutant(
        FilterRows,
        "before",
        lambda small: partial(doubled, event=small.event),
        {"page_view_counts"},
    ),
    "views are counted a second too late": Mutant(
        CountPerWindow,
        "before",
        lambda small: partial(moved, by_s=1),
        {"page_view_counts", "summary.json"},
    ),
    "users are counted a window too early": Mutant(
        CountDistinctPerWindow,
        "before",
        lambda small: partial(moved, by_s=-60),
        {"active_users"},
    ),
    "a session is split": Mutant(
        Sessionize,
        "after",
        lambda small: split,
        {"user_sessions", "summary.json"},
    ),
    "an event doesn't prolong its session": Mutant(
        Sessionize,
        "before",
        lambda small: partial(dropped, event=small.event),
        {"user_sessions"},
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_the_oracle_catches_a_mutant(mutant, small, tmp_path, monkeypatch):
    stage, where, change, shown_by = mutant

    def altered(*args: Any, **named: Any) -> Altered:
        return Altered(stage(*args, **named), where, change(small))

    monkeypatch.setattr(activity, stage.__name__, altered)
    run(tmp_path / "out", *small.flags)
    assert found_in(small.oracle.differences(tmp_path / "out")) == shown_by


def found_in(differences: list[str]) -> set[str]:
    return {difference.split(":")[0] for difference in differences}


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--out_of_orderness_s=119", {"lake", "summary.json"}),
        ("--allowed_lateness_s=119", {"lake", "dead_letters", "summary.json"}),
        ("--future_tolerance_s=299", {"lake", "dead_letters", "summary.json"}),
        ("--session_gap_s=60", {"user_sessions", "summary.json"}),
    ],
)
def test_the_oracle_catches_a_rule_that_is_a_little_off(flag, told, small, tmp_path):
    assert run(tmp_path / "out", *small.flags, flag) == 0
    assert told <= found_in(small.oracle.differences(tmp_path / "out"))


def test_the_oracle_catches_one_record_too_many(small, tmp_path):
    run(tmp_path / "out", *small.flags)
    assert small.oracle.differences(tmp_path / "out") == []
    traffic = DemoTraffic(12_000, seed=6)
    write_raw(tmp_path / "raw.parquet", [("demo", traffic.payloads(0).slice(1))])
    shorter = Oracle(tmp_path / "raw.parquet", "ndjson", Rules(traffic.as_of_us))
    assert {"lake", "summary.json"} <= found_in(shorter.differences(tmp_path / "out"))


def test_the_oracle_judges_by_the_greatest_append_time_of_the_partition_so_far(tmp_path):
    stored = [(0, 0, 1000), (0, 1, 400), (0, 2, 1001), (1, 0, 400)]  # offset 1: a clock fell back
    event = '{"event_time":%d,"user_id":"u","page_url":"/","event_type":"click","event_id":"%d"}'
    rows = [
        {
            **{"topic": "t", "partition": partition, "offset": offset},
            "append_us": second * 1_000_000,
            "payload": (event % (second * 1000, i)).encode(),
        }
        for i, (partition, offset, second) in enumerate(stored)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=RAW), tmp_path / "raw.parquet")
    oracle = Oracle(tmp_path / "raw.parquet", "ndjson", Rules(0))
    judged = oracle.rows(
        'SELECT partition, "offset", append_us // 1_000_000, verdict FROM records ORDER BY ALL'
    )
    assert judged == [
        (0, 0, 1000, "on_time"),
        (0, 1, 1000, "too_late"),
        (0, 2, 1001, "on_time"),
        (1, 0, 400, "on_time"),
    ]
