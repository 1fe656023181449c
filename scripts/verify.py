"""Check a platform and the job that runs on it.

Looks at every service, topic, table and folder, then sends a marked event and sees it arrive
in each sink. A line each, and beside a failure what to do about it. Exit status: 0 all passed;
1 something failed; 2 misuse.
"""

import argparse
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import confluent_kafka
import pyarrow.dataset as ds
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from beam_pipelines.by_key import EVENTS_BY_USER, PAGE_VIEWS_BY_PAGE
from beam_pipelines.flink import Cluster, failure
from beam_pipelines.io.cassandra.cluster import (
    CassandraCluster,
    Connection,
    check_cassandra,
    parse_cluster,
    shared_connection,
)
from beam_pipelines.io.kafka.client import KafkaCluster, creates, topic_partitions
from beam_pipelines.io.lake import lake_files, open_lake
from beam_pipelines.io.postgres import check_postgres, open_postgres
from beam_pipelines.io.publication import on_object_store
from beam_pipelines.model.activity import PAGE_VIEW, SESSION_END, TABLES
from beam_pipelines.model.secret import MissingSecret, Secret
from beam_pipelines.model.time_rule import SLACK_S, TimeRule
from beam_pipelines.model.watermark import CLOCK_SKEW_US
from beam_pipelines.terminal import printable, run_command, say

POLL_S = 0.5
"""Seconds between two looks at a sink."""

SESSION_PATIENCE_S = 90
"""Seconds after it is due that a session may take: watermarks move when batches do."""

CHECKPOINT_AGE_S = 60
"""Seconds after which the last checkpoint is an old one: there is one every ten."""

_SERVICES = "start it: make up (without Docker) or docker compose up --wait (with it)"
_JOB = (
    "where a service is down, start it, and the job goes on by itself; where none runs, start "
    "it: make activity"
)
_LOGS = "look at the job's exceptions on the Flink dashboard, and at the log of the workers"


@dataclass(frozen=True)
class Places:
    """What is checked; None: it isn't used."""

    kafka: KafkaCluster
    input: str
    enriched: str
    dead_letters: str
    database: Secret
    cassandra: CassandraCluster | None
    flink: Cluster
    pool: str | None
    lake: str


class Check(NamedTuple):
    """Something to look at.

    `look` returns what it found, or None where that isn't there yet; it raises where
    something is wrong. `remedy` is what to do then. `needs` names a check without which this
    one is left out.
    """

    name: str
    look: Callable[[], str | None]
    remedy: str
    needs: str = ""


class WrongState(Exception):  # noqa: N818 - it is what was found, not a fault of this program
    """Something answers, but isn't as it should be.

    Args:
      found: What it is like.
      remedy: What to do about just that; None: what the check says.
    """

    def __init__(self, found: str, remedy: str | None = None) -> None:
        super().__init__(found)
        self.remedy = remedy


