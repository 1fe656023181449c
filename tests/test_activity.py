"""Whole runs of the activity pipeline: repeated, divided otherwise, refused, distrusted."""

import gzip
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pytest

from beam_pipelines import activity
from beam_pipelines.activity import broken_laws, main
from beam_pipelines.config import ActivityConfig
from beam_pipelines.connectors import Source, open_source
from beam_pipelines.demo import CHUNK_RECORDS, DemoTraffic
from beam_pipelines.io import generated
from beam_pipelines.io.generated import ReadGenerated
from tests.runs import (
    dead_letters,
    digests,
    enriched,
    event,
    lines_of,
    query,
    summary,
    tables,
    written,
)

DEMO = ("--demo_events=20000", "--seed=3")


def test_a_repeated_run_leaves_the_same_bytes(tmp_path):
    out = tmp_path / "out"
    flags = [f"--output={out}", *DEMO]
    assert main(flags) == 0
    first = (digests(out), tables(out), summary(out))
    assert main(flags) == 0
    second = (digests(out), tables(out), summary(out))
    for changing in ("activity.duckdb", "summary.json"):
        first[0].pop(changing), second[0].pop(changing)
    first[2].pop("seconds"), second[2].pop("seconds")
    assert second == first
    assert {"run.json", "dead_letters/part-00000-of-00001.parquet"} < set(first[0])


def test_a_run_elsewhere_leaves_the_same_results(tmp_path):
    for name in ("one", "two"):
        assert main([f"--output={tmp_path / name}", *DEMO]) == 0
    one, two = (
        {name: d for name, d in digests(tmp_path / run).items() if "/" in name}
        for run in ("one", "two")
    )
    assert one == two
    hashes = [summary(tmp_path / run)["result_sha256"] for run in ("one", "two")]
    assert hashes[0] == hashes[1]


def chunk_of(traffic: DemoTraffic, records: int, i: int) -> pa.RecordBatch:
    start = i * records
    whole = traffic.payloads(start // CHUNK_RECORDS)
    return whole.slice(start % CHUNK_RECORDS, records)


def read_in_parts(monkeypatch: pytest.MonkeyPatch, records: int, range_offsets: int) -> None:
    """Let the demo be read in smaller batches (of `records`) and bundles (of ranges)."""

    def opened(config: ActivityConfig, readers: int) -> Source:
        source, traffic = open_source(config), DemoTraffic(config.demo_events, config.seed)
        monkeypatch.setattr(generated, "RANGE_OFFSETS", range_offsets)
        chunk = partial(chunk_of, traffic, records)
        return replace(source, read=ReadGenerated(chunk, traffic.events, records, "demo"))

    monkeypatch.setattr(activity, "open_source", opened)


@pytest.mark.parametrize(("records", "range_offsets"), [(4_000, 500_000), (500, 4_000), (50, 50)])
def test_the_size_of_batches_and_bundles_changes_no_result(
    records, range_offsets, tmp_path, monkeypatch
):
    demo = ("--demo_events=6000", "--seed=3")
    assert main([f"--output={tmp_path}/whole", *demo]) == 0
    read_in_parts(monkeypatch, records, range_offsets)
    assert main([f"--output={tmp_path}/parts", *demo]) == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tables(parts) == tables(whole)
    assert digests(parts / "enriched") == digests(whole / "enriched")
    assert dead_letters(parts) == dead_letters(whole)
    assert query(parts, "FROM events ORDER BY ALL") == query(whole, "FROM events ORDER BY ALL")
    kept = ("verdicts", "invalid", "result_sha256", "ignored_session_ends")
    assert {k: summary(parts)[k] for k in kept} == {k: summary(whole)[k] for k in kept}
    assert len(list((parts / "lake").rglob("*.parquet"))) >= 6_000 // range_offsets


def test_the_view_shows_the_events_of_the_enriched_files(tmp_path):
    out = tmp_path / "out"
    assert main([f"--output={out}", *DEMO]) == 0
    columns = ("event_time", "user_id", "page_url", "event_type", "event_id")
    seen = query(
        out,
        "SELECT strftime(event_time, '%Y-%m-%dT%H:%M:%S.%fZ'), user_id, page_url, event_type, "
        "event_id FROM events",
    )
    shown = [tuple(row.get(column) for column in columns) for row in enriched(out)]
    assert sorted(seen, key=str) == sorted(shown, key=str)
    assert len(shown) == summary(out)["verdicts"]["accepted"] > 15_000


def test_a_run_with_another_seed_is_refused_until_it_may_overwrite(tmp_path, capsys):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert main([f"--output={out}", "--demo_events=3000"]) == 0
    before = digests(out)
    capsys.readouterr()
    other = ("--demo_events=3000", "--seed=2")
    assert main([f"--output={out}", *other]) == 2
    assert "input.seed was 1, is 2" in (told := capsys.readouterr().err)
    assert "--overwrite" in told
    assert digests(out) == before
    assert main([f"--output={out}", *other, "--overwrite"]) == 0
    assert main([f"--output={fresh}", *other]) == 0
    assert tables(out) == tables(fresh)
    assert digests(out / "lake") == digests(fresh / "lake")
    assert digests(out / "enriched") == digests(fresh / "enriched")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sessiongap_s=5"], "there is no flag --sessiongap_s; did you mean --session_gap_s?"),
        (["--input=/nowhere/*.log"], "no file matches '/nowhere/*.log'"),
        (["--runner=FlinkRunner"], "is a DuckDB file, which one process writes"),
        (["--direct_running_mode=multi_processing"], "multi_processing isn't supported"),
    ],
)
def test_misuse_exits_with_2_and_says_what_would_be_right(flags, told, tmp_path, capsys):
    try:
        code: Any = main([f"--output={tmp_path}/out", *flags])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_several_formats_are_refused(tmp_path, capsys):
    (tmp_path / "a.log").write_text('h - - [05/Jan/2026:10:00:01 +0100] "GET /a" 200 1\n')
    written(tmp_path / "b.log", lines_of([event(0)]))
    assert main([f"--input={tmp_path}/*.log", f"--output={tmp_path}/out"]) == 2
    assert "has several formats" in capsys.readouterr().err


