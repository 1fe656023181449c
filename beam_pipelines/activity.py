"""User activity: page views per minute, active users, sessions, a lake, enriched events.

    python -m beam_pipelines.activity                       # generated events
    python -m beam_pipelines.activity --input='logs/*.gz'   # real files
    python -m beam_pipelines.activity --input=kafka:user_activity --runner=FlinkRunner …

`build` is the whole pipeline, a stage a line, in the order an event meets them. `--help`
lists the flags. Exit codes: 0; 1 the run failed, its verdicts don't add up, its input wasn't
understood (`--max_invalid`), or nobody read what it printed; 2 misuse: a flag, a file or
folder that can't be used, a folder another run writes to, or a missing extra; 130 Ctrl-C.
Each is told in a line on stderr.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DirectOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
)
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_pipelines import __version__, flink, misread, report
from beam_pipelines.config import ActivityConfig
from beam_pipelines.connectors import Sinks, Source, open_sinks, open_source
from beam_pipelines.kernels.decode import Decoder
from beam_pipelines.lake_claim import LakeClaim, lake_identity
from beam_pipelines.model.activity import (
    ACTIVE_USERS,
    ACTIVITY,
    CLICK,
    PAGE_VIEW,
    PAGE_VIEW_COUNTS,
    SESSION_END,
    SESSION_START,
    TABLES,
    USER_SESSIONS,
)
from beam_pipelines.model.hash_key import HashKey
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.model.windows import WindowPolicy
from beam_pipelines.options import SHARDS_IN_PROCESS, parse
from beam_pipelines.runlock import locked
from beam_pipelines.telemetry import Progress, configure_logging, counters
from beam_pipelines.terminal import interrupted_at_once, printable, run_command, say, told
from beam_pipelines.transforms.aggregate import CountDistinctPerWindow, CountPerWindow
from beam_pipelines.transforms.dedupe import AcceptAll, Deduplicate
from beam_pipelines.transforms.lateness import ClassifyLateness
from beam_pipelines.transforms.parse import COORDINATES, PAYLOAD, Parse
from beam_pipelines.transforms.rows import FilterRows
from beam_pipelines.transforms.sessions import Sessionize

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Activity:
    """How the pipeline decides; where it reads and writes is up to `build`'s arguments.

    Args:
      decoder: Turns payloads into rows of ACTIVITY.
      time: The time rule.
      dedupe: `event_id`, `payload`, `coordinates` or `none`: what makes two records one.
      window_s: Length of the windows that page views are counted in.
      users_window_s: Length of the sliding windows that users are counted in.
      users_period_s: Seconds from the start of one of them to the next.
      session_gap_s: Seconds without an event that end a session.
      early_firing_s: Seconds of processing time between early results of endless input.
      key_shards: Parts that ids and users are divided into.
      window_shards: Parts that the partial results of a window are divided into: each has its
        price at every firing, however little is in it.
      hash_key: Of the hashes that decide which events, and which users, are one; None: there
        is no key.
    """

    decoder: Decoder
    time: TimeRule
    dedupe: str = "event_id"
    window_s: int = 60
    users_window_s: int = 300
    users_period_s: int = 60
    session_gap_s: int = 1800
    early_firing_s: int = 10
    key_shards: int = SHARDS_IN_PROCESS
    window_shards: int = 1
    hash_key: HashKey | None = None

    @property
    def identify_by(self) -> str:
        """What `Parse` makes the identity of."""
        return {"event_id": "event_id", "payload": PAYLOAD}.get(self.dedupe, COORDINATES)

    def deduplicate(self) -> beam.PTransform:
        """Return the stage that lets each event pass once."""
        if self.dedupe == "none":
            return AcceptAll()
        return Deduplicate("identity", self.key_shards)

    def views_window(self) -> WindowPolicy:
        """Return the windows of the page views."""
        return WindowPolicy.fixed(self.window_s, early_s=self.early_firing_s)

    def users_window(self) -> WindowPolicy:
        """Return the windows of the active users."""
        return WindowPolicy.sliding(
            self.users_window_s, self.users_period_s, early_s=self.early_firing_s
        )


def build(pipeline: beam.Pipeline, read: beam.PTransform, activity: Activity, sinks: Sinks) -> None:
    """Build the pipeline: every stage, in event order."""
    payloads = pipeline | "Read activity" >> read
    parsed = payloads | "Parse" >> Parse(activity.decoder, activity.identify_by, activity.hash_key)
    timed = parsed.rows | "Classify lateness" >> ClassifyLateness(activity.time)
    timed.classified | "Write lake" >> sinks.write_lake
    events = timed.usable | "Deduplicate" >> activity.deduplicate()

    views = events | "Page views" >> FilterRows(
        "event_type", PAGE_VIEW, keep=("event_time", "page_url")
    )
    counts = views | "Count page views" >> CountPerWindow(
        "page_url", activity.views_window(), "views", activity.window_shards
    )
    users = events | "Count active users" >> CountDistinctPerWindow(
        "user_id", activity.users_window(), "active_users", activity.window_shards
    )
    sessions = events | "Sessionize" >> Sessionize(
        "user_id",
        activity.session_gap_s,
        marker="event_type",
        start=SESSION_START,
        end=SESSION_END,
        counts={"page_views": PAGE_VIEW, "clicks": CLICK},
        shards=activity.key_shards,
        hash_key=activity.hash_key,
    )
    counts | "Store page views" >> sinks.write_table(PAGE_VIEW_COUNTS)
    users | "Store active users" >> sinks.write_table(ACTIVE_USERS)
    sessions | "Store sessions" >> sinks.write_table(USER_SESSIONS)
    events | "Publish enriched" >> sinks.write_enriched
    if sinks.by_key:
        events | "Store events by user" >> sinks.by_key.write_events
        counts | "Store page views by page" >> sinks.by_key.write_page_views

    rejected = (parsed.dead_letters, timed.future, timed.too_late)
    letters = rejected | "All dead letters" >> beam.Flatten()
    letters | "Store dead letters" >> sinks.write_dead_letters


def broken_laws(counted: Mapping[str, int]) -> list[str]:
    """Return what doesn't add up in the counters of a finished run; nothing should."""
    count = {name: counted.get(name, 0) for name in (*COUNTED, *ROWS_WRITTEN)}
    usable = count["on_time"] + count["late"]
    rejected = count["invalid"] + count["future"] + count["too_late"]
    laws = {
        "read = invalid + future + too_late + on_time + late": count["read"] - rejected - usable,
        "on_time + late = accepted + duplicate": usable - count["accepted"] - count["duplicate"],
        "lake = on_time + late + too_late": count["rows_written.lake"] - usable - count["too_late"],
        "enriched = accepted": count["rows_written.enriched"] - count["accepted"],
        "dead_letters = invalid + future + too_late": count["rows_written.dead_letters"] - rejected,
        "older_than_folded = 0": count["older_than_folded"],
        "nameless_sessions = 0": count["nameless_sessions"],
    }
    return [f"{law} is off by {difference:,}" for law, difference in laws.items() if difference]


