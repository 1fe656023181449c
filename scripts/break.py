"""Kills a random worker of the running job, and shows that the tables equal the truth after all.

    python -m scripts.break

The truth is worked out from a dump of the topic, in SQL that shares nothing with the
pipeline (tests/oracle). Events may go on meanwhile: what came in the last seconds may or may
not be in a row as yet, so a row lies between the truth without them and the truth with them;
where the two agree, and that is nearly everywhere, it must be exact. Exit codes: 0; 1 a row is
wrong, or the job dropped some; 2 there is nothing to break, or the job didn't recover.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pyarrow as pa

from beam_pipelines.io.postgres import open_postgres
from beam_pipelines.model.secret import MissingSecret, Secret
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.model.watermark import CLOCK_SKEW_US
from beam_pipelines.terminal import run_command, say
from scripts.job import JobError, Jobs
from stack import Stack, StackError
from tests.oracle.oracle import Oracle, Rules
from tests.oracle.topic import dump

SETTLE_S = 30
"""Seconds from the storing of an event until the tables have it: early results come every
ten, and a checkpoint or a busy machine may hold them up."""

RESTORE_S, EQUAL_S = 180, 600
"""Seconds that the job has to go on from a checkpoint, and the tables to equal the truth."""

_POLL_S = 0.5
_MINUTE_US = 60_000_000

GROWING = {
    "page_view_counts": (("window_start", "window_end", "page_url"), "views"),
    "active_users": (("window_start", "window_end"), "active_users"),
}
"""Tables whose rows are updated: the key, and the value that only grows."""

SESSIONS = (
    "user_id",
    "session_start",
    "session_end",
    "duration_s",
    "page_views",
    "clicks",
    "ended_by",
)


@dataclass(frozen=True)
class Settings:
    """What the job was started with.

    Args:
      topic: That it reads.
      bootstrap_servers: Of Kafka.
      database: Where the URL of Postgres is found.
      rules: How it judges and counts.
    """

    topic: str
    bootstrap_servers: str
    database: Secret
    rules: Rules


def settings_of(flags: Mapping[str, str], environment: Mapping[str, str]) -> Settings:
    """Read a job's settings from what the cluster tells of its flags.

    Args:
      flags: The flags in camel case, as Flink's REST API has them.
      environment: Where what the flags leave open, and the database's URL, may be found.

    Raises:
      JobError: it is another pipeline's job, or one whose tables can't be compared.
    """
    if not {"input", "windowS", "database"} <= flags.keys():
        raise JobError("the job that runs is none of beam_pipelines.activity")
    topics = flags["input"].removeprefix("kafka:").split(",")
    if len(topics) > 1 or flags["appendTime"] != "broker":
        raise JobError(
            f"a job with --input={flags['input']} --append_time={flags['appendTime']} can't be "
            "compared: this takes one topic, judged by the broker's time"
        )
    try:
        database = Secret(flags["database"])
        database.resolve()
    except (MissingSecret, ValueError) as error:
        raise JobError(f"--database of the job: {error}") from error
    names = (name for name in Rules.__annotations__ if name.endswith("_s"))
    durations = {name: int(flags[_camel(name)]) for name in names}
    dedupe = "event_id" if flags["dedupe"] == "auto" else flags["dedupe"]
    return Settings(
        topics[0],
        flags.get("kafkaBootstrapServers") or environment["KAFKA_BOOTSTRAP_SERVERS"],
        database,
        Rules(as_of_us=0, dedupe=dedupe, **durations),
    )


def _camel(name: str) -> str:
    return re.sub("_(.)", lambda match: match[1].upper(), name)


@dataclass(frozen=True)
class Compared:
    """How the rows of a table compare with the truth.

    Args:
      table: Its name.
      equal: Rows that are as they must be.
      moving: Rows that events of the last seconds belong to, and that lie between.
      behind: Rows that lack events, or are missing.
      wrong: Rows that no truth has, or with too much: they can't become right.
    """

    table: str
    equal: int
    moving: int
    behind: int
    wrong: int

    def __str__(self) -> str:
        return (
            f"{self.table:<17} {self.equal:>8,} rows equal · {self.moving:,} in motion · "
            f"{self.behind:,} behind · {self.wrong:,} wrong"
        )


def compared_growing(
    sql: duckdb.DuckDBPyConnection, table: str, key: Sequence[str], value: str
) -> Compared:
    """Compare the relation `found_TABLE` with `least_TABLE` and `TABLE`, the most there can be."""
    counts = sql.execute(f"""
        WITH joined AS (
            SELECT
                coalesce(l.{value}, 0) AS least,
                coalesce(m.{value}, 0) AS most,
                coalesce(f.{value}, 0) AS found
            FROM {table} AS m
            FULL JOIN least_{table} AS l USING ({", ".join(key)})
            FULL JOIN found_{table} AS f USING ({", ".join(key)})
        )
        SELECT
            count(*) FILTER (least = most AND found = most),
            count(*) FILTER (least < most AND found BETWEEN least AND most),
            count(*) FILTER (found < least),
            count(*) FILTER (found > most)
        FROM joined
    """).fetchone()
    assert counts is not None
    return Compared(table, *counts)


def compared_sessions(sql: duckdb.DuckDBPyConnection, due_before_us: int) -> Compared:
    """Compare `found_user_sessions` with `user_sessions`: each is stored once, when it is over.

    Args:
      sql: Has the relations, and `least_user_sessions`.
      due_before_us: Sessions that ended before must be there.
    """
    columns = ", ".join(SESSIONS)
    sql.execute(f"""
        CREATE OR REPLACE TEMP TABLE due AS
        SELECT {columns} FROM user_sessions WHERE session_end < {due_before_us}
        INTERSECT
        SELECT {columns} FROM least_user_sessions
    """)
    found = f"SELECT {columns} FROM found_user_sessions"
    counts = sql.execute(f"""
        SELECT
            (SELECT count(*) FROM ({found} INTERSECT ALL SELECT {columns} FROM user_sessions)),
            (SELECT count(*) FROM (SELECT {columns} FROM user_sessions EXCEPT ALL {found})),
            (SELECT count(*) FROM (FROM due EXCEPT ALL {found})),
            (SELECT count(*) FROM ({found} EXCEPT ALL SELECT {columns} FROM user_sessions))
    """).fetchone()
    assert counts is not None
    equal, not_there, behind, wrong = counts
    return Compared("user_sessions", equal, not_there - behind, behind, wrong)


def due_before_us(rules: Rules, now_us: int) -> int:
    """Return which sessions must be stored: those that ended before.

    A session is folded when the watermark has passed the minute of its last event, the gap
    in whole minutes, the allowed lateness and the slack.
    """
    gap_us = -(-rules.session_gap_s * 1_000_000 // _MINUTE_US) * _MINUTE_US
    waits_s = rules.out_of_orderness_s + rules.allowed_lateness_s + SLACK_S + SETTLE_S
    return now_us - CLOCK_SKEW_US - waits_s * 1_000_000 - gap_us - _MINUTE_US


def compare(settings: Settings, folder: Path) -> list[Compared]:
    """Read the tables, then dump the topic, and compare."""
    found = {
        table: _rows(settings.database, table, columns)
        for table, columns in (
            *((table, (*key, value)) for table, (key, value) in GROWING.items()),
            ("user_sessions", SESSIONS),
        )
    }
    read_us = time.time_ns() // 1000
    most_raw, least_raw = folder / "most.parquet", folder / "least.parquet"
    dump(settings.bootstrap_servers, settings.topic, most_raw)
    with duckdb.connect() as sql:
        sql.execute(
            f"COPY (FROM '{most_raw}' QUALIFY max(append_us) OVER (PARTITION BY topic, partition "
            f'ORDER BY "offset" ROWS UNBOUNDED PRECEDING) <= {read_us - SETTLE_S * 1_000_000}) '
            f"TO '{least_raw}'"
        )
    most = Oracle(most_raw, "ndjson", settings.rules)
    least = Oracle(least_raw, "ndjson", settings.rules)
    for table, rows in found.items():
        most.sql.register(f"least_{table}", least.sql.sql(f"FROM {table}").to_arrow_table())
        most.sql.register(f"found_{table}", rows)
    return [
        *(compared_growing(most.sql, table, *of) for table, of in GROWING.items()),
        compared_sessions(most.sql, due_before_us(settings.rules, read_us)),
    ]


def _rows(database: Secret, table: str, columns: Sequence[str]) -> pa.Table:
    """Read a table of Postgres; times become µs since 1970."""
    times = ("window_start", "window_end", "session_start", "session_end")
    chosen = ", ".join(
        f"(extract(epoch FROM {column}) * 1000000)::bigint" if column in times else column
        for column in columns
    )
    with _connected(database) as connection:
        rows = connection.execute(f"SELECT {chosen} FROM {table}").fetchall()
    texts = ("page_url", "user_id", "ended_by")
    schema = pa.schema(
        [
            (
                column,
                pa.string()
                if column in texts
                else pa.float64()
                if column == "duration_s"
                else pa.int64(),
            )
            for column in columns
        ]
    )
    return pa.table([[row[i] for row in rows] for i in range(len(columns))], schema=schema)


def _connected(database: Secret) -> psycopg.Connection:
    try:
        return open_postgres(database)
    except ValueError as error:
        raise JobError(f"--database of the job: {error}") from error


def _kill_a_worker(stack: Stack) -> int:
    pool = stack.service("workers").process
    workers = [pid for pid in pool.members if pid != pool.pid] if pool else []
    if not workers:
        raise JobError(
            "no worker process runs here; this breaks jobs whose workers are in the pool of "
            "`python -m stack up`"
        )
    pid = random.choice(workers)
    os.kill(pid, signal.SIGKILL)
    return pid


def _await_restored(jobs: Jobs, job: str, since_ms: float) -> dict[str, Any]:
    """Wait until the job has gone on from a checkpoint; returns what is known of it.

    Raises:
      JobError: it hasn't, or from an empty one.
    """
    deadline = time.monotonic() + RESTORE_S
    while time.monotonic() < deadline:
        restored = jobs.checkpoints(job)["latest"]["restored"]
        if restored and restored["restore_timestamp"] >= since_ms:
            details = jobs.cluster.get(f"/jobs/{job}/checkpoints/details/{restored['id']}")
            if not details["state_size"]:
                raise JobError(f"checkpoint {restored['id']}, that the job goes on from, is empty")
            return {**details, **restored}
        time.sleep(_POLL_S)
    raise JobError(f"the job has not gone on from a checkpoint within {RESTORE_S} s")


def run(jobs: Jobs, stack: Stack) -> int:
    """Do it; returns the exit code."""
    job = jobs.one(None)
    flags = jobs.cluster.get(f"/jobs/{job}/config")["execution-config"]["user-config"]
    settings = settings_of(flags, os.environ)
    _connected(settings.database).close()  # before something is broken
    before = jobs.checkpoints(job)["latest"]["completed"]
    if before is None:
        raise JobError(f"the job {job} has no checkpoint as yet")
    lost = Counter(jobs.cluster.lost(job))  # its counters begin anew when it is restored
    print(f"job {job}: checkpoint {before['id']} has {before['state_size']:,} bytes of state")
    killed_at = time.time()
    print(f"killed worker process {_kill_a_worker(stack)}", flush=True)
    restored = _await_restored(jobs, job, killed_at * 1000)
    print(
        f"{restored['restore_timestamp'] / 1000 - killed_at:.1f} s later the job went on from "
        f"checkpoint {restored['id']}, {restored['state_size']:,} bytes",
        flush=True,
    )
    # What was stored around the time of the kill must be in the tables as well.
    time.sleep(SETTLE_S)
    deadline = time.monotonic() + EQUAL_S
    while True:
        with tempfile.TemporaryDirectory() as folder:
            tables = compare(settings, Path(folder))
        behind, wrong = (sum(getattr(t, what) for t in tables) for what in ("behind", "wrong"))
        if wrong or not behind or time.monotonic() > deadline:
            break
        print(f"{behind:,} rows are behind; looking again", flush=True)
        time.sleep(SETTLE_S / 3)
    print(*tables, sep="\n")
    if wrong or behind:
        print("The tables differ from the truth.", file=sys.stderr)
    lost += Counter(jobs.cluster.lost(job))
    for name, count in sorted(lost.items()):
        print(f"The job dropped rows: {name} is {count:,}, not 0.", file=sys.stderr)
    if wrong or behind or lost:
        return 1
    print(f"{time.time() - killed_at:.0f} s after the kill, the tables equal the truth.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    argparse.ArgumentParser(
        prog="python -m scripts.break",
        description="Kill a random worker of the running job, and show that the tables equal "
        "the truth after all. Takes no arguments: FLINK_MASTER, KAFKA_BOOTSTRAP_SERVERS and "
        "STACK_HOME say where all is.",
    ).parse_args(argv)
    try:
        stack = Stack()
        os.environ.update(
            {k: v for k, v in stack.settings.environment().items() if k not in os.environ}
        )
        return run(Jobs(f"http://{os.environ['FLINK_MASTER']}"), stack)
    except (JobError, StackError) as error:
        say(error)
        return 2
    except (OSError, psycopg.OperationalError) as error:
        say(f"a server does not answer: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(run_command(main))
