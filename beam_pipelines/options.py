"""The flags of the activity pipeline, parsed once into a config that checks itself."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from beam_pipelines.config import (
    DEMO,
    DUCKDB,
    ActivityConfig,
    CassandraConfig,
    KafkaConfig,
)
from beam_pipelines.flink import JOB_SERVER_FLAGS
from beam_pipelines.kernels.key_groups import MAX_PARALLELISM
from beam_pipelines.kernels.rfc3339 import EPOCH_SECONDS, from_epoch_ms_one
from beam_pipelines.model.activity import ACTIVITY, EVENT_TYPES
from beam_pipelines.model.hash_key import HashKey
from beam_pipelines.model.records import MAX_EVENT_TIME_US, MIN_EVENT_TIME_US
from beam_pipelines.model.secret import MissingSecret, Secret
from beam_pipelines.model.time_rule import TimeRule

PROGRAM = "python -m beam_pipelines.activity"

FORMATS = ("auto", "ndjson", "access_log", "avro")
DEDUPE = ("auto", "event_id", "payload", "coordinates", "none")

APPEND_TIMES = ("broker", "producer", "none")

SHARDS_IN_PROCESS = 8
"""Shards of a run in this process, which gains from them only tables that fit its caches."""

_IN_PROCESS = ("direct", "switchingdirect", "fnapi")


class ActivityOptions(PipelineOptions):
    """The flags of the activity pipeline."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        group = parser.add_argument_group("input")
        group.add_argument(
            "--input",
            default=DEMO,
            metavar="SOURCE",
            help="What to read: demo; files, plain or .gz, by a pattern such as 'logs/*.gz'; "
            "or kafka:TOPIC,... (default: demo).",
        )
        group.add_argument(
            "--format",
            default="auto",
            choices=FORMATS,
            help="How the records are written; auto looks at the beginning of files, and takes "
            "topics for ndjson, a record a message (default: auto).",
        )
        group.add_argument(
            "--fields",
            default="",
            metavar="COLUMN=FIELD,...",
            help=f"Names of fields that differ from the columns {', '.join(ACTIVITY.names)}; "
            "e.g. event_time=ts,user_id=uid (default: none).",
        )
        group.add_argument(
            "--event_types",
            default="",
            metavar="THEIRS=OURS,...",
            help=f"Event types that stand for {', '.join(EVENT_TYPES)}; "
            "e.g. pageview=page_view (default: none).",
        )
        group.add_argument(
            "--dedupe",
            default="auto",
            choices=DEDUPE,
            help="What makes two records one event; auto: the event_id, without one the "
            "payload, in access logs the coordinates (default: auto).",
        )
        group.add_argument(
            "--max_invalid",
            type=float,
            default=0.5,
            metavar="SHARE",
            help="Share of the records, from 0 to 1, that may be invalid; a run over input that "
            "ends exits 1 where more are, or where none is accepted (default: 0.5).",
        )
        group.add_argument(
            "--hash_key",
            metavar="SECRET",
            help="Where the driver and the workers find a key of 16 bytes or more, env:NAME or "
            "file:PATH, for topics that strangers write to: without it nobody can make an event "
            "or a user that is taken for another. State, tables and lake belong to one key "
            "(default: no key).",
        )

        group = parser.add_argument_group("output")
        group.add_argument(
            "--output",
            default="out",
            metavar="FOLDER",
            help="Folder of the results, of run.json and of summary.json (default: out).",
        )
        group.add_argument(
            "--database",
            metavar="URL",
            help="Where the tables go: duckdb:///PATH, a file; or env:NAME or file:PATH, where "
            "workers find a postgresql:// URL (default: duckdb:///OUTPUT/activity.duckdb).",
        )
        group.add_argument(
            "--lake",
            metavar="FOLDER",
            help="Every valid record as Parquet, by day: a folder, s3://BUCKET/PATH or "
            "gs://BUCKET/PATH (default: OUTPUT/lake).",
        )
        group.add_argument(
            "--enriched",
            metavar="FOLDER",
            help="Every accepted event as JSON: a folder, or kafka:TOPIC "
            "(default: OUTPUT/enriched).",
        )
        group.add_argument(
            "--dead_letters",
            metavar="FOLDER",
            help="Every record that could not be used: a folder, or kafka:TOPIC "
            "(default: OUTPUT/dead_letters).",
        )
        group.add_argument(
            "--overwrite",
            action="store_true",
            help="Replace the results of a run with other input or settings "
            "(default: refuse to start).",
        )

        _add_servers(parser)

        rule = TimeRule()
        group = parser.add_argument_group("time rule")
        _add_count(
            group,
            "--out_of_orderness_s",
            rule.out_of_orderness_s,
            "Seconds that the watermark stays behind the append time",
        )
        _add_count(
            group,
            "--allowed_lateness_s",
            rule.allowed_lateness_s,
            "Seconds behind the watermark that an event still counts",
        )
        _add_count(
            group,
            "--future_tolerance_s",
            rule.future_tolerance_s,
            "Seconds that an event may be ahead of its append time",
        )
        group.add_argument(
            "--as_of",
            metavar="TIME",
            help="RFC 3339 time or epoch milliseconds that stands for now when complete input "
            "is read (default: when its newest file changed; the demo's own clock).",
        )

        group = parser.add_argument_group("windows")
        _add_count(group, "--window_s", 60, "Seconds of a window that page views are counted in")
        _add_count(
            group, "--users_window_s", 300, "Seconds of a window that active users are counted in"
        )
        _add_count(
            group,
            "--users_period_s",
            60,
            "Seconds from the start of one of these windows to the next",
        )
        _add_count(
            group, "--session_gap_s", 1800, "Seconds without an event that end a user's session"
        )
        _add_count(
            group,
            "--early_firing_s",
            10,
            "Seconds between early results, which only endless input has",
        )

        group = parser.add_argument_group("state")
        group.add_argument(
            "--shards",
            type=int,
            metavar="N",
            help="Parts that the state is divided into, at least one for each parallel instance; "
            "a job that resumes must have as many as before (default: twice the parallelism; in "
            f"this process {SHARDS_IN_PROCESS}).",
        )

        group = parser.add_argument_group("demo")
        _add_count(group, "--demo_events", 200_000, "Number of records to generate")
        _add_count(group, "--seed", 1, "Seed of the generator")


