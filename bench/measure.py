"""Speed on one core, told in a unit that travels between machines.

Every run is timed between two runs of an anchor, a loop that does the least one can do with
the same bytes. Where the machine is slower, or busy, both slow down, so the ratio of the two
is what to compare with other machines and other days.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson
import pyarrow as pa


class Goal(NamedTuple):
    """Events/s to reach, and to aim for."""

    target_per_s: int
    aim_per_s: int


class Workload(NamedTuple):
    """Something to measure."""

    name: str
    events: int
    run: Callable[[], float]  # does it once; returns the seconds that count
    goal: Goal | None = None


@dataclass(frozen=True)
class Figure:
    """How fast a workload was.

    Args:
      name: Of the workload.
      events: What one run handles.
      seconds: Of each run.
      anchors_per_s: The anchor's records/s around each run: the mean of before and after.
      goal: Events/s to reach.
    """

    name: str
    events: int
    seconds: Sequence[float]
    anchors_per_s: Sequence[float]
    goal: Goal | None = None

    @property
    def per_s(self) -> float:
        """Median events/s."""
        return statistics.median(self.events / seconds for seconds in self.seconds)

    @property
    def per_anchor(self) -> float:
        """Median ratio of events/s to the anchor's records/s."""
        runs = zip(self.seconds, self.anchors_per_s, strict=True)
        return statistics.median(self.events / seconds / anchor for seconds, anchor in runs)


def interleaved(
    workloads: Sequence[Workload],
    anchor: Callable[[], float],
    rounds: int,
    say: Callable[[str], None],
) -> list[Figure]:
    """Measure workloads in turns, with the anchor between any two runs.

    Args:
      workloads: What to measure.
      anchor: Runs the anchor; returns its records/s.
      rounds: How often each workload runs.
      say: Is told what runs now.
    """
    seconds: list[list[float]] = [[] for _ in workloads]
    anchors: list[list[float]] = [[] for _ in workloads]
    before = anchor()
    for number in range(1, rounds + 1):
        for i, workload in enumerate(workloads):
            say(f"round {number} of {rounds}: {workload.name}, {workload.events:,} events")
            seconds[i].append(workload.run())
            after = anchor()
            anchors[i].append((before + after) / 2)
            before = after
    return [
        Figure(
            workload.name, workload.events, tuple(its_seconds), tuple(its_anchors), workload.goal
        )
        for workload, its_seconds, its_anchors in zip(workloads, seconds, anchors, strict=True)
    ]


class Anchor:
    """The loop that speeds are compared with: orjson parses each payload, and that is all.

    Args:
      batches: Batches of PAYLOADS; those that are no JSON are left out.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        payloads = [payload for batch in batches for payload in batch["payload"].to_pylist()]
        self.payloads = [payload for payload in payloads if _is_json(payload)]

    def __call__(self) -> float:
        """Run the loop once; returns records/s."""
        parse = orjson.loads
        started = time.perf_counter()
        for payload in self.payloads:
            parse(payload)
        return len(self.payloads) / (time.perf_counter() - started)


def _is_json(payload: bytes | None) -> bool:
    try:
        orjson.loads(payload or b"")
    except orjson.JSONDecodeError:
        return False
    return True


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def use_one_core() -> bool:
    """Confine this process and its children to one core, where the system can.

    Returns:
      Whether it can; if not (macOS), Arrow is told to use one thread, and no more.
    """
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}  # Arrow's, in the children
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return True


def resident_bytes() -> tuple[int, int]:
    """Return the memory this process has now, and the most it ever had (bytes).

    From /proc where there is one: the maximum of getrusage also counts the parent's memory
    at the moment of the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        kilobytes = {words[0]: int(words[1]) for words in lines if words[0] in _MEMORY}
        now, peak = (kilobytes[name] * 1024 for name in _MEMORY)
        return now, peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak, peak


_MEMORY = ("VmRSS:", "VmHWM:")
