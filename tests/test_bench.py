"""The benchmark: how it measures, what it says, and that every part of it runs."""

import json
import sys

import pytest

from beam_pipelines.demo import DemoTraffic
from bench import __main__ as command
from bench import per_event, profile, report
from bench.child import Outcome
from bench.measure import Anchor, Figure, Goal, Workload, interleaved, resident_bytes
from bench.stages import Inputs, workloads

MB = 1_000_000


def test_each_run_is_compared_with_the_anchor_before_and_after_it():
    anchors = iter([10.0, 20.0, 40.0, 40.0, 10.0])
    seconds = {"a": iter([1.0, 3.0]), "b": iter([2.0, 2.0])}
    said: list[str] = []
    figures = interleaved(
        [Workload(name, 60, lambda runs=runs: next(runs)) for name, runs in seconds.items()],
        lambda: next(anchors),
        2,
        said.append,
    )
    assert figures == [
        Figure("a", 60, (1.0, 3.0), (15.0, 40.0)),
        Figure("b", 60, (2.0, 2.0), (30.0, 25.0)),
    ]
    assert figures[0].per_s == (60 + 20) / 2
    assert figures[0].per_anchor == (60 / 15 + 20 / 40) / 2
    assert said[0] == "round 1 of 2: a, 60 events"
    assert len(said) == 4


def test_the_anchor_leaves_out_what_is_no_json():
    batches = [DemoTraffic(20_000).payloads(0)]
    anchor = Anchor(batches)
    payloads = batches[0]["payload"].to_pylist()
    assert set(anchor.payloads) < set(payloads)
    assert len(payloads) * 0.995 < len(anchor.payloads) < len(payloads)
    assert anchor() > 0


@pytest.mark.parametrize(
    ("per_s", "words"),
    [
        (400, "missed: 80% of the target 500/s"),
        (500, "target 500/s reached, 50% of the aim 1,000/s"),
        (1_000, "target 500/s reached, and the aim 1,000/s"),
    ],
)
def test_a_figure_says_whether_its_target_is_reached(per_s, words):
    figure = Figure("core", per_s, (1.0,), (2.0,), Goal(500, 1_000))
    header, line = report.speed_table([figure])
    assert header.split() == ["events", "events/s", "ns/event", "x", "anchor"]
    assert line.endswith(f"   {words}")
    assert report.figure_json(figure)["reached"] == (per_s >= 500)


def test_memory_is_a_line_through_two_runs():
    def outcome(events: int, peak_bytes: int) -> Outcome:
        return Outcome(events, 1.0, 100 * MB, peak_bytes, "")

    memory = report.Memory(outcome(1_000_000, 400 * MB), outcome(2_000_000, 600 * MB))
    assert memory.bytes_per_event == 200
    assert memory.events_within(4_000 * MB) == 19_000_000
    assert memory.events_within(100 * MB) == 0
    shown = list(report.memory_lines("whole", memory, 16_000 * MB))
    assert shown[0].endswith(
        "peak 400 MB at 1,000,000, 600 MB at 2,000,000 events: 200 bytes per event"
    )
    assert "from 19 million events (8 GB), 39 million events (16 GB) on" in shown[1]
    assert report.memory_json("whole", memory, 16_000 * MB)["events_within_half_of"] == {
        "8000000000": 19_000_000,
        "16000000000": 39_000_000,
    }


def test_input_held_in_memory_is_not_what_an_event_costs():
    small = Outcome(1_000_000, 1.0, 300 * MB, 400 * MB, "")
    large = Outcome(2_000_000, 1.0, 500 * MB, 700 * MB, "")
    assert report.Memory(small, large).bytes_per_event == 100


def test_memory_that_does_not_grow_has_no_border():
    same = [Outcome(events, 1.0, 0, 50 * MB, "") for events in (1, 2)]
    memory = report.Memory(*same)
    assert memory.events_within(1) == float("inf")
    assert report.memory_json("core", memory, 8_000 * MB)["events_within_half_of"] == {
        "8000000000": None
    }


@pytest.mark.parametrize(("value", "verdict"), [(9.9, "holds"), (10.0, "exceeded")])
def test_a_limit_says_whether_it_holds(value, verdict):
    limit = report.Limit("calendar", value, 10, "s")
    assert report.limit_line(limit).endswith(f"bound 10 s: {verdict}")
    assert report.limit_json(limit)["holds"] == (verdict == "holds")


def test_memory_is_read_in_bytes():
    now, peak = resident_bytes()
    assert 10 * MB < now <= peak


def test_every_stage_runs_on_what_reaches_it():
    inputs = Inputs.of(DemoTraffic(4_000))
    assert sum(map(len, inputs.payloads)) == 4_000
    assert all(workload.run() > 0 for workload in workloads(inputs))


def test_the_per_event_pipeline_accepts_what_the_batch_pipeline_accepts():
    traffic = DemoTraffic(600)
    per_event.hold(traffic)
    accepted = sum(map(len, Inputs.of(traffic).events))
    flaws = traffic.truth(0)["flaw"].to_pylist()
    # Python's json takes -Infinity; the batch pipeline doesn't.
    assert per_event.run_per_event() == accepted + flaws.count("infinity")


def test_a_quick_run_prints_a_table_and_writes_it_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "use_one_core", lambda: True)  # the other tests want theirs
    monkeypatch.setattr(command, "SCRATCH", tmp_path / "scratch")
    output = tmp_path / "results" / "latest.json"
    flags = ["--events=400", "--rounds=1", "--only=whole,oracle", f"--output={output}"]
    assert command.main(flags) == 0
    document = json.loads(output.read_text())
    assert [figure["name"] for figure in document["figures"]] == [
        "whole run, generated",
        "whole run, NDJSON file",
    ]
    assert document["checked"] == "400 events: as the oracle says"
    assert document["wrong"] == []
    assert [memory["name"] for memory in document["memory"]] == ["whole run, generated"]
    assert "as the oracle says" in capsys.readouterr().out
    assert not (tmp_path / "scratch").exists()


def test_a_part_that_is_not_there_is_misuse(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--only=cores"])
    assert ended.value.code == 2
    assert "--only names no part 'cores'" in capsys.readouterr().err


def test_a_look_is_put_down_to_the_innermost_function_of_ours():
    found = profile.Profile()
    traffic = DemoTraffic(100)

    class Spy:
        @property
        def events(self) -> int:
            found.add(sys._getframe())
            return 100

    type(traffic).chunks.fget(Spy())  # a function of ours that calls one that is not
    assert found.stages == {"demo/traffic.py DemoTraffic.chunks": 1}
    (line,) = profile.shares(found.stages, 1)
    assert line == " 100.0 %  demo/traffic.py DemoTraffic.chunks"
