"""Measure the activity pipeline on one core: `python -m bench`, or `make bench`.

Prints a table and writes it as JSON. Takes about five minutes; `--quick` takes one, with
fewer events, and its figures are lower, since every run has a fixed cost. Exit code 1: a
result was wrong. Missing a target is reported, and no failure.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from beam_pipelines.demo import DemoTraffic
from bench import report, stages
from bench.child import Outcome, in_child
from bench.command import positive, say, this_machine
from bench.measure import Anchor, Figure, Goal, Workload, interleaved, use_one_core
from bench.report import Limit, Memory

PARTS = ("stages", "core", "whole", "per_event", "calendar", "memory", "oracle")
CORE = Goal(500_000, 900_000)
WHOLE = Goal(250_000, 400_000)
CALENDAR_DAYS = 3_650
SCRATCH = Path(".bench")
RESULTS = Path("bench/results/latest.json")
SEED = 1


class Sizes(NamedTuple):
    """Events of the parts."""

    runs: int  # core and whole
    stages: int
    per_event: int
    memory: int

    @property
    def smaller(self) -> int:
        """Events of the runs that memory is compared with."""
        return self.runs // 4


@dataclass
class Results:
    """What was measured so far."""

    figures: list[Figure] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    checked: str = "not checked"


class Run:
    """A run in a process of its own, as a workload.

    Each time in a folder of its own; the last one stays.
    """

    def __init__(self, kind: str, *arguments: Any, folder: Path | None = None) -> None:
        self.kind = kind
        self.arguments = arguments
        self.folder = folder
        self.outcomes: list[Outcome] = []

    def __call__(self) -> float:
        """Do it once; returns its seconds."""
        arguments = self.arguments
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            arguments = (str(self.folder), *arguments)
        self.outcomes.append(Outcome(*in_child(self.kind, *arguments)))
        return self.outcomes[-1].seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the flags ask for; returns the exit code."""
    flags = _flags(argv)
    every_core = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if not use_one_core():
        say("this system can't confine a process to one core: the figures are of several")
    SCRATCH.mkdir(exist_ok=True)
    try:
        results, anchor_per_s = measure(flags.parts, flags.sizes, flags.rounds)
        if "oracle" in flags.parts:
            if every_core:
                os.sched_setaffinity(0, every_core)
            _ask_oracle(flags.sizes.runs, results)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    machine = this_machine()
    print("\n".join(_shown(results, anchor_per_s, machine)))
    document = _document(results, anchor_per_s, machine)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    say(f"written to {flags.output}")
    return 1 if results.wrong else 0


def measure(parts: Iterable[str], sizes: Sizes, rounds: int) -> tuple[Results, float]:
    """Measure parts; returns the results, and the anchor's median records/s."""
    results = Results()
    say(f"generating {sizes.stages:,} events")
    traffic = DemoTraffic(sizes.stages, SEED)
    anchor = Anchor(traffic.payloads(i) for i in range(traffic.chunks))
    rates = [anchor() for _ in range(3)]
    if "stages" in parts:
        say("running the pipeline once, for the input of its stages")
        workloads = stages.workloads(stages.Inputs.of(traffic))
        results.figures += interleaved(workloads, anchor, rounds, say)
    results.figures += _measure_runs(parts, sizes, rounds, anchor, results)
    if "calendar" in parts:
        results.limits.append(_calendar())
    if "memory" in parts:
        results.limits.append(_memory_limit(sizes.memory))
    rates += [rate for figure in results.figures for rate in figure.anchors_per_s]
    return results, median(rates)


def _measure_runs(
    parts: Iterable[str], sizes: Sizes, rounds: int, anchor: Callable[[], float], results: Results
) -> list[Figure]:
    events, demo = sizes.runs, f"--demo_events={sizes.runs}"
    workloads: list[Workload] = []
    runs: dict[str, Run] = {}

    def add(name: str, run: Run, events: int, goal: Goal | None = None) -> None:
        runs[name] = run
        workloads.append(Workload(name, events, run, goal))

    if "per_event" in parts:
        add("per event, in Beam", Run("per_event", sizes.per_event, SEED), sizes.per_event)
    if "core" in parts:
        add("core", Run("core", events, SEED), events, CORE)
    if "whole" in parts:
        lines = _written_lines(events)
        add("whole run, generated", Run("whole", demo, folder=SCRATCH / "demo"), events, WHOLE)
        add("whole run, NDJSON file", Run("whole", f"--input={lines}", folder=SCRATCH / "file"),
            events, WHOLE)  # fmt: skip
    figures = interleaved(workloads, anchor, rounds, say)
    for name, run in runs.items():
        if len({outcome.result for outcome in run.outcomes}) > 1:
            results.wrong.append(f"{name}: the runs had different results")
    for name, small in (
        ("core", Run("core", sizes.smaller, SEED)),
        ("whole run, generated", Run("whole", f"--demo_events={sizes.smaller}",
                                     folder=SCRATCH / "small")),
    ):  # fmt: skip
        if name in runs:
            say(f"memory: {name}, {sizes.smaller:,} events")
            small()
            largest = max(runs[name].outcomes, key=lambda outcome: outcome.peak_bytes)
            results.memory[name] = Memory(small.outcomes[0], largest)
    return figures


