"""The flags of the activity pipeline, parsed once into a config that checks itself."""

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from beam_pipelines.model.activity import ACTIVITY, EVENT_TYPES
from beam_pipelines.model.records import MAX_EVENT_TIME_US, MIN_EVENT_TIME_US
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.runfolder import RunFolder

PROGRAM = "python -m beam_pipelines.activity"

DEMO = "demo"
FORMATS = ("auto", "ndjson", "access_log", "avro")
DEDUPE = ("auto", "event_id", "payload", "coordinates", "none")

DUCKDB = "duckdb:///"
"""Before the path of a database file, absolute or relative to the working directory."""

_IN_PROCESS = ("direct", "switchingdirect", "fnapi")


@dataclass(frozen=True)
class ActivityConfig:
    """What a run of the activity pipeline reads, decides by, and writes.

    `parse` makes it from flags; the fields are those flags, with the places derived from
    `output` filled in.

    Args:
      input: `demo`, or a file pattern.
      format: How records are written: one of FORMATS.
      fields: Column → name in the record, where they differ.
      event_types: Foreign event type → ours.
      output: Folder of run.json, summary.json, and of the ends not named otherwise.
      database: URL of the database: duckdb:///PATH.
      lake: Folder of the lake.
      enriched: Folder of the accepted events.
      dead_letters: Folder of what could not be used.
      time: The time rule; `as_of_us` is None where `--as_of` isn't given.
      window_s: Length of the windows that page views are counted in.
      users_window_s: Length of the sliding windows that users are counted in.
      users_period_s: Seconds from the start of one of them to the next.
      session_gap_s: Seconds without an event after which a session has ended.
      early_firing_s: Seconds of processing time between early results.
      dedupe: What makes two records one event: one of DEDUPE.
      demo_events: Records that the demo generates.
      seed: Of the demo's generator.
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
    time: TimeRule
    window_s: int
    users_window_s: int
    users_period_s: int
    session_gap_s: int
    early_firing_s: int
    dedupe: str
    demo_events: int
    seed: int
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
        _require_local_files("--input", self.input)
        for flag in ("output", "lake", "enriched", "dead_letters"):
            _require_local_files(f"--{flag}", getattr(self, flag))
        _ = self.database_path, self.folder  # they check themselves

    @property
    def database_path(self) -> str:
        """The file of the database."""
        path = self.database.removeprefix(DUCKDB)
        if path == self.database or not path or path.startswith(":"):
            # Not the value: the URL of another database may hold a password.
            raise ValueError(f"--database names a file that DuckDB keeps: {DUCKDB}PATH")
        return path

    @property
    def values(self) -> dict[str, dict[str, str]]:
        """Column → foreign value → ours."""
        return {"event_type": dict(self.event_types)}

    @property
    def folder(self) -> RunFolder:
        """The output folder, which knows what a run writes."""
        database = self.database_path
        ends = (database, f"{database}.wal", self.lake, self.enriched, self.dead_letters)
        return RunFolder(self.output, ends)

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
        }


class ActivityOptions(PipelineOptions):
    """The flags of the activity pipeline."""

    @classmethod
    def _add_argparse_args(cls, parser: Any) -> None:
        group = parser.add_argument_group("input")
        group.add_argument(
            "--input",
            default=DEMO,
            metavar="SOURCE",
            help="What to read: demo, or files, plain or .gz, by a pattern such as "
            "'logs/*.gz' (default: demo).",
        )
        group.add_argument(
            "--format",
            default="auto",
            choices=FORMATS,
            help="How the records of files are written; auto looks at the beginning "
            "(default: auto).",
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
            help="Where the tables go (default: duckdb:///OUTPUT/activity.duckdb).",
        )
        group.add_argument(
            "--lake",
            metavar="FOLDER",
            help="Every valid record as Parquet, by day (default: OUTPUT/lake).",
        )
        group.add_argument(
            "--enriched",
            metavar="FOLDER",
            help="Every accepted event as NDJSON (default: OUTPUT/enriched).",
        )
        group.add_argument(
            "--dead_letters",
            metavar="FOLDER",
            help="Every record that could not be used, as Parquet (default: OUTPUT/dead_letters).",
        )
        group.add_argument(
            "--overwrite",
            action="store_true",
            help="Replace the results of a run with other input or settings "
            "(default: refuse to start).",
        )

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
    if rest:
        parser.error(_misplaced(rest, parser))
    try:
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
        demo_events=flags.demo_events,
        seed=flags.seed,
        overwrite=flags.overwrite,
        in_process=_runs_in_process(flags.runner),
    )


def _default(value: str | None, default: str) -> str:
    return default if value is None else value


def _add_count(group: Any, flag: str, default: int, meaning: str) -> None:
    group.add_argument(
        flag, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})."
    )


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


def _require_known(flag: str, what: str, names: Any, known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{flag} names no {what} {name!r}; there are {', '.join(known)}")


def _require_local_files(flag: str, value: str) -> None:
    if not value:
        raise ValueError(f"{flag} is empty")
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://|(kafka|env|file):", value)
    if scheme:
        what = "demo or local files" if flag == "--input" else "a local folder"
        raise ValueError(f"{flag} takes {what}; {scheme[0]} isn't supported")


def _micros(flag: str, value: str) -> int:
    if re.fullmatch(r"-?\d+", value):
        micros = int(value) * 1000
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