@dataclass
class Report:
    """Prints lines, and remembers whether something failed."""

    say: Callable[[str], None] = lambda line: print(line, flush=True)
    failed: list[str] = field(default_factory=list)

    def passed(self, name: str, found: str) -> None:
        """Print that a check passed."""
        self.say(printable(f"pass  {name}: {found}"))

    def fail(self, name: str, found: str, remedy: str) -> None:
        """Print that a check failed."""
        self.failed.append(name)
        self.say(printable(f"FAIL  {name}: {found}") + printable(f"\n      → {remedy}", keep="\n"))

    def run(self, check: Check) -> bool:
        """Look once; returns whether it passed."""
        if check.needs in self.failed:
            self.say(f"skip  {check.name}: needs {check.needs}")
            return False
        try:
            found = check.look()
        except Exception as error:  # of whichever client library
            remedy = getattr(error, "remedy", None) or check.remedy
            self.fail(check.name, _first_line(error), remedy)
            return False
        self.passed(check.name, found or "is there")
        return True

    def run_until(
        self,
        checks: Sequence[Check],
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Look again and again until each check passed, or patience ends."""
        began = clock()
        pending = {check: "nothing arrived" for check in checks}
        while pending:
            for check in list(pending):
                try:
                    found = check.look()
                except Exception as error:  # it may pass: a file was replaced meanwhile, say
                    pending[check] = _first_line(error)
                    continue
                if found is not None:
                    self.passed(check.name, f"{found}, after {clock() - began:.1f} s")
                    del pending[check]
            if clock() - began > patience_s:
                break
            if pending:
                sleep(POLL_S)
        for check, found in pending.items():
            self.fail(check.name, f"{found} within {patience_s:.0f} s", check.remedy)


# ── what is there ───────────────────────────────────────────────────────────


def platform_checks(places: Places) -> list[Check]:
    """Return the checks of services, topics, tables and folders."""
    kafka, database = places.kafka, places.database
    checks = [Check("Kafka", lambda: brokers(kafka), _SERVICES)]
    checks += [
        Check(
            f"topic {name}",
            lambda name=name: topic_state(kafka, name, broker_time=name == places.input),
            f"create it: {creates(name, kafka.bootstrap_servers)}",
            needs="Kafka",
        )
        for name in (places.input, places.enriched, places.dead_letters)
    ]
    checks.append(Check("Postgres", lambda: check_postgres(database, ()), _SERVICES))
    checks += [
        Check(
            f"table {table.name}",
            lambda table=table: check_postgres(database, (table,)),
            'create it: psql "$ACTIVITY_DATABASE_URL" -f init-db.sql',
            needs="Postgres",
        )
        for table in TABLES
    ]
    if cassandra := places.cassandra:
        checks.append(Check("Cassandra", lambda: check_cassandra(cassandra, ()), _SERVICES))
        checks += [
            Check(
                f"table {cassandra.keyspace}.{table.name}",
                lambda table=table: check_cassandra(cassandra, (table,)),
                "create it: cqlsh HOST PORT -f sql/cassandra.cql",
                needs="Cassandra",
            )
            for table in (EVENTS_BY_USER, PAGE_VIEWS_BY_PAGE)
        ]
    checks.append(Check("Flink", lambda: slots(places.flink.overview()), _SERVICES))
    if pool := places.pool:
        checks.append(Check("worker pool", lambda: connected(pool), _SERVICES))
    checks.append(
        Check(
            "lake",
            lambda: lake_state(places.lake),
            "the workers need to write there, and this program to read: --lake",
        )
    )
    return checks


def job_checks(flink: Cluster) -> list[Check]:
    """Return the checks of the job."""
    return [
        Check("job", lambda: job_state(flink), _JOB, needs="Flink"),
        Check(
            "checkpoints",
            lambda: checkpoint_state(
                flink.get(f"/jobs/{newest_job(flink)['jid']}/checkpoints"), time.time()
            ),
            "a sink that is slow or down holds them up: see docs/runbook.md",
            needs="job",
        ),
    ]


def loss_check(flink: Cluster) -> Check:
    """Return the check that no row was dropped on its way."""
    return Check(
        "dropped rows",
        lambda: nothing_lost(flink),
        "the tables lack them, the lake has them: see docs/runbook.md",
        needs="job",
    )


def brokers(kafka: KafkaCluster) -> str:
    """Describe a cluster; raises KafkaException where none answers."""
    found = kafka.client(AdminClient).list_topics(timeout=10).brokers
    return f"{len(found)} brokers, {kafka.bootstrap_servers}"


def topic_state(kafka: KafkaCluster, name: str, broker_time: bool) -> str:
    """Describe a topic; raises WrongState where the broker's time is needed and not there."""
    topic = topic_partitions(kafka, [name])[name]
    if broker_time and topic.timestamp_type != "LogAppendTime":
        raise WrongState(
            f"its records carry {topic.timestamp_type}, so lateness can't be judged",
            f"kafka-configs.sh --bootstrap-server {kafka.bootstrap_servers} --alter "
            f"--entity-type topics --entity-name {name} --add-config "
            "message.timestamp.type=LogAppendTime; or run the job with --append_time=producer",
        )
    return f"{len(topic.partitions)} partitions, {topic.timestamp_type}"


def slots(overview: Mapping[str, Any]) -> str:
    """Describe a cluster; raises WrongState where it can't run anything."""
    if not overview["slots-total"]:
        raise WrongState("the JobManager answers, but has no TaskManager")
    return (
        f"{overview['flink-version']}, {overview['taskmanagers']} TaskManagers, "
        f"{overview['slots-total']} slots, {overview['slots-available']} free"
    )


def connected(address: str) -> str:
    """Connect to HOST:PORT; raises OSError where nobody listens."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5):
        return f"listens at {address}"


def lake_state(folder: str) -> str:
    """Describe a lake, empty ones included; raises OSError where there is none."""
    files = len(lake_files(folder))
    if not files and not on_object_store(folder) and not os.path.isdir(folder):
        return f"{folder} will be made by the first record"
    return f"{folder} has {files:,} files"


def newest_job(flink: Cluster) -> Mapping[str, Any]:
    """Return the overview of the job that started last among those that have not ended.

    Raises:
      WrongState: there is none.
    """
    jobs = [job for job in flink.get("/jobs/overview")["jobs"] if job["end-time"] < 0]
    if not jobs:
        raise WrongState("no job runs")
    newest: Mapping[str, Any] = max(jobs, key=lambda job: job["start-time"])
    return newest


def job_state(flink: Cluster) -> str:
    """Describe the job; raises WrongState where not all of it runs."""
    job = newest_job(flink)
    tasks = job["tasks"]
    if job["state"] != "RUNNING" or tasks["running"] + tasks["finished"] < tasks["total"]:
        raise WrongState(
            f"{job['name']} is {job['state']}, {tasks['running']} of {tasks['total']} tasks run; "
            f"its last failure: {failure(flink, job['jid'])}"
        )
    return f"{job['name']} runs since {timedelta(milliseconds=job['duration'] // 1000 * 1000)}"


def checkpoint_state(checkpoints: Mapping[str, Any], now_s: float) -> str:
    """Describe the last checkpoint; raises WrongState where it is missing or old."""
    counts, last = checkpoints["counts"], checkpoints["latest"]["completed"]
    failed = checkpoints["latest"]["failed"]
    cause = f"; the last failure: {failed['failure_message']}" if failed else ""
    if last is None:
        raise WrongState(f"none of {counts['total']} completed{cause}")
    age_s = now_s - last["latest_ack_timestamp"] / 1000
    found = (
        f"{counts['completed']} completed, the last one {age_s:.0f} s ago, "
        f"{last['state_size'] / 1e6:.1f} MB of state, {last['end_to_end_duration'] / 1000:.1f} s"
    )
    if age_s > CHECKPOINT_AGE_S:
        raise WrongState(f"{found}{cause}")
    return found


def nothing_lost(flink: Cluster) -> str:
    """Say that the job has dropped nothing; raises WrongState where it has."""
    job = newest_job(flink)
    if lost := flink.lost(job["jid"]):
        counts = ", ".join(f"{name} {count:,}" for name, count in sorted(lost.items()))
        raise WrongState(f"{counts} of {job['name']}, since it was started or restarted")
    return "none since the job was started or restarted"


# ── what arrives ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Mark:
    """An event that can be told from all others, the end of its session, and a bad record.

    Args:
      name: Its user, page and id.
      at: When it happened.
    """

    name: str = field(default_factory=lambda: f"verify-{uuid.uuid4().hex[:12]}")
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def page(self) -> str:
        """The page it views."""
        return f"/{self.name}"

    @property
    def bad(self) -> bytes:
        """A record that can't be used."""
        return json.dumps({"verify": self.name}).encode()

    @property
    def records(self) -> list[bytes]:
        """All of it."""
        view = self._event(self.name, PAGE_VIEW, self.at)
        end = self._event(f"{self.name}-end", SESSION_END, self.at + timedelta(milliseconds=1))
        return [view, end, self.bad]

    def _event(self, event_id: str, event_type: str, at: datetime) -> bytes:
        return json.dumps(
            {
                "event_id": event_id,
                "event_time": at.isoformat(),
                "user_id": self.name,
                "page_url": self.page,
                "event_type": event_type,
            }
        ).encode()


def session_due(at: datetime, out_of_orderness_s: int, allowed_lateness_s: int) -> datetime:
    """Return when a session that ended at a time is stored, if nothing else is sent.

    Sessions are decided a minute at a time, once no usable event of the minute can come; the
    watermark of idle topics follows the clock at a distance.
    """
    minute_end = at.replace(second=0, microsecond=0) + timedelta(minutes=1)
    wait_s = allowed_lateness_s + SLACK_S + out_of_orderness_s
    return minute_end + timedelta(seconds=wait_s, microseconds=CLOCK_SKEW_US)


def send(kafka: KafkaCluster, topic: str, mark: Mark) -> str:
    """Send a mark; raises ConnectionError where the brokers don't take it."""
    failures: list[Any] = []
    producer = kafka.client(confluent_kafka.Producer, acks="all")
    for record in mark.records:
        producer.produce(
            topic,
            record,
            key=mark.name,
            on_delivery=lambda error, _: failures.append(error) if error else None,
        )
    left = producer.flush(30)
    if failures or left:
        raise ConnectionError(failures[0].str() if failures else "no broker took it within 30 s")
    return f"sent {mark.name}"


class Tail:
    """The records that come to a topic from now on."""

    def __init__(self, kafka: KafkaCluster, topic: str) -> None:
        settings = {"group.id": "verify", "enable.auto.commit": False}
        self._consumer = kafka.client(Consumer, **settings)
        partitions = topic_partitions(kafka, [topic])[topic].partitions
        ends = [
            self._consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=20)[1]
            for number in partitions
        ]
        self._consumer.assign(
            [TopicPartition(topic, *each) for each in zip(partitions, ends, strict=True)]
        )

    def find(self, wanted: Callable[[bytes], bool]) -> str | None:
        """Return where a record is; None: it hasn't come."""
        for message in self._consumer.consume(500, 0.1):
            if message.error() is None and wanted(message.value() or b""):
                return f"offset {message.offset()} of partition {message.partition()}"
        return None

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()


