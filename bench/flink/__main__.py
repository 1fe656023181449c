"""Measure the activity pipeline on Flink: `python -m bench.flink`, or `make bench-flink`.

Starts a platform of its own, fills a topic, lets the pipeline and its peers catch up with
it, and measures latency at a steady rate. Prints a report and writes it as JSON. Takes
about an hour; the topic stays for the next time. Broker and databases share the cores with
what is measured, as does whatever else runs on the machine: the report says how much that
is. The first half minute of each job's work, in which virtual machines compile, is no part
of its speed; the report has the speed with it, too. Exit code 1: a part failed. Missing a
target is reported, and no failure.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.command import positive, say, this_machine
from bench.flink import job, latency, peers, report
from bench.flink.backlog import Backlog
from bench.flink.platform import Platform, add_flags

PARTS = ("core", "flink_sql", "spark", "whole", "latency", "latency_whole")
RESULTS = Path("bench/results/flink-latest.json")
PARTITIONS = (4, 32)  # of the topics that latency is measured over


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the flags ask for; returns the exit code."""
    flags = _flags(argv)
    backlog = Backlog(flags.events, flags.fill_per_s, flags.partitions)
    platform = Platform(flags.home, flags.port_offset)
    results = report.Results()
    try:
        with platform.fresh():  # Kafka alone
            if not set(flags.parts) <= {"latency", "latency_whole"}:
                backlog.fill(platform, say)
                results.backlog = backlog.described(platform)
        for name, part in _parts(flags, platform, backlog, results).items():
            try:
                part()
            except Exception as error:  # the others are worth their time
                traceback.print_exc()
                results.failed[name] = str(error).splitlines()[0]
    finally:
        platform.close()
    machine = this_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores; {machine['system']}")
    print("\n".join(report.shown(results)))
    document = report.document(results, machine)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    say(f"written to {flags.output}")
    return 1 if results.failed else 0


def _parts(
    flags: argparse.Namespace, platform: Platform, backlog: Backlog, results: report.Results
) -> dict[str, Callable[[], None]]:
    def ours(kind: str) -> Callable[[], None]:
        return lambda: results.catch_ups.append(
            job.catch_up(platform, kind, backlog.topic, backlog.events, say)
        )

    def peer(measure: Callable) -> Callable[[], None]:
        return lambda: results.catch_ups.append(
            measure(platform, backlog.topic, backlog.events, flags.peer_limit_s, say)
        )

    def latency_of(kind: str) -> dict[str, Callable[[], None]]:
        def over(partitions: int) -> Callable[[], None]:
            rate, duration_s = flags.offered_per_s, flags.latency_s
            return lambda: results.latencies.append(
                latency.measure(platform, kind, partitions, rate, duration_s, say)
            )

        return {f"latency of the {kind} over {p} partitions": over(p) for p in PARTITIONS}

    parts = {
        "core": {"core": ours(job.CORE)},
        "flink_sql": {"flink_sql": peer(peers.flink_sql)},
        "spark": {"spark": peer(peers.spark)},
        "whole": {"whole": ours(job.WHOLE)},
        # On one machine Cassandra takes the cores that the others are measured on.
        "latency": latency_of(job.WITHOUT_CASSANDRA),
        "latency_whole": latency_of(job.WHOLE),
    }
    chosen: dict[str, Callable[[], None]] = {}
    for name, part in parts.items():
        if name in flags.parts:
            chosen |= part
    return chosen


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.flink", description=summary)
    add = parser.add_argument
    add("--events", type=positive, default=30_000_000, help="of the backlog (30 M)")
    add("--fill_per_s", type=positive, default=50_000,
        help="rate at which the backlog is appended (50000: 30 M span ten minutes)")  # fmt: skip
    add("--partitions", type=positive, default=4, help="of the backlog (4)")
    add("--peer_limit_s", type=positive, default=900,
        help="seconds after the warm-up after which a peer's speed is taken (900)")  # fmt: skip
    add("--offered_per_s", type=positive, default=20_000,
        help="rate at which latency is measured (20000)")  # fmt: skip
    add("--latency_s", type=positive, default=360,
        help="seconds of it; a final row needs four minutes (360)")  # fmt: skip
    add("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    add_flags(parser)
    add("--output", type=Path, default=RESULTS, help=f"JSON file ({RESULTS})")
    flags = parser.parse_args(argv)
    flags.parts = flags.only.split(",")
    if unknown := sorted(set(flags.parts) - set(PARTS)):
        parser.error(f"--only names no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