def _written_lines(events: int) -> Path:
    """Write the generated stream as a file of lines."""
    say(f"writing {events:,} events to a file")
    path, traffic = SCRATCH / "events.ndjson", DemoTraffic(events, SEED)
    with path.open("wb") as file:
        for i in range(traffic.chunks):
            file.writelines((line or b"") + b"\n" for line in traffic.payloads(i)[0].to_pylist())
    return path


def _calendar() -> Limit:
    say(f"one event a day for {CALENDAR_DAYS:,} days")
    path = SCRATCH / "calendar.ndjson"
    first = datetime(2016, 1, 1, 12, tzinfo=UTC)
    with path.open("w") as file:
        for day in range(CALENDAR_DAYS):
            event = {
                "event_time": (first + timedelta(days=day)).isoformat(),
                "user_id": "ann",
                "page_url": "/",
                "event_type": "page_view",
            }
            file.write(json.dumps(event) + "\n")
    run = Run("whole", f"--input={path}", folder=SCRATCH / "calendar")
    return Limit(f"an event a day, {CALENDAR_DAYS:,} days", run(), 10, "s")


def _memory_limit(events: int) -> Limit:
    say(f"memory: whole run, {events:,} events")
    run = Run("whole", f"--demo_events={events}", folder=SCRATCH / "memory")
    run()
    shutil.rmtree(SCRATCH / "memory")
    return Limit(f"whole run, {events:,} events", run.outcomes[0].peak_bytes / 1e6, 2_000, "MB")


def _ask_oracle(events: int, results: Results) -> None:
    """Check the last whole run over generated events."""
    output = SCRATCH / "demo"
    if not output.exists():
        return
    say(f"asking the oracle about {events:,} events")
    different = in_child("differences", str(output), events, SEED)
    if different is None:
        results.checked = "not checked: there is no tests/oracle"
        return
    results.wrong += different
    results.checked = f"{events:,} events: " + ("WRONG" if different else "as the oracle says")


def _shown(results: Results, anchor_per_s: float, machine: dict[str, Any]) -> Iterable[str]:
    yield f"{machine['cpu']}, one core; Python {machine['python']}, Beam {machine['apache-beam']}"
    yield f"anchor: orjson parses {anchor_per_s:,.0f} of the same records/s"
    yield ""
    yield from report.speed_table(results.figures)
    yield ""
    for name, memory in results.memory.items():
        yield from report.memory_lines(name, memory, machine["memory_bytes"])
    yield from map(report.limit_line, results.limits)
    yield f"{'results':30}{results.checked}"
    yield from results.wrong


def _document(results: Results, anchor_per_s: float, machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": machine,
        "anchor_per_s": round(anchor_per_s),
        "figures": [report.figure_json(figure) for figure in results.figures],
        "memory": [
            report.memory_json(name, memory, machine["memory_bytes"])
            for name, memory in results.memory.items()
        ],
        "limits": [report.limit_json(limit) for limit in results.limits],
        "checked": results.checked,
        "wrong": results.wrong,
    }


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=positive, help="events of core and whole run (2000000)")
    parser.add_argument("--rounds", type=positive, help="runs of each (3)")
    parser.add_argument("--quick", action="store_true", help="200,000 events, one round")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file ({RESULTS})")
    flags = parser.parse_args(argv)
    flags.parts = flags.only.split(",")
    if unknown := sorted(set(flags.parts) - set(PARTS)):
        parser.error(f"--only names no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    flags.rounds = flags.rounds or (1 if flags.quick else 3)
    events = flags.events or (200_000 if flags.quick else 2_000_000)
    flags.sizes = Sizes(
        events,
        stages=min(events, 200_000),
        per_event=min(events, 2_000 if flags.quick else 10_000),
        memory=5 * events // 2,
    )
    return flags


if __name__ == "__main__":
    sys.exit(main())