@contextmanager
def arrivals(places: Places, mark: Mark) -> Iterator[list[Check]]:
    """Connect to every sink; yields the checks that a mark which is sent now arrives there."""
    enriched = Tail(places.kafka, places.enriched)
    dead_letters = Tail(places.kafka, places.dead_letters)
    try:
        checks = [
            Check(
                f"event in topic {places.enriched}",
                lambda: enriched.find(lambda value: event_id_of(value) == mark.name),
                _LOGS,
            ),
            Check(
                f"bad record in topic {places.dead_letters}",
                lambda: dead_letters.find(lambda value: value == mark.bad),
                _LOGS,
            ),
            Check("event in the lake", lambda: in_lake(places.lake, mark), _LOGS),
            Check(
                "early row in Postgres",
                lambda: asked(
                    places.database,
                    "SELECT 'views ' || views FROM page_view_counts WHERE page_url = %s "
                    "AND window_start <= %s AND window_start > %s - interval '1 day'",
                    (mark.page, mark.at, mark.at),
                ),
                _LOGS,
            ),
        ]
        if places.cassandra:
            connection = shared_connection(places.cassandra)  # open as long as it is held
            checks += [
                Check(
                    "event in Cassandra",
                    lambda: asked_cassandra(
                        connection,
                        "SELECT event_id FROM {}.events_by_user WHERE user_id = %s AND day = %s",
                        (mark.name, mark.at.date()),
                        wanted=mark.name,
                    ),
                    _LOGS,
                ),
                Check(
                    "early row in Cassandra",
                    lambda: asked_cassandra(
                        connection,
                        "SELECT views FROM {}.page_views_by_page WHERE page_url = %s AND day = %s",
                        (mark.page, mark.at.date()),
                        wanted=1,
                    ),
                    _LOGS,
                ),
            ]
        yield checks
    finally:
        enriched.close()
        dead_letters.close()