VERDICTS = ("invalid", "future", "too_late", "on_time", "late", "accepted", "duplicate")
COUNTED = ("read", *VERDICTS, "ignored_session_ends", "older_than_folded", "nameless_sessions")
SINKS = (*(table.name for table in TABLES), "lake", "enriched", "dead_letters")
ROWS_WRITTEN = tuple(f"rows_written.{sink}" for sink in SINKS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline, or start it where it runs without end; returns the exit code."""
    configure_logging()
    with ExitStack() as locks:
        return _run_or_start(argv, locks)


def _run_or_start(argv: Sequence[str] | None, locks: ExitStack) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config, options = parse(argv)
    try:
        if not config.in_process:
            flink.quiet_submission()
            flink.listen_here_only()
            argv = [*argv, *flink.options_for(argv, "activity", config.endless, os.environ)]
            for note in flink.notes(argv):
                say(note)
            config, options = parse(argv)
        if options.view_as(DirectOptions).direct_running_mode == "multi_processing":
            raise ValueError("--direct_running_mode=multi_processing isn't supported")
        source = open_source(config, _readers(options))
        if config.time.as_of_us is None:
            config = replace(config, time=replace(config.time, as_of_us=source.as_of_us))
        sinks = open_sinks(config, _as_of(config))
        if config.in_process:
            locks.enter_context(locked(config.locks))
        lake = LakeClaim(
            config.lake,
            lake_identity(source.identity, config.settings_identity(), source.format),
        )
        if config.lake not in config.folders:  # others may be the run's own, to be replaced
            lake.check()
        if config.local:
            identity = {
                "version": __version__,
                "input": source.identity,
                "settings": {**config.settings_identity(), "format": source.format},
            }
            config.folder.begin(identity, overwrite=config.overwrite)
        lake.take()
    except (OSError, ValueError) as error:  # what was asked for can't be done
        say(told(error))
        return 2
    try:
        if config.endless:
            return start(config, source, sinks, options)
        with interrupted_at_once() if config.in_process else nullcontext():
            summary = run(config, source, sinks, options)
    except Exception as error:  # the stack goes to the log, what to do about it to the user
        _LOGGER.exception("the run failed")
        why = str(error)
        if "Traceback (most recent call last)" in why:  # a runner's, around Python's
            why = flink.python_error(why)
        why = why.partition(" [while running ")[0]  # Beam's own words end it
        print(printable(f"The run failed: {why}", keep="\n"), file=sys.stderr)
        return 1
    if config.local:
        config.folder.write_summary(summary)
        report.show(config, summary)
    else:
        print(json.dumps(summary, indent=2))
    for law in summary["broken_laws"]:
        say(f"This run can't be trusted: {law}")
    if summary["misread"]:
        for line in misread.told(config, summary["misread"]):
            say(line)
    return 1 if summary["broken_laws"] or summary["misread"] else 0


def start(config: ActivityConfig, source: Source, sinks: Sinks, options: PipelineOptions) -> int:
    """Start a run without end, and wait until it has taken its first checkpoint.

    Workers of a pool outlive this process, which then returns. Others are its children:
    it stays until the job ends.
    """
    pipeline = beam.Pipeline(options=options)
    build(pipeline, source.read, _decisions(config, source), sinks)
    result = pipeline.run()
    cluster = flink.Cluster(options.view_as(FlinkRunnerOptions).flink_master)
    name = options.view_as(GoogleCloudOptions).job_name
    job = flink.wait_until_running(cluster, name, say)
    print(f"running: {cluster.url}/#/job/running/{job}/overview")
    if options.view_as(PortableOptions).environment_type == "LOOPBACK":
        result.wait_until_finish()
    return 0


def run(
    config: ActivityConfig, source: Source, sinks: Sinks, options: PipelineOptions
) -> dict[str, Any]:
    """Run the pipeline over input that ends; returns what summary.json says."""
    from beam_pipelines.io.publication import remove_leftovers

    for folder in config.folders:
        remove_leftovers(folder)
    started = time.monotonic()
    with Progress(["read", "accepted"], source.records):
        runner = FnApiRunner() if config.in_process else None
        pipeline = beam.Pipeline(runner=runner, options=options)
        build(pipeline, source.read, _decisions(config, source), sinks)
        result = pipeline.run()
        result.wait_until_finish()
    for folder in config.folders:
        remove_leftovers(folder)
    hashed = _finish_database(config) if config.local else {}
    seconds = time.monotonic() - started
    counted = counters(result)
    summary = {
        "read": counted.get("read", 0),
        "verdicts": {name: counted.get(name, 0) for name in VERDICTS},
        "invalid": {
            name.removeprefix("invalid."): count
            for name, count in sorted(counted.items())
            if name.startswith("invalid.")
        },
        "ignored_session_ends": counted.get("ignored_session_ends", 0),
        "rows_written": {sink: counted.get(f"rows_written.{sink}", 0) for sink in SINKS},
        "broken_laws": broken_laws(counted),
        "misread": {},
        "as_of": _as_of(config).replace("Z", "+00:00"),
        "seconds": round(seconds, 3),
        **hashed,
    }
    return summary | {"misread": misread.judged(config, source.format, summary)}


def _as_of(config: ActivityConfig) -> str:
    as_of = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=config.time.as_of_us or 0)
    return as_of.isoformat().replace("+00:00", "Z")


def _finish_database(config: ActivityConfig) -> dict[str, str]:
    from beam_pipelines.io.duckdb import create_events_view, digest

    if config.lake in config.folders:
        create_events_view(config.database_path, config.lake, ACTIVITY)
    return {"result_sha256": digest(config.database_path, TABLES)}


def _readers(options: PipelineOptions) -> int:
    return max(options.view_as(FlinkRunnerOptions).parallelism, 1)


def _decisions(config: ActivityConfig, source: Source) -> Activity:
    automatic = "coordinates" if source.format == "access_log" else "event_id"
    return Activity(
        decoder=source.decoder,
        time=config.time,
        dedupe=automatic if config.dedupe == "auto" else config.dedupe,
        window_s=config.window_s,
        users_window_s=config.users_window_s,
        users_period_s=config.users_period_s,
        session_gap_s=config.session_gap_s,
        early_firing_s=config.early_firing_s,
        key_shards=config.shards,
        window_shards=config.window_shards,
        hash_key=config.hash_key,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
