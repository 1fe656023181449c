"""Watching a job catch up: its counters over time, and what each process used meanwhile."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.flink.processes import CpuClock

READ = "read"
PERIOD_S = 5.0
"""A look at the counters costs CPU: the JobManager fetches thousands of metrics for it."""
WARM_UP_S = 30.0
"""Seconds from a job's first event on whose work is told apart: virtual machines compile then."""
STALLED_S = 300.0
"""Seconds without any progress after which a job is given up."""


class Sample(NamedTuple):
    """Counters at a moment."""

    at_s: float
    counts: Mapping[str, int]


@dataclass(frozen=True)
class CatchUp:
    """How a job worked off a backlog.

    Args:
      name: Of what was measured.
      begun: The first sample that had read something.
      samples: From the end of the warm-up, or `begun` where the job was done by then, to the first
        one that was done.
      cores: Cores in use, by process, on average between the two.
      checkpoints: What Flink tells of them; empty where it isn't Flink.
      stages: Seconds in the worker by step, over all its threads; empty where unknown.
    """

    name: str
    begun: Sample
    samples: Sequence[Sample]
    cores: Mapping[str, float]
    checkpoints: Mapping[str, Any]
    stages: Mapping[str, float]

    @property
    def events(self) -> int:
        """Events between the first and the last sample."""
        return self.samples[-1].counts[READ] - self.samples[0].counts[READ]

    @property
    def seconds(self) -> float:
        """Seconds between them."""
        return self.samples[-1].at_s - self.samples[0].at_s

    @property
    def per_s(self) -> float:
        """Events per second."""
        return _per_s(self.samples[0], self.samples[-1])

    @property
    def per_s_with_warm_up(self) -> float:
        """Events per second from the first sample that had read something."""
        return _per_s(self.begun, self.samples[-1])

    @property
    def per_s_by_quarter(self) -> list[float]:
        """Events per second of each quarter of the backlog, the first one to the last."""
        first, last = self.samples[0], self.samples[-1]
        borders = [first.counts[READ] + self.events * i / 4 for i in range(4)]
        reached = [
            next(sample for sample in self.samples if sample.counts[READ] >= border)
            for border in borders
        ]
        return [
            _per_s(a, b) if b.at_s > a.at_s else 0.0
            for a, b in zip(reached, [*reached[1:], last], strict=True)
        ]


def _per_s(first: Sample, last: Sample) -> float:
    return (last.counts[READ] - first.counts[READ]) / (last.at_s - first.at_s)


def watch(
    progress: Callable[[], Mapping[str, int]],
    done: Callable[[Mapping[str, int]], bool],
    check: Callable[[], None],
    clock: CpuClock,
    say: Callable[[str], None],
    limit_s: float = math.inf,
) -> tuple[Sample, list[Sample], dict[str, float]]:
    """Sample until a job has caught up.

    Args:
      progress: Returns the counters, `READ` among them; it may raise OSError meanwhile.
      done: Whether these counters mean that nothing is left to do.
      check: Raises where the job has failed.
      clock: Of the processes that matter.
      say: Is told how far it is.
      limit_s: Seconds from the end of the warm-up on after which the last sample is taken.

    Returns:
      The first sample that had read something; those from the end of the warm-up on, all of them
      where the job was done by then; and the cores in use meanwhile.

    Raises:
      TimeoutError: nothing has moved for STALLED_S.
    """
    begun: Sample | None = None
    warm = False
    samples: list[Sample] = []
    before = clock.read()
    moved_s = said_s = time.monotonic()
    while True:
        check()
        try:
            counts = progress()
        except OSError:
            counts = {}
        now_s = time.monotonic()
        if counts.get(READ, 0):
            sample = Sample(now_s, counts)
            if not samples or counts != samples[-1].counts:
                moved_s = now_s
            if begun is None:
                begun, before = sample, clock.read()
            samples.append(sample)
            if done(counts) or (warm and now_s - samples[0].at_s >= limit_s):
                return begun, samples, clock.read().since(before)
            if not warm and now_s - begun.at_s >= WARM_UP_S:
                warm, samples, before = True, [sample], clock.read()
        if now_s - moved_s > STALLED_S:
            raise TimeoutError(f"nothing has moved for {STALLED_S:.0f} s, at {dict(counts)}")
        if begun and now_s - said_s > 15:
            said_s = now_s
            passed = max(now_s - begun.at_s, PERIOD_S)
            rate = (counts.get(READ, 0) - begun.counts[READ]) / passed
            say(f"  read {counts.get(READ, 0):,}, {rate:,.0f}/s so far")
        time.sleep(PERIOD_S)


_STEP = re.compile(
    r"ref_AppliedPTransform_(.+)_\d+(?:/\w+)?_metric_ptransform_execution_time_total_msecs_v1$"
)


def is_step(name: str) -> bool:
    """Whether a metric of this name tells the time that workers spent in a step."""
    return _STEP.match(name) is not None


def beam_steps(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds that workers spent in each step; the largest first.

    Args:
      metrics: Milliseconds, by the names that `is_step` is true of.
    """
    spent: Counter[str] = Counter()
    for name, ms in metrics.items():
        if step := _STEP.match(name):
            spent[step[1].replace("-", " ")] += round(ms)
    return {step: round(ms / 1000, 1) for step, ms in spent.most_common() if ms >= 100}


def is_offset(name: str) -> bool:
    """Whether a metric of this name tells up to where Flink's own source read a partition."""
    return name.endswith(".currentOffset")


def flink_sql_read(metrics: Mapping[str, float]) -> dict[str, int]:
    """Return how many records the Kafka source of a Flink job has consumed.

    Args:
      metrics: Last offsets, by the names that `is_offset` is true of; negative: none as yet.
    """
    offsets = [int(value) for value in metrics.values() if value >= 0]
    return {READ: sum(offsets) + len(offsets)}


def checkpoint_figures(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what matters of Flink's /jobs/ID/checkpoints."""
    summary, counts = answer["summary"], answer["counts"]
    latest = answer["latest"]["completed"] or {}

    def of(name: str, which: str) -> int | None:
        value = summary.get(name, {}).get(which)
        return None if value is None else int(value)

    return {
        "completed": counts["completed"],
        "failed": counts["failed"],
        "restored": counts["restored"],
        "latest_full_bytes": latest.get("state_size"),
        "latest_ms": latest.get("end_to_end_duration"),
        "max_full_bytes": of("state_size", "max"),
        "avg_uploaded_bytes": of("checkpointed_size", "avg"),
        "avg_ms": of("end_to_end_duration", "avg"),
        "max_ms": of("end_to_end_duration", "max"),
    }