def event_id_of(value: bytes) -> Any:
    """Return the event_id of an enriched event."""
    return json.loads(value).get("event_id")


def in_lake(folder: str, mark: Mark) -> str | None:
    """Say with which verdict the lake has a mark; None: it hasn't."""
    if not lake_files(folder):
        return None
    wanted = (ds.field("event_date") == mark.at.date()) & (ds.field("event_id") == mark.name)
    rows = open_lake(folder).to_table(["verdict", "partition", "offset"], wanted).to_pylist()
    return next((f"{r['verdict']}, offset {r['offset']} of {r['partition']}" for r in rows), None)


def asked(database: Secret, sql: str, values: tuple[Any, ...]) -> str | None:
    """Return the value of the first row; None: there is no row."""
    with open_postgres(database) as connection:
        row = connection.execute(sql, values).fetchone()
    return None if row is None else str(row[0])


def asked_cassandra(
    connection: Connection, cql: str, values: tuple[Any, ...], wanted: Any
) -> str | None:
    """Return the wanted value, if the first column of a row has it; None: there is no such row."""
    keyspace = connection.cluster.keyspace
    rows = connection.session.execute(cql.format(keyspace), values)
    return next((f"{row._fields[0]} {wanted}" for row in rows if row[0] == wanted), None)


# ── the command ─────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    """Check everything; returns the exit status."""
    flags = _parser().parse_args(argv)
    try:
        places = places_of(flags)
    except (ValueError, MissingSecret) as error:
        say(error)
        return 2
    report = Report()
    checks = platform_checks(places)
    up = all([report.run(check) for check in checks])
    runs = all([report.run(check) for check in job_checks(places.flink)])
    if up and runs:
        verify_arrivals(report, places, flags)
    else:
        report.say("skip  no event was sent: something that it needs is missing")
    report.run(loss_check(places.flink))
    report.say(f"{len(report.failed)} failed" if report.failed else "all passed")
    return 1 if report.failed else 0


