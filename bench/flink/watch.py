"""Watching a job catch up: its counters over time, and what each process used meanwhile."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from beam_pipelines.telemetry import NAMESPACE
from bench.flink.processes import CpuClock

READ = "read"
PERIOD_S = 5.0
"""A look at the counters has its price: the reporter writes out thousands of metrics."""
WARM_UP_S = 30.0
"""Seconds from a job's first event on whose work is told apart: virtual machines compile then."""
STALLED_S = 300.0
"""Seconds without any progress after which a job is given up."""

_SAMPLE = re.compile(r"^flink_taskmanager_job_task_operator_(\S+?)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


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


def operator_metrics(text: str, job: str) -> Iterable[tuple[str, Mapping[str, str], float]]:
    """Return (name, labels, value) of each metric of a job's operators, from Prometheus's text."""
    for name, labels, value in _SAMPLE.findall(text):
        found = dict(_LABEL.findall(labels))
        if found.get("job_id") == job:
            yield name, found, float(value)


def beam_counters(text: str, job: str) -> Counter[str]:
    """Return the pipeline's counters, summed over subtasks, by their own names."""
    counted: Counter[str] = Counter()
    for name, _, value in operator_metrics(text, job):
        if name.startswith(f"{NAMESPACE}_"):
            own = name.removeprefix(f"{NAMESPACE}_")
            for prefix in ("rows_written", "invalid"):  # Prometheus knows no dots
                if own.startswith(f"{prefix}_"):
                    own = f"{prefix}.{own.removeprefix(prefix)[1:]}"
            counted[own] += int(value)
    return counted


_STEP = re.compile(r"ref_AppliedPTransform_(.+)_\d+\w*_metric:ptransform_execution_time")


def beam_steps(text: str, job: str) -> dict[str, float]:
    """Return the seconds that workers spent in each step; the largest first."""
    spent: Counter[str] = Counter()
    for name, _, value in operator_metrics(text, job):
        if step := _STEP.match(name):
            spent[step[1].replace("_", " ")] += round(value)
    return {step: round(ms / 1000, 1) for step, ms in spent.most_common() if ms >= 100}


def flink_sql_read(text: str, job: str) -> Counter[str]:
    """Return how many records the Kafka source of a Flink job has consumed."""
    read: Counter[str] = Counter()
    for name, _, value in operator_metrics(text, job):
        if name.endswith("_currentOffset") and value >= 0:
            read[READ] += int(value) + 1
    return read


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
