"""Runs of the activity pipeline as its users start it, and topics for them."""

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from scripts.producer import Traffic
from tests.faults.run import Run

REPOSITORY = Path(__file__).parents[2]
PARTITIONS = 4

_DRIVER_S = 420
TOLD_WITHIN_S = 60
"""Seconds until a person must know that something can't work."""

_ANSWER_S = 60
_numbers = itertools.count()


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code, its words, and how long it took."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """Return what a run on a cluster prints at its end."""
        return json.loads(self.stdout[self.stdout.index("{") :])

    @property
    def told(self) -> str:
        """Return what a person reads: stderr without the log, whose lines are JSON."""
        lines = self.stderr.splitlines()
        return "\n".join(line for line in lines if not line.startswith("{"))


def activity(where: Mapping[str, str], *flags: str) -> Ended:
    """Run the pipeline's command to its end.

    Args:
      where: Variables by which it finds the platform.
      flags: Its command line.
    """
    started = time.monotonic()
    ended = subprocess.run(
        _command(flags), **_surroundings(where), capture_output=True, timeout=_DRIVER_S
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr, time.monotonic() - started)


def first_failure(run: Run, *flags: str) -> str:
    """Start the pipeline's command on Flink, without end, where it can't work.

    Returns:
      The line that says why, which must come within TOLD_WITHIN_S. The job is cancelled.
    """
    driver = subprocess.Popen(
        _command((*on_flink(run), *flags)),
        **_surroundings(run.where),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    stop = functools.partial(os.killpg, driver.pid, signal.SIGKILL)  # with its job server
    too_late = threading.Timer(TOLD_WITHIN_S, stop)
    too_late.start()
    said = []
    try:
        for line in driver.stderr:
            said.append(line)
            if line.startswith("the job failed"):
                return line
        raise AssertionError(f"nothing was told in {TOLD_WITHIN_S} s: {said[-20:]}")
    finally:
        too_late.cancel()
        with contextlib.suppress(ProcessLookupError):
            stop()
        driver.wait()
        driver.stderr.close()
        run.close()


def _command(flags: Iterable[str]) -> list[str]:
    return [sys.executable, "-m", "beam_pipelines.activity", *flags]


def _surroundings(where: Mapping[str, str]) -> dict[str, Any]:
    environment = {name: v for name, v in os.environ.items() if name not in _OF_A_PLATFORM}
    return {
        "env": {**environment, **where},
        "cwd": REPOSITORY,
        "stdin": subprocess.DEVNULL,
        "text": True,
    }


def on_flink(run: Run) -> list[str]:
    """Return the flags of a run that writes to all the ends of a platform."""
    return [
        f"--database=file:{run.folder}/database-url",
        f"--cassandra={run.ends.cassandra}",
        f"--lake={run.ends.lake}",
        f"--enriched=kafka:{run.ends.enriched}",
        f"--dead_letters=kafka:{run.ends.dead_letters}",
        *("--runner=FlinkRunner", "--parallelism=2"),
    ]


_OF_A_PLATFORM = (
    "KAFKA_BOOTSTRAP_SERVERS ACTIVITY_DATABASE_URL FLINK_MASTER BEAM_WORKER_POOL".split()
)


class Topics:
    """Makes, fills and trims topics."""

    def __init__(self, servers: str) -> None:
        self.servers = servers
        self.admin = AdminClient({"bootstrap.servers": servers})

    def make(self, name: str | None = None, partitions: int = PARTITIONS, **config: str) -> str:
        """Make a topic, and return its name once the brokers know it."""
        name = name or f"topic-{next(_numbers)}"
        config = {"message.timestamp.type": "LogAppendTime"} | config
        self.admin.create_topics([NewTopic(name, partitions, 1, config=config)])[name].result(
            _ANSWER_S
        )
        while name not in self.admin.list_topics(timeout=_ANSWER_S).topics:
            time.sleep(0.05)
        return name

    def remove(self, name: str) -> None:
        """Delete a topic, and return once it is gone."""
        self.admin.delete_topics([name])[name].result(_ANSWER_S)
        while name in self.admin.list_topics(timeout=_ANSWER_S).topics:
            time.sleep(0.05)

    def trim(self, name: str, partition: int, before: int) -> None:
        """Delete the records of a partition before an offset, as retention does."""
        deleted = self.admin.delete_records([TopicPartition(name, partition, before)])
        for each in deleted.values():
            each.result(_ANSWER_S)

    def send(self, name: str, records: Iterable[tuple[str | None, bytes | None]]) -> int:
        """Send records of a key and a value; returns how many were stored."""
        failures: list[Any] = []
        stored = 0

        def delivered(error: Any, _: Any) -> None:
            nonlocal stored
            stored += error is None
            if error is not None:
                failures.append(error)

        settings = {"acks": "all", "message.max.bytes": 10_000_000}  # the topic decides
        producer = Producer({"bootstrap.servers": self.servers, **settings})
        for key, value in records:
            producer.produce(name, value=value, key=key, on_delivery=delivered)
            producer.poll(0)
        assert producer.flush(_ANSWER_S) == 0
        assert failures == []
        return stored


def trouble(now_us: int, seed: int) -> list[tuple[str | None, bytes | None]]:
    """Return records of every kind, of the minutes around a time.

    By the default rules they are on time, late and too late when they are stored now, and
    some lie in the future; some come twice, some can't be read, some have no id.
    """
    spread_s, ahead_s = 400, 100
    traffic = Traffic(
        start_us=now_us - (spread_s - ahead_s) * 1_000_000,
        rate=10_000 / spread_s,
        users=200,
        seed=seed,
        resends=0.1,
        late=0.05,
        bad=0.02,
    )
    block = traffic.block(0)
    by_hand = [event(now_us, user=f"by-hand-{i}", url="/no-id") for i in range(5)]
    return [
        *zip(block.keys, block.values, strict=True),
        *[("by-hand", each) for each in (*by_hand, *by_hand[:2])],
        ("by-hand", event(now_us, user="ends", kind="session_end")),
        *far_future(now_us),
        (None, None),
        (None, b""),
    ]


def far_future(now_us: int) -> list[tuple[str, bytes]]:
    """Return records that happen long after a time: in seven minutes, in the year 3000."""
    times = (now_us + 420 * 1_000_000, 32_503_680_000_000_000)
    return [("future", event(us, user="future", event_id=f"future-{us}")) for us in times]


def event(
    us: int, user: str = "ann", url: str = "/a", kind: str = "page_view", **more: Any
) -> bytes:
    """Return an event at a time in µs since 1970, as JSON; times are in ms."""
    known = {"event_time": us // 1000, "user_id": user, "page_url": url, "event_type": kind}
    return json.dumps(known | more).encode()
