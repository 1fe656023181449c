"""What a run left behind on real servers, compared with the truth: both as multisets.

The truth is the oracle's: SQL over a dump of the topic. The ends are read plainly, by the
clients of the servers and by the documented rule of the lake.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
from cassandra.policies import RoundRobinPolicy

from tests.oracle.oracle import Oracle
from tests.oracle.topic import consumed


@dataclass(frozen=True)
class Ends:
    """Where a run writes to.

    Args:
      bootstrap_servers: Kafka's.
      database: URL of the Postgres database.
      cassandra: HOST:PORT/KEYSPACE.
      lake: Folder.
      enriched: Topic.
      dead_letters: Topic.
    """

    bootstrap_servers: str
    database: str
    cassandra: str
    lake: Path
    enriched: str
    dead_letters: str

    def differences(self, oracle: Oracle) -> list[str]:
        """Compare all of them with the truth; returns what differs, in words."""
        return [
            *self._postgres(oracle),
            *self._cassandra(oracle),
            *self._lake(oracle),
            *self._enriched(oracle),
            *self._dead_letters(oracle),
        ]

    def _postgres(self, oracle: Oracle) -> Iterator[str]:
        with psycopg.connect(self.database) as connection:
            for table in ("page_view_counts", "active_users", "user_sessions"):
                cursor = connection.execute(f"SELECT * FROM {table}")
                columns = [column.name for column in cursor.description or ()]
                yield from compared(oracle, table, table, columns, cursor.fetchall())

    def _cassandra(self, oracle: Oracle) -> Iterator[str]:
        with cassandra_session(self.cassandra) as session:
            columns = ["window_start", "window_end", "page_url", "views"]
            views = session.execute(f"SELECT {', '.join(columns)} FROM page_views_by_page")
            yield from compared(oracle, "page_views_by_page", "page_view_counts", columns, views)
            events = [
                (_us(row.event_time) + row.micros, *row[2:])
                for row in session.execute(
                    "SELECT event_time, micros, user_id, page_url, event_type, event_id "
                    "FROM events_by_user"
                )
            ]
            columns = ["event_us", "user_id", "page_url", "event_type", "event_id"]
            yield from compared(oracle, "events_by_user", "events_by_user", columns, events)

    def _lake(self, oracle: Oracle) -> Iterator[str]:
        files = lake_files(oracle, self.lake)
        if not files:
            yield "lake: no files"
            return
        columns = (
            "topic partition offset append_us verdict event_us user_id page_url event_type event_id"
        ).split()
        rows = oracle.rows(
            'SELECT topic, partition, "offset", epoch_us(append_time), verdict, '
            "epoch_us(event_time), user_id, page_url, event_type, event_id "
            f"FROM read_parquet({files!r})"
        )
        yield from compared(oracle, "lake", "lake", columns, rows)

    def _enriched(self, oracle: Oracle) -> Iterator[str]:
        """At least once: as a set. A record without an id was given one."""
        ids = {
            json.loads(message.value())["event_id"]
            for message in consumed(self.bootstrap_servers, self.enriched)
        }
        named = {id_ for (id_,) in oracle.rows("SELECT event_id FROM published") if id_ is not None}
        ((unnamed,),) = oracle.rows("SELECT count(*) FROM events WHERE event_id IS NULL")
        if missing := named - ids:
            yield f"enriched: {len(missing)} ids missing, e.g. {min(missing)}"
        if len(others := ids - named) != unnamed:
            yield f"enriched: {len(others)} ids that no record has, {unnamed} expected"

    def _dead_letters(self, oracle: Oracle) -> Iterator[str]:
        """At least once: as a set."""
        columns = ["topic", "partition", "offset", "stage", "reason", "payload"]
        letters = set()
        for message in consumed(self.bootstrap_servers, self.dead_letters):
            said = {name: value.decode() for name, value in message.headers()}
            letters.add(
                (
                    *(said["topic"], int(said["partition"]), int(said["offset"])),
                    *(said["stage"], said["reason"], _whole(oracle, said, message.value())),
                )
            )
        yield from compared(oracle, "dead_letters", "dead_letters", columns, letters)


def _whole(oracle: Oracle, said: dict[str, str], value: bytes | None) -> bytes | None:
    """Return the payload of a dead letter, of which its topic may hold the beginning."""
    if value is None or said.get("cut") != "true":
        return value
    rows = oracle.rows(
        f"SELECT payload FROM dead_letters WHERE topic = '{said['topic']}' "
        f'AND partition = {said["partition"]} AND "offset" = {said["offset"]}'
    )
    wholes = (whole for (whole,) in rows if whole.startswith(value))
    return next((whole for whole in wholes if len(whole) == int(said["bytes"])), value)


def compared(
    oracle: Oracle, name: str, truth: str, columns: list[str], rows: Iterable[Any]
) -> list[str]:
    """Compare rows with a relation of the oracle, both ways; times become µs since 1970."""
    found = [tuple(_us(v) if isinstance(v, datetime) else v for v in row) for row in rows]
    names = ", ".join(f'"{column}"' for column in columns)
    expected = f"SELECT {names} FROM {truth}"
    if not found:
        ((count,),) = oracle.rows(f"SELECT count(*) FROM {truth}")
        return [f"{name}: empty, {count} rows expected"] if count else []
    table = pa.table([pa.array(values) for values in zip(*found, strict=True)], names=columns)
    oracle.sql.register("found_rows", table)
    different = []
    for what, these, those in (
        ("missing", expected, "FROM found_rows"),
        ("unexpected", "FROM found_rows", expected),
    ):
        rows = oracle.rows(f"({these}) EXCEPT ALL ({those}) ORDER BY ALL")
        if rows:
            different.append(f"{name}: {len(rows)} of {len(found)} rows {what}, e.g. {rows[0]}")
    oracle.sql.unregister("found_rows")
    return different


def lake_files(oracle: Oracle, folder: Path) -> list[str]:
    """Return the files that hold each record once.

    The rule of docs: the published file of a range and date, else, below `_open/`, of each
    number that is the last but one the file with the largest last number.
    """
    return [
        name
        for (name,) in oracle.rows(f"""
            WITH files AS (
                SELECT
                    file,
                    contains(file, '/_open/') AS open,
                    regexp_extract(file, '(event_date=.*)[.]parquet$', 1) AS name
                FROM glob('{folder}/**/event_date=*/*.parquet')
            ),
            published AS (SELECT file, name FROM files WHERE NOT open)
            SELECT file FROM published
            UNION ALL
            SELECT arg_max(file, regexp_extract(name, '-(\\d+)$', 1)::BIGINT)
            FROM files
            WHERE open
                AND regexp_replace(name, '-\\d+-\\d+$', '') NOT IN (SELECT name FROM published)
            GROUP BY regexp_replace(name, '-\\d+$', '')
        """)
    ]


@contextmanager
def cassandra_session(address: str) -> Iterator[Any]:
    """Connect to HOST:PORT/KEYSPACE; without a keyspace, to none."""
    server, _, keyspace = address.partition("/")
    host, _, port = server.partition(":")
    profile = ExecutionProfile(load_balancing_policy=RoundRobinPolicy(), request_timeout=60)
    cluster = Cluster(
        [host],
        port=int(port),
        protocol_version=5,
        connect_timeout=60,
        control_connection_timeout=60,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
    )
    try:
        yield cluster.connect(keyspace or None)
    finally:
        cluster.shutdown()


def _us(moment: datetime) -> int:
    """Return µs since 1970; Cassandra's times have no zone, and mean UTC."""
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
