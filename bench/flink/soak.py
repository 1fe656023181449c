"""Run the whole job for long, and look at what grows: `python -m bench.flink.soak`, or `make soak`.

First without events, then at a steady rate, each for a while. Prints how the memory of every
process and the size of the checkpoints move, as slopes over the second half of either, and
writes all samples as JSON. Exit code 1: the job failed, or couldn't keep up.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import positive, say, this_machine
from bench.flink import job
from bench.flink.backlog import producer_command
from bench.flink.platform import Platform, add_flags
from bench.flink.processes import resident_bytes
from bench.flink.watch import READ

TOPIC, PARTITIONS = "soak", 4
PERIOD_S = 10.0
RESULTS = Path("bench/results/soak-latest.json")

LEAK_BYTES = 1_800
"""State that one self-checkpoint of a reader leaves behind on runners that leak it: Beam's before
2.76, but not the one that is built here (`runners/flink/src`)."""


@dataclass(frozen=True)
class Sample:
    """A moment of the job.

    Args:
      at_s: Seconds since the first sample.
      resident_bytes: By process.
      checkpoint_bytes: The last one's, in full; 0: there is none.
      checkpoint_ms: How long it took.
      slices: Self-checkpoints of the readers so far.
      read: Events so far.
    """

    at_s: float
    resident_bytes: Mapping[str, int]
    checkpoint_bytes: int
    checkpoint_ms: int
    slices: int
    read: int


@dataclass(frozen=True)
class Phase:
    """What was seen idle, or at a rate."""

    name: str
    samples: Sequence[Sample]

    @property
    def settled(self) -> Sequence[Sample]:
        """The second half: what begins has begun."""
        return self.samples[len(self.samples) // 2 :]

    def slope(self, values: Sequence[float]) -> float:
        """Return how much values of the settled samples grow in an hour, by least squares."""
        at_s = [sample.at_s for sample in self.settled]
        return float(np.polyfit(at_s, values, 1)[0]) * 3600 if len(at_s) > 1 else float("nan")

    @property
    def slices_per_s(self) -> float:
        """Self-checkpoints per second."""
        first, last = self.settled[0], self.settled[-1]
        return (last.slices - first.slices) / (last.at_s - first.at_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    flags = _flags(argv)
    platform = Platform(flags.home, flags.port_offset)
    try:
        with platform.fresh(*job.SERVICES[job.WHOLE]):
            platform.make_topic(TOPIC, PARTITIONS)
            with job.started(platform, job.WHOLE, TOPIC) as (running, _):
                phases = _phases(platform, running, flags)
        platform.remove_topics(TOPIC)
    finally:
        platform.close()
    document = {
        "machine": this_machine(),
        "offered_per_s": flags.offered_per_s,
        "phases": [asdict(phase) for phase in phases],
    }
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(document, indent=1) + "\n")
    for phase in phases:
        print("\n".join(shown(phase)))
    say(f"written to {flags.output}")
    return 0


def _phases(platform: Platform, running: job.Job, flags: Any) -> list[Phase]:
    running.await_checkpoint()
    leaders = platform.leaders()
    say(f"{flags.idle_minutes} minutes without events")
    idle = list(_samples(running, leaders, flags.idle_minutes * 60))
    say(f"{flags.minutes} minutes at {flags.offered_per_s:,} events/s")
    seconds = flags.minutes * 60
    with platform.started(
        "soak-offer", producer_command(TOPIC, flags.offered_per_s, seconds)
    ) as producer:
        busy = list(_samples(running, leaders, seconds))
        if producer.wait():
            raise RuntimeError(f"the producer failed:\n{platform.tail('soak-offer')}")
    sent = platform.records(TOPIC)
    deadline = time.monotonic() + 60
    while running.counters().get(READ, 0) < sent:
        if time.monotonic() > deadline:
            raise TimeoutError("60 s after the last event not all were read: it can't keep up")
        time.sleep(1)
    return [Phase("idle", idle), Phase(f"{flags.offered_per_s:,} events/s", busy)]


def _samples(running: job.Job, leaders: Mapping[str, int], seconds: float) -> Iterator[Sample]:
    begun = time.monotonic()
    while (at_s := time.monotonic() - begun) < seconds:
        running.check()
        try:
            counters, checkpoints = running.counters(), running.checkpoints()
        except OSError:  # too busy to answer
            continue
        yield Sample(
            round(at_s, 1),
            resident_bytes(leaders),
            checkpoints["latest_full_bytes"] or 0,
            checkpoints["latest_ms"] or 0,
            counters.get("slices", 0),
            counters.get(READ, 0),
        )
        time.sleep(max(PERIOD_S - (time.monotonic() - begun - at_s), 0))


def shown(phase: Phase) -> Iterator[str]:
    """Return the lines of a report."""
    first, last = phase.samples[0], phase.samples[-1]
    minutes = (last.at_s - first.at_s) / 60
    read = last.read - first.read
    yield f"{phase.name}: {minutes:.1f} minutes, {read:,} events read"
    yield f"  {'':24}{'first':>9}{'last':>9}{'most':>9}{'per hour':>10}"
    for name in first.resident_bytes:
        yield _line(name, phase, [sample.resident_bytes[name] for sample in phase.samples])
    yield _line("checkpoint", phase, [sample.checkpoint_bytes for sample in phase.samples])
    took_ms = [sample.checkpoint_ms for sample in phase.samples]
    yield (
        f"  checkpoints took {np.median(took_ms):,.0f} ms (median), {max(took_ms):,} ms at most, "
        f"{phase.slope(took_ms[len(took_ms) // 2 :]):+z,.0f} ms per hour"
    )
    yield (
        f"  {phase.slices_per_s:.1f} self-checkpoints/s: a runner that leaves {LEAK_BYTES:,} bytes "
        f"behind with each gains {phase.slices_per_s * LEAK_BYTES * 3600 / 1e6:,.1f} MB per hour"
    )


def _line(name: str, phase: Phase, sizes: Sequence[int]) -> str:
    slope = phase.slope(sizes[len(sizes) // 2 :])
    figures = f"{sizes[0] / 1e6:>9,.1f}{sizes[-1] / 1e6:>9,.1f}{max(sizes) / 1e6:>9,.1f}"
    return f"  {name + ', MB':24}{figures}{slope / 1e6:>+z10,.1f}"


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.flink.soak", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--minutes", type=positive, default=20, help="at the rate (20)")
    add("--idle_minutes", type=positive, default=5, help="without events (5)")
    add("--offered_per_s", type=positive, default=20_000, help="rate (20000)")
    add_flags(parser)
    add("--output", type=Path, default=RESULTS, help=f"JSON file ({RESULTS})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
