"""The benchmark on Flink: how it counts, what it says. Nothing is started."""

import json
import os

import numpy as np
import pytest

from bench.flink import __main__ as command
from bench.flink import report, soak
from bench.flink.backlog import Backlog, sent
from bench.flink.job import CORE, WHOLE
from bench.flink.latency import (
    Events,
    Latency,
    Look,
    early_latency_ms,
    enriched_latency_ms,
    final_latency_ms,
)
from bench.flink.processes import OTHERS, CpuClock, Used, resident_bytes
from bench.flink.watch import (
    READ,
    CatchUp,
    Sample,
    beam_steps,
    checkpoint_figures,
    flink_sql_read,
    is_offset,
    is_step,
    watch,
)
from tests.rest_metrics import counting


def caught_up(name: str, *read: int, others: float = 0.0) -> CatchUp:
    samples = [Sample(float(second), {READ: count}) for second, count in enumerate(read)]
    return CatchUp(name, samples[0], samples, {"workers": 1.5, OTHERS: others}, {}, {"Parse": 2.0})


STEP = "ref_AppliedPTransform_Read-activity-Poll_6/ProcessSizedElementsAndRestrictions0"
OFFSET = "KafkaSourceReader.topic.t.partition.0.currentOffset"


def test_steps_have_the_seconds_of_the_workers(monkeypatch):
    spent = f"{STEP}_metric_ptransform_execution_time_total_msecs_v1"
    cluster = counting(monkeypatch, **{spent: 1500, f"{STEP}_metric_sampled_byte_size_v1": 9})
    assert beam_steps(cluster.metrics("a", is_step)) == {"Read activity Poll": 1.5}


def test_a_kafka_source_has_read_up_to_its_offsets(monkeypatch):
    offsets = {OFFSET: 9, OFFSET.replace("0", "1"): -1, OFFSET.replace("current", "committed"): 5}
    cluster = counting(monkeypatch, **offsets)
    assert flink_sql_read(cluster.metrics("a", is_offset)) == {READ: 10}


def test_watching_begins_with_the_first_event_and_ends_with_the_last(monkeypatch):
    monkeypatch.setattr("bench.flink.watch.time.sleep", lambda _: None)
    counts = iter([OSError(), {}, {READ: 0}, {READ: 5}, {READ: 8}])

    def progress():
        if isinstance(now := next(counts), OSError):
            raise now
        return now

    checked = []
    begun, samples, cores = watch(
        progress, lambda c: c[READ] == 8, lambda: checked.append(1), CpuClock({}), lambda _: None
    )
    assert [sample.counts for sample in (begun, *samples)] == [{READ: 5}, {READ: 5}, {READ: 8}]
    assert len(checked) == 5
    assert set(cores) == {OTHERS}