def parse(argv: Sequence[str]) -> tuple[ActivityConfig, PipelineOptions]:
    """Parse the command line: our flags into a config, Beam's into its options.

    Both `--flag=value` and `--flag value` are understood, abbreviations aren't. Misuse
    (an unknown flag or runner, a value that can't be used) ends the process with a
    message on stderr and exit code 2, `--help` with 0.
    """
    parser = _parser()
    flags, rest = parser.parse_known_args(argv)
    try:
        if not _runs_in_process(flags.runner):
            rest = [each for each in rest if not _is_of_job_server(each)]
        if rest:
            parser.error(_misplaced(rest, parser))
        config = _config(flags)
    except ValueError as error:
        parser.error(str(error))
    return config, ActivityOptions(list(argv))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without the usage: nearly two hundred flags would push the message off the screen.
        self.exit(2, f"{message}\n{PROGRAM} --help lists the flags.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--FLAG=VALUE ...]",
        description="Turn user activity into tables, a lake and files. Our flags come first; "
        "Beam's own follow, --runner (default: DirectRunner, in this process) among them.",
        allow_abbrev=False,
    )
    ActivityOptions._add_argparse_args(parser)
    # By name, as Beam does: a class that is defined twice counts once.
    beams = {str(options): options for options in PipelineOptions.__subclasses__()}
    for options in beams.values():
        if options is not ActivityOptions:
            group: Any = parser.add_argument_group(f"Beam: {options.__name__}")
            options._add_argparse_args(group)
    return parser


