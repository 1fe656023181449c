"""What was measured, as a table and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.child import Outcome
from bench.measure import Figure

_MB, _GB = 1_000_000, 1_000_000_000
_NAME_WIDTH = 30


@dataclass(frozen=True)
class Memory:
    """Memory of a kind of run, from a run over few events and one over more.

    The runner in this process keeps what passes between stages until it is used, so the
    peak grows with the events: on a line, of which these are two points.
    """

    small: Outcome
    large: Outcome

    @property
    def bytes_per_event(self) -> float:
        """By how much one more event raises the peak; input held in memory is not counted."""
        grown = _own_bytes(self.large) - _own_bytes(self.small)
        return max(grown / (self.large.events - self.small.events), 0.0)

    def events_within(self, limit_bytes: int) -> float:
        """Return how many events a run can take before its peak exceeds a limit."""
        if not self.bytes_per_event:
            return float("inf")
        fixed_bytes = self.large.peak_bytes - self.large.events * self.bytes_per_event
        return max((limit_bytes - fixed_bytes) / self.bytes_per_event, 0.0)


def _own_bytes(outcome: Outcome) -> int:
    return outcome.peak_bytes - outcome.before_bytes


@dataclass(frozen=True)
class Limit:
    """Something that has to stay below a bound."""

    name: str
    value: float
    bound: float
    unit: str

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return self.value < self.bound


def speed_table(figures: Sequence[Figure]) -> Iterator[str]:
    """Return the lines of a table of speeds."""
    yield f"{'':{_NAME_WIDTH}}{'events':>11}{'events/s':>12}{'ns/event':>11}{'x anchor':>10}"
    for figure in figures:
        line = (
            f"{figure.name:{_NAME_WIDTH}}{figure.events:>11,}{figure.per_s:>12,.0f}"
            f"{1e9 / figure.per_s:>11,.0f}{figure.per_anchor:>10.3g}"
        )
        yield line + (f"   {_against_goal(figure)}" if figure.goal else "")


def _against_goal(figure: Figure) -> str:
    assert figure.goal is not None
    target, aim = figure.goal
    if figure.per_s < target:
        return f"missed: {figure.per_s / target:.0%} of the target {target:,}/s"
    reached = f"target {target:,}/s reached"
    if figure.per_s < aim:
        return f"{reached}, {figure.per_s / aim:.0%} of the aim {aim:,}/s"
    return f"{reached}, and the aim {aim:,}/s"


def memory_lines(name: str, memory: Memory, machine_bytes: int) -> Iterator[str]:
    """Say what memory a kind of run takes, and when to leave this process."""
    sizes = (memory.small, memory.large)
    peaks = ", ".join(f"{each.peak_bytes / _MB:,.0f} MB at {each.events:,}" for each in sizes)
    yield f"{name:{_NAME_WIDTH}}peak {peaks} events: {memory.bytes_per_event:,.0f} bytes per event"
    limits = dict.fromkeys((8 * _GB, machine_bytes))
    borders = ", ".join(
        f"{_rounded(memory.events_within(limit // 2))} events ({limit / _GB:.0f} GB)"
        for limit in limits
    )
    yield f"{'':{_NAME_WIDTH}}beyond half of a machine's memory, from {borders} on,"
    yield f"{'':{_NAME_WIDTH}}Flink or Spark is the better choice"


def _rounded(events: float) -> str:
    return "any number of" if events == float("inf") else f"{events / 1e6:,.0f} million"


def limit_line(limit: Limit) -> str:
    """Say whether a bound holds."""
    verdict = "holds" if limit.holds else "exceeded"
    shown = f"{limit.value:,.1f} {limit.unit}, bound {limit.bound:,.0f} {limit.unit}"
    return f"{limit.name:{_NAME_WIDTH}}{shown}: {verdict}"


def figure_json(figure: Figure) -> dict[str, Any]:
    """Return a figure as JSON values."""
    shown: dict[str, Any] = {
        "name": figure.name,
        "events": figure.events,
        "events_per_s": round(figure.per_s),
        "per_anchor": round(figure.per_anchor, 4),
        "seconds": [round(seconds, 4) for seconds in figure.seconds],
        "anchors_per_s": [round(anchor) for anchor in figure.anchors_per_s],
    }
    if figure.goal:
        shown |= {**figure.goal._asdict(), "reached": figure.per_s >= figure.goal.target_per_s}
    return shown


def memory_json(name: str, memory: Memory, machine_bytes: int) -> dict[str, Any]:
    """Return the memory of a kind of run as JSON values."""
    return {
        "name": name,
        "peak_bytes": {str(o.events): o.peak_bytes for o in (memory.small, memory.large)},
        "bytes_per_event": round(memory.bytes_per_event, 1),
        "events_within_half_of": {
            str(limit): None if within == float("inf") else round(within)
            for limit in dict.fromkeys((8 * _GB, machine_bytes))
            for within in [memory.events_within(limit // 2)]
        },
    }


def limit_json(limit: Limit) -> dict[str, Any]:
    """Return a bound as JSON values."""
    return {**vars(limit), "value": round(limit.value, 3), "holds": limit.holds}