def verify_arrivals(report: Report, places: Places, flags: argparse.Namespace) -> None:
    """Send a marked event, and look for it in every sink."""
    mark = Mark()
    with arrivals(places, mark) as checks:
        sent = Check("event", lambda: send(places.kafka, places.input, mark), _SERVICES)
        if not report.run(sent):
            return
        report.run_until(checks, flags.patience_s)
    session = Check(
        "session in Postgres",
        lambda: asked(
            places.database,
            "SELECT ended_by || ', page views ' || page_views FROM user_sessions "
            "WHERE user_id = %s",
            (mark.name,),
        ),
        "watermarks wait for the slowest partition: see docs/runbook.md",
    )
    due = session_due(mark.at, flags.out_of_orderness_s, flags.allowed_lateness_s)
    wait_s = max(0.0, (due - datetime.now(UTC)).total_seconds())
    when = f"is due at {due:%H:%M:%S} UTC, in {wait_s:.0f} s"
    if not flags.wait:
        report.say(f"wait  {session.name}: of {mark.name}, {when}; --wait waits for it")
        return
    report.say(f"wait  {session.name}: of {mark.name}, {when}")
    report.run_until([session], wait_s + SESSION_PATIENCE_S)


def places_of(flags: argparse.Namespace) -> Places:
    """Return what the flags name.

    Raises:
      ValueError: a flag or the variable in its stead is missing, or can't be used.
      MissingSecret: there is no such secret here.
    """
    for name, variable in (
        ("kafka_bootstrap_servers", "KAFKA_BOOTSTRAP_SERVERS"),
        ("flink_master", "FLINK_MASTER"),
        ("lake", "LAKE"),
    ):
        if not getattr(flags, name):
            raise ValueError(
                f"neither --{name} nor the variable {variable} is given; of the local platform: "
                'eval "$(python -m stack env)"'
            )
    database = Secret(flags.database)
    database.resolve()
    password = Secret(flags.cassandra_password) if flags.cassandra_password else None
    url = flags.flink_master
    return Places(
        kafka=KafkaCluster(flags.kafka_bootstrap_servers, flags.kafka_config_file),
        input=flags.input,
        enriched=flags.enriched,
        dead_letters=flags.dead_letters,
        database=database,
        cassandra=(
            parse_cluster(flags.cassandra, user=flags.cassandra_user, password=password)
            if flags.cassandra
            else None
        ),
        flink=Cluster(url if "://" in url else f"http://{url}"),
        pool=flags.worker_pool,
        lake=flags.lake,
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _parser() -> argparse.ArgumentParser:
    rule = TimeRule()
    parser = argparse.ArgumentParser(
        prog="python scripts/verify.py",
        description="Check a platform and the activity job on it.",
        epilog='The variables of the local platform: eval "$(python -m stack env)"',
        allow_abbrev=False,
    )
    for flag, variable, meaning in (
        ("--kafka_bootstrap_servers", "KAFKA_BOOTSTRAP_SERVERS", "brokers, HOST:PORT,..."),
        ("--flink_master", "FLINK_MASTER", "Flink's REST, HOST:PORT"),
        ("--worker_pool", "BEAM_WORKER_POOL", "Beam's worker pool, HOST:PORT; not given: none"),
        ("--cassandra", "CASSANDRA", "HOST,...:PORT/KEYSPACE; not given: it isn't used"),
        ("--lake", "LAKE", "folder or s3:// URI of the lake"),
    ):
        parser.add_argument(
            flag, default=os.environ.get(variable), metavar="X", help=f"{meaning} (${variable})"
        )
    for flag, default, meaning in (
        ("--kafka_config_file", None, "librdkafka properties, such as TLS and SASL"),
        ("--input", "user_activity", "topic that the job reads"),
        ("--enriched", "enriched_activity", "topic of accepted events"),
        ("--dead_letters", "user_activity.dlq", "topic of dead letters"),
        ("--database", "env:ACTIVITY_DATABASE_URL", "env:NAME or file:PATH of Postgres' URL"),
        ("--cassandra_user", None, "name to log in with"),
        ("--cassandra_password", None, "env:NAME or file:PATH of its password"),
    ):
        parser.add_argument(
            flag, default=default, metavar="X", help=f"{meaning} (default: {default or 'none'})"
        )
    for flag, seconds, meaning in (
        ("--patience_s", 30, "seconds that the event may take to a sink"),
        ("--out_of_orderness_s", rule.out_of_orderness_s, "of the job"),
        ("--allowed_lateness_s", rule.allowed_lateness_s, "of the job"),
    ):
        parser.add_argument(
            flag, type=int, default=seconds, metavar="N", help=f"{meaning} (default: {seconds})"
        )
    parser.add_argument(
        "--wait", action="store_true", help="wait for the session, which takes minutes"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