ADDING_UP = {
    "read": 100,
    "invalid": 1,
    "future": 2,
    "too_late": 3,
    "on_time": 90,
    "late": 4,
    "accepted": 84,
    "duplicate": 10,
    "rows_written.lake": 97,
    "rows_written.enriched": 84,
    "rows_written.dead_letters": 6,
}


def test_counts_that_add_up_break_no_law():
    assert broken_laws(ADDING_UP) == []
    assert broken_laws({}) == []


@pytest.mark.parametrize(
    ("counter", "law"),
    [
        ("read", "read = invalid + future + too_late + on_time + late"),
        ("duplicate", "on_time + late = accepted + duplicate"),
        ("rows_written.lake", "lake = on_time + late + too_late"),
        ("rows_written.enriched", "enriched = accepted"),
        ("rows_written.dead_letters", "dead_letters = invalid + future + too_late"),
        ("older_than_folded", "older_than_folded = 0"),
        ("nameless_sessions", "nameless_sessions = 0"),
    ],
)
def test_a_count_that_is_off_breaks_its_law(counter, law):
    (broken,) = broken_laws(ADDING_UP | {counter: ADDING_UP.get(counter, 0) + 1})
    assert broken.startswith(f"{law} is off by ") and broken.endswith("1")


def test_a_run_whose_verdicts_do_not_add_up_fails(tmp_path, monkeypatch, capsys):
    counted = activity.counters
    monkeypatch.setattr(
        activity, "counters", lambda result: (c := counted(result)) | {"read": c["read"] + 1}
    )
    assert main([f"--output={tmp_path}/out", "--demo_events=500"]) == 1
    law = "read = invalid + future + too_late + on_time + late is off by 1"
    assert f"This run can't be trusted: {law}" in capsys.readouterr().err
    assert summary(tmp_path / "out")["broken_laws"] == [law]


def test_the_terminal_shows_what_happened(tmp_path, capsys):
    out = tmp_path / "out"
    assert main([f"--output={out}", *DEMO]) == 0
    shown = capsys.readouterr().out
    counts = summary(out)["verdicts"]
    for part in (
        "20,000  events read",
        *(f"{counts[name]:,}  {name}" for name in ("on_time", "late", "too_late", "future")),
        f"{counts['accepted']:,}  accepted, {counts['duplicate']:,} duplicates",
        "A late event\n  event ",
        f"result {summary(out)['result_sha256']}",
        f"{out}/activity.duckdb",
    ):
        assert part in shown


def test_a_run_that_fails_says_why_and_can_be_repeated(tmp_path, capsys):
    whole = gzip.compress(b"\n".join(b'{"user_id":"u-%d"}' % i for i in range(1000)))
    path = tmp_path / "cut.gz"
    path.write_bytes(whole[:-20])
    flags = [f"--output={tmp_path / 'out'}", f"--input={path}", "--format=ndjson"]
    for _ in range(2):
        assert main(flags) == 1
        assert f"The run failed: {path} can't be decompressed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.json").exists()
