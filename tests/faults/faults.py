"""What can go wrong with a running job: each does it, and returns when all is up again."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.run import Run

AWAY_S = 20
"""Seconds that a database stays away."""


@dataclass(frozen=True)
class Fault:
    """One of them.

    Args:
      strike: Does it to a run.
      restores: Whether the job must go on from a checkpoint; otherwise it may, or wait.
    """

    strike: Callable[[Run], None]
    restores: bool = True


def kill_worker(run: Run) -> None:
    """One of the processes that run our Python."""
    os.kill(random.choice(run.workers()), signal.SIGKILL)


def kill_taskmanager(run: Run) -> None:
    run.stack.kill("flink-taskmanager")
    run.stack.up("flink-taskmanager")


def kill_jobmanager(run: Run) -> None:
    """It takes what it knew of the job with it; the job is started from its checkpoint."""
    run.stack.kill("flink-jobmanager")
    run.stack.up("flink-jobmanager", "flink-taskmanager")
    run.submit(f"--savepoint_path={run.jobs.last_checkpoint(run.job)}")


def kill_broker(run: Run) -> None:
    run.stack.kill("kafka")
    run.stack.up("kafka")


def take_postgres_away(run: Run) -> None:
    run.stack.kill("postgres")
    time.sleep(AWAY_S)
    run.stack.up("postgres")


def take_cassandra_away(run: Run) -> None:
    run.stack.kill("cassandra")
    time.sleep(AWAY_S)
    run.stack.up("cassandra")


def stop_and_resume(run: Run) -> None:
    savepoint = run.jobs.stop(run.job)
    run.submit(f"--savepoint_path={savepoint}")


FAULTS = {
    "a worker killed": Fault(kill_worker),
    "the TaskManager killed": Fault(kill_taskmanager),
    "the JobManager killed": Fault(kill_jobmanager),
    "the broker killed": Fault(kill_broker, restores=False),
    "Postgres away": Fault(take_postgres_away, restores=False),
    "Cassandra away": Fault(take_cassandra_away, restores=False),
    "stopped and resumed": Fault(stop_and_resume),
}