def _config(flags: argparse.Namespace) -> ActivityConfig:
    output = flags.output.rstrip("/") or "/"
    return ActivityConfig(
        input=flags.input,
        format=flags.format,
        fields=_pairs("--fields", flags.fields),
        event_types=_pairs("--event_types", flags.event_types),
        output=output,
        database=_default(flags.database, f"{DUCKDB}{output}/activity.duckdb"),
        lake=_default(flags.lake, f"{output}/lake"),
        enriched=_default(flags.enriched, f"{output}/enriched"),
        dead_letters=_default(flags.dead_letters, f"{output}/dead_letters"),
        kafka=KafkaConfig(
            bootstrap_servers=_bootstrap_servers(flags),
            config_file=flags.kafka_config_file,
            start=_start(flags.kafka_start),
            until_end=flags.kafka_until_end,
            append_time=flags.append_time,
            group=flags.kafka_group,
        ),
        cassandra=_cassandra(flags),
        time=TimeRule(
            out_of_orderness_s=flags.out_of_orderness_s,
            allowed_lateness_s=flags.allowed_lateness_s,
            future_tolerance_s=flags.future_tolerance_s,
            as_of_us=None if flags.as_of is None else _micros("--as_of", flags.as_of),
        ),
        window_s=flags.window_s,
        users_window_s=flags.users_window_s,
        users_period_s=flags.users_period_s,
        session_gap_s=flags.session_gap_s,
        early_firing_s=flags.early_firing_s,
        dedupe=flags.dedupe,
        hash_key=_hash_key(flags.hash_key),
        shards=_shards(flags),
        demo_events=flags.demo_events,
        seed=flags.seed,
        max_invalid=flags.max_invalid,
        overwrite=flags.overwrite,
        in_process=_runs_in_process(flags.runner),
    )


def _shards(flags: argparse.Namespace) -> int:
    if flags.shards is not None:
        return int(flags.shards)
    if _runs_in_process(flags.runner):
        return SHARDS_IN_PROCESS
    return min(2 * max(flags.parallelism, 1), MAX_PARALLELISM)


def _bootstrap_servers(flags: argparse.Namespace) -> str | None:
    return flags.kafka_bootstrap_servers or os.environ.get("KAFKA_BOOTSTRAP_SERVERS")


def _cassandra(flags: argparse.Namespace) -> CassandraConfig | None:
    if flags.cassandra is None:
        return None
    password = None
    if flags.cassandra_password is not None:
        try:
            password = Secret(flags.cassandra_password)
        except ValueError as error:
            raise ValueError(f"--cassandra_password: {error}") from error
    return CassandraConfig(
        flags.cassandra,
        flags.cassandra_consistency,
        flags.cassandra_user,
        password,
        flags.cassandra_every_s,
    )


def _hash_key(reference: str | None) -> HashKey | None:
    if reference is None:
        return None
    try:
        return HashKey.look_up(reference)
    except (MissingSecret, ValueError) as error:
        raise ValueError(f"--hash_key: {error}") from error


def _start(value: str) -> str | int:
    return value if value in ("earliest", "latest") else _micros("--kafka_start", value)


def _default(value: str | None, default: str) -> str:
    return default if value is None else value


def _add_count(group: Any, flag: str, default: int, meaning: str) -> None:
    group.add_argument(
        flag, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})."
    )


