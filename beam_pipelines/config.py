"""What a run of the activity pipeline reads, decides by, and writes: flags that were checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beam_pipelines.io.publication import (
    OBJECT_STORES,
    on_object_store,
    require_no_credentials,
)
from beam_pipelines.kernels.key_groups import MAX_PARALLELISM
from beam_pipelines.model.activity import ACTIVITY, EVENT_TYPES
from beam_pipelines.model.hash_key import HashKey
from beam_pipelines.model.secret import Secret
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.runfolder import RunFolder
from beam_pipelines.runlock import lock_beside, lock_in

DEMO = "demo"

DUCKDB = "duckdb:///"
"""Before the path of a database file, absolute or relative to the working directory."""

KAFKA = "kafka:"
"""Before the names of topics."""


@dataclass(frozen=True)
class KafkaConfig:
    """How topics are reached and read.

    Args:
      bootstrap_servers: HOST:PORT of brokers, separated by commas; None: not given.
      config_file: File of librdkafka properties, read by every process for itself.
      start: `earliest`, `latest`, or µs since 1970.
      until_end: Whether reading ends where the topics ended at the start.
      append_time: `broker`, `producer` or `none`.
      group: Consumer group to commit offsets to, for those who watch its lag.
    """

    bootstrap_servers: str | None = None
    config_file: str | None = None
    start: str | int = "earliest"
    until_end: bool = False
    append_time: str = "broker"
    group: str | None = None


@dataclass(frozen=True)
class CassandraConfig:
    """How Cassandra is reached: `--cassandra` and what belongs to it."""

    cluster: str
    consistency: str = "LOCAL_QUORUM"
    user: str | None = None
    password: Secret | None = None
    every_s: int = 10


_STATE_FLAGS = (
    *("shards", "dedupe", "out_of_orderness_s", "allowed_lateness_s"),
    *("window_s", "users_window_s", "users_period_s", "session_gap_s"),
)


@dataclass(frozen=True)
class ActivityConfig:
    """What a run of the activity pipeline reads, decides by, and writes.

    `options.parse` makes it from flags; the fields are those flags, with the places derived
    from `output` filled in.

    Args:
      input: `demo`, a file pattern, or kafka:TOPIC,...
      format: How records are written: one of `options.FORMATS`.
      fields: Column → name in the record, where they differ.
      event_types: Foreign event type → ours.
      output: Folder of run.json, summary.json, and of the ends not named otherwise.
      database: duckdb:///PATH, or where the URL of a Postgres database is found: env:NAME
        or file:PATH.
      lake: Folder of the lake, s3://BUCKET/PATH or gs://BUCKET/PATH.
      enriched: Folder of the accepted events, or kafka:TOPIC.
      dead_letters: Folder of what could not be used, or kafka:TOPIC.
      kafka: How topics are reached and read.
      cassandra: Where events by user and views by page go as well; None: nowhere.
      time: The time rule; `as_of_us` is None where `--as_of` isn't given.
      window_s: Length of the windows that page views are counted in.
      users_window_s: Length of the sliding windows that users are counted in.
      users_period_s: Seconds from the start of one of them to the next.
      session_gap_s: Seconds without an event after which a session has ended.
      early_firing_s: Seconds of processing time between early results.
      dedupe: What makes two records one event: one of `options.DEDUPE`.
      hash_key: Of the hashes that decide which events, and which users, are one; None: none.
      shards: Parts that the state is divided into by hash.
      demo_events: Records that the demo generates.
      seed: Of the demo's generator.
      max_invalid: Share of the records of bounded input that may be invalid.
      overwrite: Whether to replace the results of a different run.
      in_process: Whether the chosen runner is the one in this process.

    Raises:
      ValueError: a value can't be used; the message names its flag.
    """

    input: str
    format: str
    fields: Mapping[str, str]
    event_types: Mapping[str, str]
    output: str
    database: str
    lake: str
    enriched: str
    dead_letters: str
    kafka: KafkaConfig
    cassandra: CassandraConfig | None
    time: TimeRule
    window_s: int
    users_window_s: int
    users_period_s: int
    session_gap_s: int
    early_firing_s: int
    dedupe: str
    hash_key: HashKey | None
    shards: int
    demo_events: int
    seed: int
    max_invalid: float
    overwrite: bool
    in_process: bool

    def __post_init__(self) -> None:
        for name in (
            "window_s",
            "users_window_s",
            "users_period_s",
            "session_gap_s",
            "early_firing_s",
            "demo_events",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        if self.cassandra and self.cassandra.every_s <= 0:
            raise ValueError(f"--cassandra_every_s must be positive, got {self.cassandra.every_s}")
        if not 0 < self.shards <= MAX_PARALLELISM:
            raise ValueError(f"--shards is from 1 to {MAX_PARALLELISM}, got {self.shards}")
        if not 0 <= self.max_invalid <= 1:
            raise ValueError(f"--max_invalid is a share from 0 to 1, got {self.max_invalid}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if self.users_period_s > self.users_window_s:
            raise ValueError(
                f"--users_period_s={self.users_period_s} leaves holes between windows of "
                f"--users_window_s={self.users_window_s}; a period is at most a window"
            )
        _require_known("--fields", "column", self.fields, ACTIVITY.names)
        _require_known("--event_types", "event type", self.event_types.values(), EVENT_TYPES)
        if self.format == "access_log" and (self.fields or self.event_types):
            raise ValueError("--format=access_log has no fields to map: --fields, --event_types")
        _require_place("--input", self.input, "demo, local files or kafka:TOPIC", (KAFKA,))
        _require_place("--output", self.output, "a local folder", ())
        _require_place("--lake", self.lake, "a folder, s3:// or gs://", OBJECT_STORES)
        require_no_credentials(self.lake)
        for flag in ("enriched", "dead_letters"):
            _require_place(
                f"--{flag}", getattr(self, flag), "a local folder or kafka:TOPIC", (KAFKA,)
            )
        self._require_kafka()
        self._require_what_the_runner_can()
        _ = self.local and self.folder, self.secret  # they check themselves

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that are read; none, where the input isn't Kafka."""
        return topics(self.input) if self.input.startswith(KAFKA) else ()

    @property
    def endless(self) -> bool:
        """Whether the input has no end."""
        return bool(self.topics) and not self.kafka.until_end

    @property
    def window_shards(self) -> int:
        """Parts that a window is divided into: each has its price at every firing."""
        return 1 if self.in_process else max(1, self.shards // 2)

    @property
    def state_settings(self) -> str:
        """The flags that the state of an endless run depends on."""
        settings = {"shards": self.shards, **self.settings_identity()}
        flags = [f"--{flag}={settings[flag]}" for flag in _STATE_FLAGS]
        if self.hash_key:
            flags.append(f"--hash_key of fingerprint {self.hash_key.fingerprint}")
        return " ".join(flags)

    @property
    def local(self) -> bool:
        """Whether the tables are in a file of this machine."""
        return self.database.startswith(DUCKDB)

    @property
    def database_path(self) -> str:
        """The file of a local database."""
        path = self.database.removeprefix(DUCKDB)
        if path == self.database or not path or path.startswith(":"):
            raise ValueError(_NO_DATABASE)
        return path

    @property
    def secret(self) -> Secret | None:
        """Where the URL of a database server is found; None: the database is local."""
        if self.local:
            return None
        try:
            return Secret(self.database)
        except ValueError:
            raise ValueError(_NO_DATABASE) from None

    @property
    def values(self) -> dict[str, dict[str, str]]:
        """Column → foreign value → ours."""
        return {"event_type": dict(self.event_types)}

    @property
    def folder(self) -> RunFolder:
        """The output folder, which knows what a run writes."""
        database = self.database_path
        ends = (database, f"{database}.wal", *self.folders)
        return RunFolder(self.output, ends)

    @property
    def locks(self) -> tuple[Path, ...]:
        """The files that a run in this process holds locked: one per place it writes to."""
        ends = tuple(map(lock_in, self.folders))
        if not self.local:
            return ends
        return lock_in(self.output), lock_beside(self.database_path), *ends

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of this machine that results go to."""
        places = (self.lake, self.enriched, self.dead_letters)
        return tuple(
            place for place in places if not (place.startswith(KAFKA) or on_object_store(place))
        )

    def settings_identity(self) -> dict[str, Any]:
        """Return what decides the results of complete input, besides the input: for run.json.

        Neither the runner, nor the places of the results, nor early firings do.
        """
        return {
            "format": self.format,
            "fields": dict(self.fields),
            "event_types": dict(self.event_types),
            "out_of_orderness_s": self.time.out_of_orderness_s,
            "allowed_lateness_s": self.time.allowed_lateness_s,
            "future_tolerance_s": self.time.future_tolerance_s,
            "as_of_us": self.time.as_of_us,
            "window_s": self.window_s,
            "users_window_s": self.users_window_s,
            "users_period_s": self.users_period_s,
            "session_gap_s": self.session_gap_s,
            "dedupe": self.dedupe,
            **({"hash_key": self.hash_key.fingerprint} if self.hash_key else {}),
        }

    def _require_kafka(self) -> None:
        used = [
            f"--{flag}={getattr(self, flag)}"
            for flag in ("input", "enriched", "dead_letters")
            if getattr(self, flag).startswith(KAFKA)
        ]
        for flag in used:
            for topic in topics(flag.partition("=")[2]):
                if not re.fullmatch(r"[A-Za-z0-9._-]{1,249}", topic):
                    raise ValueError(f"{flag} has no topic's name; e.g. kafka:user_activity")
        if used and not self.kafka.bootstrap_servers:
            raise ValueError(
                f"{used[0]} needs --kafka_bootstrap_servers=HOST:PORT, or the variable "
                "KAFKA_BOOTSTRAP_SERVERS"
            )
        if "@" in (self.kafka.bootstrap_servers or ""):  # and not shown: it may be a password
            raise ValueError(
                "--kafka_bootstrap_servers is HOST:PORT,... without a user or password; they "
                "are given in --kafka_config_file"
            )
        for flag in ("enriched", "dead_letters"):
            place = getattr(self, flag)
            if place.startswith(KAFKA) and len(topics(place)) > 1:
                raise ValueError(f"--{flag}={place} names several topics; it takes one")
            if place.startswith(KAFKA) and topics(place)[0] in self.topics:
                raise ValueError(f"--{flag}={place} would be read as input again")
        if self.endless and self.kafka.append_time == "none":
            raise ValueError("--append_time=none is for complete input: add --kafka_until_end")

    def _require_what_the_runner_can(self) -> None:
        if self.in_process:
            if self.endless:
                raise ValueError(
                    f"--input={self.input} has no end, and the runner in this process needs one: "
                    "add --runner=FlinkRunner, or --kafka_until_end"
                )
            return
        if self.local:
            raise ValueError(
                f"{self.database} is a DuckDB file, which one process writes: use "
                "--runner=DirectRunner, or --database=env:NAME"
            )
        for flag in ("enriched", "dead_letters"):
            if not getattr(self, flag).startswith(KAFKA):
                raise ValueError(
                    f"--{flag}={getattr(self, flag)} is written by one process; other runners "
                    f"take --{flag}=kafka:TOPIC"
                )


def topics(value: str) -> tuple[str, ...]:
    """Return the topics of kafka:A,B."""
    return tuple(topic.strip() for topic in value.removeprefix(KAFKA).split(","))


# Without the value: the URL of a database may hold a password.
_NO_DATABASE = (
    f"--database is {DUCKDB}PATH, a file that DuckDB keeps, or env:NAME or file:PATH, where the "
    "postgresql://USER:PASSWORD@HOST:PORT/DATABASE of a server is found"
)


def _require_known(flag: str, what: str, names: Any, known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} names no {what} {name!r}; there are {', '.join(known)}")


def _require_place(flag: str, value: str, what: str, schemes: tuple[str, ...]) -> None:
    if not value:
        raise ValueError(f"{flag} is empty")
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://|(kafka|env|file):", value)
    if scheme and scheme[0] not in schemes:
        raise ValueError(f"{flag} takes {what}; {scheme[0]} isn't supported")