def test_watching_ends_at_its_limit(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("bench.flink.watch.time.sleep", lambda _: None)
    monkeypatch.setattr("bench.flink.watch.time.monotonic", lambda: float(next(clock)))
    counts = iter(range(5, 100, 5))
    _, samples, _ = watch(
        lambda: {READ: next(counts)}, lambda _: False, lambda: None, CpuClock({}),
        lambda _: None, limit_s=30,
    )  # fmt: skip
    assert samples[-1].at_s - samples[0].at_s >= 30 > samples[-2].at_s - samples[0].at_s


@pytest.fixture
def each_look_10_s_later(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("bench.flink.watch.PERIOD_S", 10.0)
    monkeypatch.setattr(
        "bench.flink.watch.time.sleep", lambda s: now_s.__setitem__(0, now_s[0] + s)
    )
    monkeypatch.setattr("bench.flink.watch.time.monotonic", lambda: now_s[0])


def test_a_job_that_is_done_within_the_warm_up_is_measured_whole(each_look_10_s_later):
    counts = iter([0, 5, 10, 20, 45])
    begun, samples, _ = watch(
        lambda: {READ: next(counts)}, lambda c: c[READ] == 45, lambda: None, CpuClock({}),
        lambda _: None, limit_s=5,
    )  # fmt: skip
    assert samples[0] == begun
    assert [sample.counts[READ] for sample in samples] == [5, 10, 20, 45]


def test_the_first_half_minute_of_work_is_told_apart(each_look_10_s_later):
    counts = iter([0, 0, 5, 10, 20, 40, 90, 140])
    begun, samples, cores = watch(
        lambda: {READ: next(counts)}, lambda c: c[READ] == 140, lambda: None, CpuClock({}),
        lambda _: None,
    )  # fmt: skip
    assert [sample.counts[READ] for sample in samples] == [40, 90, 140]
    run = CatchUp(WHOLE, begun, samples, cores, {}, {})
    assert run.per_s == 5.0  # in 20 s
    assert run.per_s_with_warm_up == 2.7  # in 50


def test_a_job_that_stands_still_is_given_up(monkeypatch):
    clock = iter(range(0, 100_000, 100))
    monkeypatch.setattr("bench.flink.watch.time.sleep", lambda _: None)
    monkeypatch.setattr("bench.flink.watch.time.monotonic", lambda: float(next(clock)))
    with pytest.raises(TimeoutError, match=r"nothing has moved for 300 s, at \{'read': 5\}"):
        watch(lambda: {READ: 5}, lambda _: False, lambda: None, CpuClock({}), lambda _: None)


def test_the_rate_is_that_between_the_first_and_the_last_sample():
    run = caught_up(CORE, 100, 300, 500, 700, 900)
    assert (run.events, run.seconds, run.per_s) == (800, 4.0, 200.0)
    assert run.per_s_by_quarter == [200.0, 200.0, 200.0, 200.0]


def test_cpu_counts_descendants_and_what_is_left_is_others(tmp_path):
    def process(pid: int, parent: int, *ticks: int) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        counters = "0 0 0 0 0 0 0 0 0"
        own = " ".join(map(str, ticks))
        memory = "20 0 1 0 99 4096 7"
        (folder / "stat").write_text(f"{pid} (a ) b) S {parent} {counters} {own} {memory} 0")

    process(10, 1, 100, 0, 0, 0)
    process(11, 10, 100, 100, 0, 0)
    process(12, 11, 0, 0, 50, 50)
    process(20, 1, 100, 0, 0, 0)
    (tmp_path / "stat").write_text("cpu  600 100 200 5000 10 0 100 0 0 0\ncpu0 1 1 1 1\n")
    used = CpuClock({"pool": 10}).read(tmp_path)
    assert used.seconds == {"pool": 4.0, OTHERS: 6.0}
    page = os.sysconf("SC_PAGE_SIZE")
    assert resident_bytes({"pool": 10, "other": 20}, tmp_path) == {
        "pool": 3 * 7 * page,
        "other": 7 * page,
    }


def test_cores_are_averages_the_largest_first():
    before, after = Used(1.0, {"a": 1.0, "b": 1.0}), Used(5.0, {"a": 3.0, "b": 7.0, "c": 1.0})
    assert list(after.since(before).items()) == [("b", 1.5), ("a", 0.5), ("c", 0.25)]


def test_checkpoint_figures_are_flinks():
    answer = {
        "counts": {"completed": 3, "failed": 1, "restored": 0},
        "summary": {
            "state_size": {"max": 900, "avg": 500},
            "checkpointed_size": {"avg": 100},
            "end_to_end_duration": {"avg": 50, "max": 70},
        },
        "latest": {"completed": {"state_size": 800, "end_to_end_duration": 60}},
    }
    assert checkpoint_figures(answer) == {
        "completed": 3,
        "failed": 1,
        "restored": 0,
        "latest_full_bytes": 800,
        "latest_ms": 60,
        "max_full_bytes": 900,
        "avg_uploaded_bytes": 100,
        "avg_ms": 50,
        "max_ms": 70,
    }


def test_a_soak_shows_what_grows_once_it_has_settled():
    # 1 MB more every 10 s, after a jump in the first half; 5 self-checkpoints a second
    samples = [
        soak.Sample(
            at_s, {"workers": (at_s * 100_000 if at_s >= 30 else 0)}, 50_000, 40, 5 * at_s, at_s
        )
        for at_s in range(0, 60, 10)
    ]
    phase = soak.Phase("busy", samples)
    assert phase.slices_per_s == 5
    lines = list(soak.shown(phase))
    assert lines[0] == "busy: 0.8 minutes, 50 events read"
    assert lines[2].split() == ["workers,", "MB", "0.0", "5.0", "5.0", "+360.0"]
    assert lines[3].split() == ["checkpoint,", "MB", "0.1", "0.1", "0.1", "+0.0"]
    assert lines[4].strip() == "checkpoints took 40 ms (median), 40 ms at most, +0 ms per hour"
    assert lines[5].endswith("leaves 1,800 bytes behind with each gains 32.4 MB per hour")


def test_a_backlog_is_named_by_what_is_in_it():
    assert Backlog(30_000_000, 50_000, 4).topic == "backlog-30000000-50000-4"
    assert sent('a line\n{"sent": 3, "acked": 3}\n') == {"sent": 3, "acked": 3}


MINUTE_MS = 60_000


def events(*rows: tuple[int, int, int, bool]) -> Events:
    identity, append_ms, event_ms, is_view = map(np.array, zip(*rows, strict=True))
    return Events(identity.astype(np.uint64), append_ms, event_ms, is_view)


CAME = events(  # of the minute from 60,000 on: three views and a click
    (1, 70_000, 65_000, True),
    (2, 80_000, 75_000, True),
    (3, 90_000, 85_000, False),
    (4, 100_000, 90_000, True),
    (9, 500_000, 490_000, True),  # moves the watermark, and has not come out
)
WENT = events(
    (1, 70_400, 65_000, True),
    (2, 80_600, 75_000, True),
    (3, 90_500, 85_000, False),
    (4, 101_000, 90_000, True),
)


def test_latency_to_the_enriched_topic_is_between_two_appends():
    assert list(enriched_latency_ms(CAME, WENT, 75_000)) == [600, 500, 1_000]


def test_an_early_row_is_late_by_when_it_counts_the_event():
    looks = [
        Look(72_000.0, {60_000: 1}),
        Look(85_000.0, {60_000: 1}),
        Look(95_000.0, {60_000: 2}),
        Look(106_000.0, {60_000: 3}),
    ]
    assert list(early_latency_ms(CAME, WENT, looks, 75_000)) == [15_000, 6_000]


def test_a_final_row_counts_all_that_came_before_the_watermark_passed():
    passed_ms = 60_000 + MINUTE_MS + 120_000
    looks = [
        Look(passed_ms - 500.0, {60_000: 2}),
        Look(passed_ms + 500.0, {60_000: 2}),
        Look(passed_ms + 1_500.0, {60_000: 3}),
    ]
    assert list(final_latency_ms(CAME, WENT, looks, 0)) == [1_500]
    assert list(final_latency_ms(CAME, WENT, looks[:2], 0)) == [np.inf]


def test_the_report_says_what_is_reached_disturbed_and_how_others_compare():
    results = report.Results(
        backlog={"events": 400_000, "partitions": 4, "append_span_s": 600.0},
        catch_ups=[
            caught_up(CORE, 0, 200_000, 400_000),
            caught_up(WHOLE, 340_000, 370_000, 400_000, others=0.7),
            caught_up("Flink SQL", 300_000, 350_000, 400_000),
            caught_up("Spark", 0, 50_000, 100_000),
        ],
        latencies=[
            Latency(
                WHOLE, 4, 20_000, np.array([300, 900]), np.array([11_000.0]), np.array([4_000.0])
            )
        ],
        failed={"spark": "out of memory"},
    )
    lines = list(report.shown(results))
    assert lines[0] == "backlog: 400,000 events, 4 partitions, append times of 600 s"
    assert lines[2].endswith("target 150,000/s reached, 67% of the aim")
    assert lines[3].endswith("missed: 50% of the target 60,000/s")
    assert lines[4].endswith("core is 4.0 times as fast")
    assert lines[5].endswith("core is 4.0 times as fast; stopped at 25% of the backlog")
    assert "  disturbed: others used 0.70 cores of this machine" in lines
    said = {line[2:32].strip(): line[32:].split() for line in lines if line.startswith("  ")}
    assert said["enriched, p99"][-1] == "holds"
    assert said["final row, max"][-1] == "exceeded"
    assert lines[-1] == "spark failed: out of memory"
    document = json.loads(json.dumps(report.document(results, {"cores": 2})))
    assert document["catch_up"][0]["events_per_s"] == 200_000
    assert document["catch_up"][0]["reached"] is True
    assert document["latency"][0]["seconds"]["enriched, p50"] == 0.6


def test_what_was_not_measured_does_not_hold():
    empty = np.empty(0)
    figures = report.latency_figures(Latency(WHOLE, 4, 20_000, empty, empty, empty))
    assert all(np.isnan(value) for value in figures.values())
    assert report._holds(figures["final row, max"], 3.0) == "exceeded"


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--only=core,storm"])
    assert ended.value.code == 2
    assert "no part 'storm'" in capsys.readouterr().err