def _add_servers(parser: Any) -> None:
    group = parser.add_argument_group("kafka")
    group.add_argument(
        "--kafka_bootstrap_servers",
        metavar="HOST:PORT,...",
        help="Brokers (default: the variable KAFKA_BOOTSTRAP_SERVERS).",
    )
    group.add_argument(
        "--kafka_config_file",
        metavar="PATH",
        help="librdkafka properties, such as TLS and SASL, that every worker reads from this "
        "file; never logged (default: none).",
    )
    group.add_argument(
        "--kafka_start",
        default="earliest",
        metavar="WHERE",
        help="Where reading begins: earliest, latest (when the job is submitted), or an RFC 3339 "
        "time; a job that resumes from state goes on where it was (default: earliest).",
    )
    group.add_argument(
        "--kafka_until_end",
        action="store_true",
        help="Read up to where the topics end at the start, then finish (default: never end).",
    )
    group.add_argument(
        "--append_time",
        default="broker",
        choices=APPEND_TIMES,
        help="What lateness is judged by: broker, its LogAppendTime; producer, CreateTime, "
        "which is as good as the producers' clocks; none, the input is complete and nothing is "
        "late (default: broker).",
    )
    group.add_argument(
        "--kafka_group",
        metavar="NAME",
        help="Consumer group to commit offsets to, for tools that show lag; nothing is read "
        "from it (default: none).",
    )
    group = parser.add_argument_group("cassandra")
    group.add_argument(
        "--cassandra",
        metavar="HOST,...:PORT/KEYSPACE",
        help="Where events by user and views by page are stored as well (default: nowhere).",
    )
    group.add_argument(
        "--cassandra_consistency",
        default="LOCAL_QUORUM",
        metavar="LEVEL",
        help="Replicas that must have a write (default: LOCAL_QUORUM).",
    )
    _add_count(
        group,
        "--cassandra_every_s",
        10,
        "Seconds that events of endless input wait to be stored together: a server's work for an "
        "event falls with the number that a user has among them",
    )
    group.add_argument(
        "--cassandra_user", metavar="NAME", help="User to log in as (default: no login)."
    )
    group.add_argument(
        "--cassandra_password",
        metavar="SECRET",
        help="Where workers find the password: env:NAME or file:PATH (default: no login).",
    )


def _is_of_job_server(argument: str) -> bool:
    return argument.partition("=")[0].removeprefix("--") in JOB_SERVER_FLAGS


def _misplaced(rest: Sequence[str], parser: argparse.ArgumentParser) -> str:
    unknown = next((argument for argument in rest if argument.startswith("-")), None)
    if unknown is None:
        return f"{rest[0]!r} belongs to no flag; every setting is --FLAG=VALUE"
    flag = unknown.split("=", 1)[0]
    known = [option for action in parser._actions for option in action.option_strings]
    nearest = difflib.get_close_matches(flag, known, n=1)
    return f"there is no flag {flag}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _runs_in_process(runner: str | None) -> bool:
    if runner is None:
        return True
    known = StandardOptions.KNOWN_RUNNER_NAMES
    name = runner.lower().removesuffix("runner")
    if "." not in runner and name not in {each.lower().removesuffix("runner") for each in known}:
        nearest = difflib.get_close_matches(runner, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"Beam knows {', '.join(known)}"
        raise ValueError(f"--runner={runner} is no runner; {hint}")
    return name in _IN_PROCESS


def _pairs(flag: str, value: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, value.split(",")):
        name, equals, meaning = (part.strip() for part in item.partition("="))
        if not (name and equals and meaning):
            raise ValueError(f"{flag} is a list such as a=b,c=d; {item!r} is no pair")
        if name in pairs:
            raise ValueError(f"{flag} maps {name!r} twice")
        pairs[name] = meaning
    return pairs


def _micros(flag: str, value: str) -> int:
    if re.fullmatch(r"-?\d+", value):
        micros = int(value) * 1000
        if from_epoch_ms_one(int(value))[1] == EPOCH_SECONDS:
            raise ValueError(
                f"{flag}={value} looks like seconds since 1970; it takes milliseconds: "
                f"{flag}={int(value) * 1000}"
            )
    else:
        try:
            instant = datetime.fromisoformat(value)
        except ValueError:
            instant = None
        if instant is None or instant.tzinfo is None:
            raise ValueError(
                f"{flag}={value} is no time with an offset, such as 2026-01-31T12:00:00Z, "
                "and no number of epoch milliseconds"
            )
        micros = (instant - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
    if not MIN_EVENT_TIME_US <= micros <= MAX_EVENT_TIME_US:
        raise ValueError(f"{flag}={value} isn't in the years 1 to 9999")
    return micros
