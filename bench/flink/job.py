"""The activity job on Flink, as the command starts it."""

import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from beam_pipelines.activity import broken_laws
from beam_pipelines.flink import failure
from bench.flink.platform import Platform, python
from bench.flink.watch import READ, CatchUp, beam_steps, checkpoint_figures, is_step, watch

CORE, WHOLE, WITHOUT_CASSANDRA = "core", "whole job", "job without Cassandra"

SERVICES = {
    # The command makes sure that the tables are there, even where it doesn't write to them.
    CORE: ("postgres", "flink", "workers"),
    WHOLE: ("postgres", "cassandra", "flink", "workers"),
    WITHOUT_CASSANDRA: ("postgres", "flink", "workers"),
}

START_S = 300.0
"""Seconds until a job is on the cluster, and until its first checkpoint."""


class Job:
    """A job on the cluster.

    Args:
      platform: Where it runs.
      job_id: Flink's id of it.
    """

    def __init__(self, platform: Platform, job_id: str) -> None:
        self.platform = platform
        self.job_id = job_id

    def check(self) -> None:
        """Make sure that it runs, and never had to be restarted.

        Raises:
          RuntimeError: it doesn't, or had: its counters began anew.
        """
        cluster = self.platform.cluster
        state = cluster.get(f"/jobs/{self.job_id}")["state"]
        (restarts,) = cluster.get(f"/jobs/{self.job_id}/metrics?get=numRestarts") or ({},)
        if state in ("FAILED", "CANCELED") or restarts.get("value", "0") != "0":
            raise RuntimeError(f"the job failed: {failure(cluster, self.job_id)}")

    def counters(self) -> dict[str, int]:
        """Return its counters so far."""
        return self.platform.cluster.counters(self.job_id)

    def steps(self) -> dict[str, float]:
        """Return the seconds of its steps so far."""
        return beam_steps(self.platform.cluster.metrics(self.job_id, is_step))

    def checkpoints(self) -> dict[str, Any]:
        """Return the figures of its checkpoints so far."""
        return checkpoint_figures(self.platform.cluster.get(f"/jobs/{self.job_id}/checkpoints"))

    def await_checkpoint(self) -> None:
        """Wait for the first one.

        Raises:
          RuntimeError: the job failed.
          TimeoutError: it didn't come.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(OSError):  # so it answers while it sets the job up
                self.check()
                if self.checkpoints()["completed"]:
                    return
            time.sleep(1)
        raise TimeoutError(f"no checkpoint within {START_S:.0f} s")

    def cancel(self) -> None:
        """End it."""
        url = f"{self.platform.cluster.url}/jobs/{self.job_id}?mode=cancel"
        with suppress(OSError):  # it may have ended by itself
            urllib.request.urlopen(urllib.request.Request(url, method="PATCH"), timeout=30).close()


@contextmanager
def started(platform: Platform, kind: str, topic: str) -> Iterator[tuple[Job, int]]:
    """Start the job with default flags, and cancel it at the end of the block.

    Yields:
      The job, as soon as the cluster has it, and the process id of its driver.

    Raises:
      RuntimeError: it never got there.
    """
    enriched, rejected = sinks_of(topic)
    partitions = len(platform.admin().list_topics(topic, timeout=30).topics[topic].partitions)
    for name in (enriched, rejected):
        platform.make_topic(name, partitions)
    name = f"bench-{kind.split()[0]}-{time.time_ns() // 1_000_000}"
    command = python(
        "-m",
        "bench.flink.core" if kind == CORE else "beam_pipelines.activity",
        f"--input=kafka:{topic}",
        "--database=env:ACTIVITY_DATABASE_URL",
        f"--enriched=kafka:{enriched}",
        f"--dead_letters=kafka:{rejected}",
        f"--lake={platform.lake / name}",
        *([f"--cassandra={platform.settings.environment()['CASSANDRA']}"] if kind == WHOLE else []),
        f"--job_name={name}",
        "--runner=FlinkRunner",
    )
    with platform.started(name, command) as driver:
        job = Job(platform, _found(platform, name, driver.poll))
        try:
            yield job, driver.pid
        finally:
            job.cancel()
    platform.remove_topics(enriched, rejected)


def sinks_of(topic: str) -> tuple[str, str]:
    """Return the topics that a job over this one writes to: enriched, dead letters."""
    return f"{topic}-enriched", f"{topic}-rejected"


def _found(platform: Platform, name: str, ended: Callable[[], int | None]) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and ended() is None:
        if (job_id := platform.cluster.job_named(name)) is not None:
            return job_id
        time.sleep(0.2)
    raise RuntimeError(f"the job never reached the cluster:\n{platform.tail(name)}")


def catch_up(
    platform: Platform, kind: str, topic: str, events: int, say: Callable[[str], None]
) -> CatchUp:
    """Let the job work off a topic.

    It is done when every record is read, and has passed every stage: the laws that the
    counters of a finished run keep hold then.
    """

    def done(counts: Any) -> bool:
        stored = counts.get("rows_written.events_by_user", 0)
        return (
            counts[READ] == events
            and not broken_laws(counts)
            and (kind == CORE or stored == counts["accepted"])
        )

    say(f"{kind}: {events:,} events of {topic}")
    with platform.fresh(*SERVICES[kind]), started(platform, kind, topic) as (job, driver):
        clock = platform.cpu({"driver": driver})
        begun, samples, cores = watch(job.counters, done, job.check, clock, say)
        return CatchUp(kind, begun, samples, cores, job.checkpoints(), job.steps())
