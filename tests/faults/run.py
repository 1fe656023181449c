"""A run of the activity pipeline on a platform: its own topics, tables, folder and job."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg.sql import SQL, Identifier

from scripts.job import ENDED, Jobs
from stack import Stack
from stack.cassandra import SCHEMA as CASSANDRA_SCHEMA
from stack.cassandra import statements
from stack.postgres import SCHEMA as POSTGRES_SCHEMA
from tests.faults.ends import Ends, cassandra_session
from tests.oracle.oracle import Oracle, Rules
from tests.oracle.topic import consumed, dump

REPOSITORY = Path(__file__).parents[2]

RULES = Rules(
    as_of_us=0,
    out_of_orderness_s=3,
    allowed_lateness_s=3,
    window_s=5,
    users_window_s=25,
    users_period_s=5,
    session_gap_s=15,
)
"""Short times, so that windows and sessions come to their end while a test waits."""

SETTLED_S = 420
"""Seconds after the last event in which all must be in its place. The last session takes
the longest, up to 200: it is folded a slack of a minute, and up to two more, after its gap."""

_PARTITIONS = 4
_DRIVER_S = 420
_POLL_S = 0.5

T = TypeVar("T")


class Run:
    """A job and what belongs to it.

    Args:
      stack: The platform; all of it is up.
      name: Of this run: letters, digits and underscores.
      folder: For its files and its lake.
      events_per_s: What its producer sends.
    """

    def __init__(self, stack: Stack, name: str, folder: Path, events_per_s: int = 500) -> None:
        self.stack = stack
        self.name = name
        self.folder = folder
        self.events_per_s = events_per_s
        self.where = stack.settings.environment()
        self.jobs = Jobs(f"http://{self.where['FLINK_MASTER']}")
        self.job = ""
        self._of_others: set[int] = set()
        self.topic = f"activity-{name}"
        self._url_file = folder / "database-url"
        keyspace = f"activity_{name}"
        self.ends = Ends(
            self.where["KAFKA_BOOTSTRAP_SERVERS"],
            f"{self.where['ACTIVITY_DATABASE_URL'].rpartition('/')[0]}/activity_{name}",
            f"{self.where['CASSANDRA'].partition('/')[0]}/{keyspace}",
            folder / "lake",
            f"{self.topic}-enriched",
            f"{self.topic}-dlq",
        )

    def prepare(self) -> None:
        """Make topics and tables."""
        admin = AdminClient({"bootstrap.servers": self.ends.bootstrap_servers})
        topics = (self.topic, self.ends.enriched, self.ends.dead_letters)
        config = {"message.timestamp.type": "LogAppendTime"}
        created = admin.create_topics([NewTopic(t, _PARTITIONS, 1, config=config) for t in topics])
        for topic in created.values():
            topic.result(60)
        with self.stack.service("postgres")._superuser() as connection:
            database = Identifier(f"activity_{self.name}")
            owner = Identifier(self.stack.settings.of("postgres")["user"])
            connection.execute(SQL("CREATE DATABASE {} OWNER {}").format(database, owner))
        with psycopg.connect(self.ends.database) as connection:
            connection.execute(POSTGRES_SCHEMA.read_text())
        self._url_file.write_text(self.ends.database)
        keyspace = self.ends.cassandra.partition("/")[2]
        cql = CASSANDRA_SCHEMA.read_text().replace(" activity.", f" {keyspace}.")
        cql = cql.replace(" activity\n", f" {keyspace}\n")
        with cassandra_session(self.ends.cassandra.partition("/")[0]) as session:
            for statement in statements(cql):
                session.execute(statement)

    def submit(self, *more: str) -> None:
        """Start the job; it has its first checkpoint when this returns."""
        self._of_others = set(self._pool())
        driver = subprocess.run(
            [
                *(sys.executable, "-m", "beam_pipelines.activity", f"--input=kafka:{self.topic}"),
                f"--database=file:{self._url_file}",
                *(f"--cassandra={self.ends.cassandra}", "--cassandra_every_s=2"),
                f"--lake={self.ends.lake}",
                f"--enriched=kafka:{self.ends.enriched}",
                f"--dead_letters=kafka:{self.ends.dead_letters}",
                *(f"--{name}={value}" for name, value in vars(RULES).items() if name in _FLAGS),
                *("--runner=FlinkRunner", "--parallelism=2", "--checkpointing_interval=5000"),
                # A bundle has its price, whatever is in it: fewer leave room on two cores.
                "--max_bundle_time_mills=1000",
                *more,
            ],
            env={**os.environ, **self.where},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DRIVER_S,
        )
        assert driver.returncode == 0, driver.stderr[-4000:]
        self.job = self.jobs.one(None)

    @contextlib.contextmanager
    def producing(self) -> Iterator[None]:
        """Send events of every kind meanwhile: late, too late, sent twice, beyond reading."""
        # Other seeds: ids of one would be those of the other.
        kinds = (
            (self.events_per_s, "--seed=7", "--users=500", "--resends=0.1", "--late_s=4.5"),
            (self.events_per_s // 20, "--seed=8", "--users=50", "--late=0.5", "--late_s=30"),
        )
        producers = [
            subprocess.Popen(
                [
                    *(sys.executable, str(REPOSITORY / "scripts/producer.py")),
                    *(f"--kafka_bootstrap_servers={self.ends.bootstrap_servers}",),
                    *(f"--topic={self.topic}", f"--rate={rate}", *more),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rate, *more in kinds
        ]
        try:
            yield
        finally:
            for producer in producers:
                producer.send_signal(signal.SIGTERM)
            ended = [producer.wait(120) for producer in producers]
        assert ended == [0, 0]

    def workers(self) -> list[int]:
        """Return the ids of the processes that run the job's Python.

        The pool may keep those of a job that was cancelled for a while.
        """
        return [pid for pid in self._pool() if pid not in self._of_others]

    def _pool(self) -> list[int]:
        pool = self.stack.service("workers").process
        return [pid for pid in pool.members if pid != pool.pid]

    def checkpoints(self) -> dict[str, Any]:
        return self.jobs.checkpoints(self.job)

    def await_checkpoints(self, count: int) -> dict[str, Any]:
        """Wait until so many more were completed; returns the last one."""
        enough = self.eventually(lambda: self.checkpoints()["counts"]["completed"]) + count

        def last() -> dict[str, Any] | None:
            now = self.checkpoints()
            return now["latest"]["completed"] if now["counts"]["completed"] >= enough else None

        return self.eventually(last)

    def await_restored(self, since: float) -> None:
        """Wait until the job has gone on from a checkpoint or savepoint since a moment.

        Args:
          since: Seconds since 1970.
        """

        def restored() -> bool:
            latest = self.checkpoints()["latest"]["restored"]
            return latest is not None and latest["restore_timestamp"] > since * 1000

        self.eventually(restored)

    def published(self) -> dict[str, list[int]]:
        """Return when each accepted event was published: its id, and times in ms since 1970."""
        times: dict[str, list[int]] = {}
        for message in consumed(self.ends.bootstrap_servers, self.ends.enriched):
            event = json.loads(message.value())
            at = datetime.fromisoformat(event["processing_time"])
            times.setdefault(event["event_id"], []).append(int(at.timestamp() * 1000))
        return times

    def eventually(self, look: Callable[[], T | None], patience_s: float = 180) -> T:
        """Look until there is something to be seen; a server that doesn't answer may yet."""
        deadline = time.monotonic() + patience_s
        while True:
            with contextlib.suppress(OSError):
                if found := look():
                    return found
            assert time.monotonic() < deadline, f"nothing within {patience_s} s: {self.failures()}"
            time.sleep(_POLL_S)

    def truth(self) -> Oracle:
        """Return what must come of the records that are in the topic now."""
        raw = self.folder / "raw.parquet"
        dump(self.ends.bootstrap_servers, self.topic, raw)
        return Oracle(raw, "ndjson", RULES)

    def settled_differences(self, truth: Oracle) -> list[str]:
        """Wait until the ends equal the truth, at most until they must; returns what differs."""
        deadline = time.monotonic() + SETTLED_S
        while (different := self.ends.differences(truth)) and time.monotonic() < deadline:
            time.sleep(5)
        return different

    def failures(self) -> list[str]:
        """Return the job's state and why it was restarted, for messages."""
        with contextlib.suppress(OSError):
            state = self.jobs.cluster.get(f"/jobs/{self.job}")["state"]
            history = self.jobs.cluster.get(f"/jobs/{self.job}/exceptions")["exceptionHistory"]
            return [state, *(each["stacktrace"][-2000:] for each in history["entries"][:3])]
        return ["the JobManager does not answer"]

    def close(self) -> None:
        """Cancel what runs on the cluster."""

        def running() -> list[str]:
            return [job["jid"] for job in self.jobs.all() if job["state"] not in ENDED]

        with contextlib.suppress(OSError):
            for job in running():
                self.jobs.cancel(job)
            self.eventually(lambda: not running())


_FLAGS = (
    "out_of_orderness_s allowed_lateness_s window_s users_window_s users_period_s session_gap_s"
).split()
