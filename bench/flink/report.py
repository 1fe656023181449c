"""What was measured on Flink, as a table and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.flink.job import CORE, WHOLE
from bench.flink.latency import Latency
from bench.flink.processes import OTHERS
from bench.flink.watch import READ, WARM_UP_S, CatchUp
from bench.measure import Goal

GOALS = {CORE: Goal(150_000, 300_000), WHOLE: Goal(60_000, 120_000)}
LIMITS_S = {
    "enriched, p50": 0.5,
    "enriched, p99": 1.0,
    "row of an open window, max": 12.0,
    "final row, max": 3.0,
}
BUSY_CORES = 0.2
"""What others may use of the machine before figures are called disturbed."""

_WIDTH = 30


@dataclass
class Results:
    """What was measured so far."""

    backlog: dict[str, Any] = field(default_factory=dict)
    catch_ups: list[CatchUp] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def shown(results: Results) -> Iterator[str]:
    """Return the lines of the report."""
    if results.backlog:
        yield (
            "backlog: {events:,} events, {partitions} partitions, append times of "
            "{append_span_s:,.0f} s".format(**results.backlog)
        )
    if results.catch_ups:
        yield from _speeds(results.catch_ups, results.backlog["events"])
    for each in results.catch_ups:
        yield ""
        yield from _details(each)
    for latency in results.latencies:
        yield ""
        yield f"{latency.kind}, {latency.per_s:,} events/s over {latency.partitions} partitions"
        for name, value_s in latency_figures(latency).items():
            limit = LIMITS_S.get(name)
            verdict = "" if limit is None else f"   limit {limit:g} s: {_holds(value_s, limit)}"
            yield f"  {name:{_WIDTH}}{_seconds(value_s):>10}{verdict}"
    for name, reason in results.failed.items():
        yield f"{name} failed: {reason}"


def _speeds(catch_ups: Sequence[CatchUp], backlog: int) -> Iterator[str]:
    ours = {each.name: each.per_s for each in catch_ups}.get(CORE)
    yield f"{'':{_WIDTH}}{'events':>12}{'events/s':>10}{'µs CPU/event':>14}"
    for each in catch_ups:
        cpu_us = 1e6 * sum(_measured(each.cores).values()) / each.per_s
        line = f"{each.name:{_WIDTH}}{each.events:>12,}{each.per_s:>10,.0f}{cpu_us:>14.1f}"
        if goal := GOALS.get(each.name):
            line += f"   {_against(each.per_s, goal)}"
        elif ours:
            line += f"   core is {ours / each.per_s:.1f} times as fast"
        if (read := each.samples[-1].counts[READ]) < backlog:
            line += f"; stopped at {read / backlog:.0%} of the backlog"
        yield line


def _details(each: CatchUp) -> Iterator[str]:
    cores = ", ".join(f"{name} {used:.2f}" for name, used in each.cores.items() if used >= 0.005)
    yield f"{each.name}: cores in use: {cores}"
    if each.cores.get(OTHERS, 0) > BUSY_CORES:
        yield f"  disturbed: others used {each.cores[OTHERS]:.2f} cores of this machine"
    quarters = ", ".join(f"{rate:,.0f}" for rate in each.per_s_by_quarter)
    yield f"  events/s by quarter of the backlog: {quarters}"
    yield f"  with the warm-up of {WARM_UP_S:.0f} s: {each.per_s_with_warm_up:,.0f} events/s"
    if each.checkpoints:
        yield (
            "  checkpoints: {completed} ({failed} failed), at most {max_mb:,.0f} MB in full, "
            "{up_mb:,.1f} MB written on average, {avg_ms} ms on average, {max_ms} ms at most"
        ).format(
            max_mb=(each.checkpoints["max_full_bytes"] or 0) / 1e6,
            up_mb=(each.checkpoints["avg_uploaded_bytes"] or 0) / 1e6,
            **each.checkpoints,
        )
    for step, seconds in list(each.stages.items())[:12]:
        yield f"  {seconds:>8,.1f} s in {step}"


def _measured(cores: Mapping[str, float]) -> dict[str, float]:
    return {name: used for name, used in cores.items() if name != OTHERS}


def _against(per_s: float, goal: Goal) -> str:
    if per_s < goal.target_per_s:
        return f"missed: {per_s / goal.target_per_s:.0%} of the target {goal.target_per_s:,}/s"
    return f"target {goal.target_per_s:,}/s reached, {per_s / goal.aim_per_s:.0%} of the aim"


def latency_figures(latency: Latency) -> dict[str, float]:
    """Return quantiles in seconds; NaN where nothing was measured."""
    quantiles = {"p50": 50, "p99": 99, "max": 100}
    kinds = {
        "enriched": latency.enriched_ms,
        "row of an open window": latency.early_ms,
        "final row": latency.final_ms,
    }
    return {
        f"{kind}, {name}": float(np.percentile(ms, q)) / 1000 if len(ms) else float("nan")
        for kind, ms in kinds.items()
        for name, q in quantiles.items()
    }


def _holds(value_s: float, limit_s: float) -> str:
    return "holds" if value_s < limit_s else "exceeded"  # what wasn't measured doesn't hold


def _seconds(value_s: float) -> str:
    return f"{value_s:.2f} s"


def document(results: Results, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "machine": dict(machine),
        "backlog": results.backlog,
        "catch_up": [_catch_up_json(each) for each in results.catch_ups],
        "latency": [
            {
                "job": each.kind,
                "partitions": each.partitions,
                "per_s": each.per_s,
                "events": len(each.enriched_ms),
                "windows": len(each.final_ms),
                "seconds": {
                    name: None if np.isnan(s) else round(s, 3)
                    for name, s in latency_figures(each).items()
                },
            }
            for each in results.latencies
        ],
        "failed": results.failed,
    }


def _catch_up_json(each: CatchUp) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": each.name,
        "events": each.events,
        "seconds": round(each.seconds, 1),
        "events_per_s": round(each.per_s),
        "events_per_s_with_warm_up": round(each.per_s_with_warm_up),
        "events_per_s_by_quarter": [round(rate) for rate in each.per_s_by_quarter],
        "cores": {name: round(used, 3) for name, used in each.cores.items()},
        "checkpoints": dict(each.checkpoints),
        "worker_seconds": dict(each.stages),
        "counters": dict(each.samples[-1].counts),
    }
    if goal := GOALS.get(each.name):
        shown |= {**goal._asdict(), "reached": each.per_s >= goal.target_per_s}
    return shown
