"""The same work done by others, from the same topic."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from bench.flink.job import START_S, Job
from bench.flink.platform import Platform, python
from bench.flink.watch import READ, CatchUp, flink_sql_read, is_offset, watch
from bench.peers import flink_sql as flink_sql_peer
from bench.peers import spark as spark_peer

FLINK_SQL, SPARK = "Flink SQL", "Spark Structured Streaming"


def flink_sql(
    platform: Platform, topic: str, events: int, limit_s: float, say: Callable[[str], None]
) -> CatchUp:
    """Let Flink SQL catch up, on a cluster like ours; done when its source has read all.

    Here and below, what was read `limit_s` seconds after the warm-up is the result, if that is
    sooner.
    """
    say(f"{FLINK_SQL}: {events:,} events of {topic}")
    with (
        platform.fresh("flink"),
        platform.started(
            "flink_sql", python("-m", "bench.peers.flink_sql", f"--topic={topic}")
        ) as client,
    ):
        if client.wait(START_S):
            raise RuntimeError(f"the job was not submitted:\n{platform.tail('flink_sql')}")
        running = Job(platform, _job_id(platform, flink_sql_peer.JOB_NAME))
        try:
            begun, samples, cores = watch(
                lambda: flink_sql_read(platform.cluster.metrics(running.job_id, is_offset)),
                lambda counts: counts[READ] == events,
                running.check,
                platform.cpu({}),
                say,
                limit_s,
            )
            return CatchUp(FLINK_SQL, begun, samples, cores, running.checkpoints(), {})
        finally:
            running.cancel()


def spark(
    platform: Platform, topic: str, events: int, limit_s: float, say: Callable[[str], None]
) -> CatchUp:
    """Let Spark catch up; done when the slowest of its queries is."""
    say(f"{SPARK}: {events:,} events of {topic}")
    progress = platform.logs / "spark-progress.json"
    progress.unlink(missing_ok=True)
    checkpoints = platform.settings.home / "spark"
    command = python("-m", "bench.peers.spark", f"--topic={topic}", f"--folder={checkpoints}")
    with platform.fresh(), platform.started("spark", [*command, f"--progress={progress}"]) as run:

        def check() -> None:
            if run.poll() is not None:
                raise RuntimeError(f"Spark ended:\n{platform.tail('spark')}")

        clock = platform.cpu({"spark": run.pid})
        begun, samples, cores = watch(
            lambda: _spark_read(progress),
            lambda counts: counts[READ] == events,
            check,
            clock,
            say,
            limit_s,
        )
        return CatchUp(SPARK, begun, samples, cores, {}, {})


def _spark_read(progress: Path) -> dict[str, int]:
    """Return how far the slowest query is; OSError: not begun."""
    read = json.loads(progress.read_text())
    return {READ: min(read[name] for name in spark_peer.QUERIES)}


def _job_id(platform: Platform, name: str) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (job_id := platform.cluster.job_named(name)) is not None:
            return job_id
        time.sleep(0.2)
    raise RuntimeError(f"the job never reached the cluster:\n{platform.tail('flink_sql')}")
