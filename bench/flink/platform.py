"""The platform that is measured: its own processes, on ports of its own."""

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from beam_pipelines.flink import Cluster
from beam_pipelines.model.activity import TABLES
from bench.flink.processes import CpuClock
from stack import Settings, Stack
from stack.settings import REPOSITORY

PORT_OFFSET = 3000
"""Away from the platform of `make up`, which may hold somebody's data."""

_LOG_APPEND_TIME = {"message.timestamp.type": "LogAppendTime", "retention.ms": "-1"}


_QUIET = logging.getLogger(f"{__name__}.librdkafka")
_QUIET.addHandler(logging.NullHandler())  # brokers that were stopped are no news
_QUIET.propagate = False


class Platform:
    """Kafka, Postgres, Cassandra, Flink and the workers, for one benchmark.

    Args:
      home: Folder of data and logs; Kafka's data stay there for the next run.
      port_offset: Added to the ports of the platform.
    """

    def __init__(self, home: Path, port_offset: int = PORT_OFFSET) -> None:
        self.stack = Stack(home=home, port_offset=port_offset)
        self.settings: Settings = self.stack.settings
        # What the stack and its workers start inherits this; workers import `bench`.
        os.environ |= {
            **self.settings.environment(),
            "STACK_HOME": str(self.settings.home),
            "STACK_PORT_OFFSET": str(port_offset),
            "PYTHONPATH": str(REPOSITORY),
        }
        self.brokers = os.environ["KAFKA_BOOTSTRAP_SERVERS"]
        self.database_url = os.environ["ACTIVITY_DATABASE_URL"]
        self.cluster = Cluster(f"http://{os.environ['FLINK_MASTER']}")
        self.lake = self.settings.home / "lake"
        self.logs = self.settings.home / "bench"

    @contextmanager
    def fresh(self, *names: str) -> Iterator[None]:
        """Run services beside Kafka for one measurement, without what was before.

        Kafka alone is left running, with its data: `close` ends it.
        """
        if names:  # without any, the stack would take all of its services
            self.stack.clean(*names)
        self.stack.up("kafka", *names)
        try:
            yield
        finally:
            if names:
                self.stack.down(*names)
            shutil.rmtree(self.lake, ignore_errors=True)

    def close(self) -> None:
        """Stop everything; the data of Kafka stay."""
        self.stack.down()

    def admin(self) -> AdminClient:
        """Return a client of the brokers."""
        return AdminClient({"bootstrap.servers": self.brokers}, logger=_QUIET)

    def make_topic(self, name: str, partitions: int) -> None:
        """Create a topic, anew where there is one."""
        self.remove_topics(name)
        topic = NewTopic(name, partitions, 1, config=_LOG_APPEND_TIME)
        admin = self.admin()  # held: its futures end with it
        for future in admin.create_topics([topic]).values():
            future.result(timeout=30)

    def remove_topics(self, *names: str) -> None:
        """Delete topics, where they are."""
        admin = self.admin()
        for future in admin.delete_topics(list(names)).values():
            try:
                future.result(timeout=30)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise

    def records(self, topic: str) -> int:
        """Return how many records a topic holds; 0 where there is none."""
        admin = self.admin()
        known = admin.list_topics(timeout=30).topics.get(topic)
        if known is None:
            return 0
        parts = [TopicPartition(topic, number) for number in known.partitions]
        total = 0
        for spec, sign in ((OffsetSpec.latest(), 1), (OffsetSpec.earliest(), -1)):
            answers = admin.list_offsets(dict.fromkeys(parts, spec))
            total += sign * sum(answer.result(timeout=30).offset for answer in answers.values())
        return total

    def empty_tables(self) -> None:
        """Remove the rows of the tables in Postgres."""
        with psycopg.connect(self.database_url) as connection:
            for table in TABLES:
                connection.execute(f"TRUNCATE {table.name}")

    def cpu(self, more: Mapping[str, int]) -> CpuClock:
        """Return a clock of what the services use, and more processes by name."""
        return CpuClock({**self.leaders(), **more})

    def leaders(self) -> dict[str, int]:
        """Return the process ids of the services that run."""
        return {each.name: each.pid for each in self.stack.services() if each.pid}

    @contextmanager
    def started(self, name: str, command: Sequence[str]) -> Iterator[subprocess.Popen]:
        """Run a command in the repository, its output in a log; it ends with the block."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("w") as log:
            child = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield child
        finally:
            with suppress(ProcessLookupError):  # what it started, as a job server, too
                os.killpg(child.pid, signal.SIGTERM)
            child.wait(30)

    def log(self, name: str) -> Path:
        """Return where a command's output goes."""
        return self.logs / f"{name}.log"

    def tail(self, name: str) -> str:
        """Return the end of a command's output."""
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-15:])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Let a command line say where a platform is."""
    add = parser.add_argument
    add("--home", type=Path, default=os.environ.get("STACK_HOME") or REPOSITORY / ".stack/bench",
        help="folder of the platform (STACK_HOME, or .stack/bench)")  # fmt: skip
    add("--port_offset", type=int, default=int(os.environ.get("STACK_PORT_OFFSET") or PORT_OFFSET),
        help=f"of its ports (STACK_PORT_OFFSET, or {PORT_OFFSET})")  # fmt: skip


def python(*arguments: str) -> list[str]:
    """Return the command that runs this Python."""
    return [sys.executable, *arguments]
