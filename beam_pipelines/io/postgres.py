"""Postgres: result tables, upserted by their keys."""

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
import psycopg
import pyarrow as pa
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import Identifier

from beam_pipelines.io.duckdb import merged, upsert_sql
from beam_pipelines.io.patience import DEFAULT_PATIENCE, Patience
from beam_pipelines.io.postgres_copy import copied
from beam_pipelines.io.upsert import upsert
from beam_pipelines.model.records import TIMESTAMP
from beam_pipelines.model.secret import Secret
from beam_pipelines.model.tables import Table
from beam_pipelines.model.windows import refuse_partial_results

_LOGGER = logging.getLogger(__name__)

_INCOMING = "beam_incoming"

_SQL_TYPES = {
    pa.string(): "text",
    pa.bool_(): "boolean",
    pa.int32(): "integer",
    pa.int64(): "bigint",
    pa.float64(): "double precision",
    TIMESTAMP: "timestamp with time zone",
}

_CONNECTION = {
    "connect_timeout": 10,
    "application_name": "beam_pipelines",
    # A server that vanished without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,
}
"""Settings of libpq that the URL may override."""

# A worker that vanished in the middle of a transaction must not hold its locks for as long as
# TCP takes to notice.
_SESSION = "SET idle_in_transaction_session_timeout = '60s'"

_PASSES_BY_ITSELF = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "53300",  # too_many_connections
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now: it is starting up
        "57P05",  # idle_session_timeout
        "25P03",  # idle_in_transaction_session_timeout
    }
)

# A connection that was refused has no SQLSTATE, only words. A server that says these in
# another language is asked again until patience ends, with the same error then.
_REFUSED_FOR_GOOD = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|not permitted to log in"
    r"|(role|database) .+ does not exist|permission denied|certificate|does not support SSL"
    r"|invalid .*value"
)


@dataclass
class WriteToPostgres(beam.PTransform):
    """Upsert batches of rows into a table of a Postgres database.

    Input: batches of the table's schema. Output: nothing.

    Guarantee: at least once, and repeats change nothing: the key decides which row, the
    table's merge (monotone) what it holds. Rows are gathered within a bundle and upserted
    at its end, or when there are `upsert.FLUSH_ROWS`, in one transaction each; of rows
    that repeat a key the merge is stored, where `replace` takes the last one. Rows that come
    once each (none of their columns grows) are added as they are, and merged only where one of
    them was there already.

    The table is there already (`init-db.sql`) and is compared with `table` whenever a
    connection is made: one per worker thread, when it first writes. Deadlocks, lost
    connections and a server that is down are waited out as `patience` says; every other
    error fails the bundle. Through PgBouncer only with pool_mode=session, as rows pass
    through a temporary table.

    Texts of a key that are too long for an index are stored shortened (`kernels.texts`):
    their beginning, then their SHA-256.

    Args:
      table: Table name, columns, key and merge.
      database: Where the worker finds postgresql://USER:PASSWORD@HOST:PORT/DATABASE.
      patience: How long a failed write is repeated.

    Raises:
      ValueError: the batches have other columns, a column type has no counterpart, or the
        rows come from discarding windows and the table keeps the greatest value; (at run
        time) the secret is no such URL.
      MissingSecret: (at run time) the worker has no such secret.
      RuntimeError: (at run time) the database can't be used; the message says why.
    """

    table: Table
    database: Secret
    patience: Patience = DEFAULT_PATIENCE

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        for column in self.table.schema:
            _sql_type(column)
        if self.table.accumulates:
            refuse_partial_results(rows, f"table {self.table.name}")
        open_table = partial(PostgresTable, self.table, self.database, self.patience)
        return upsert(rows, self.table.name, self.table.schema, open_table)


class PostgresTable:
    """A table in a database, over one connection: made when needed, and again when lost.

    Args:
      table: Table name, columns, key and merge.
      database: Where its URL is found; looked up now, and for every connection.
      patience: How long an upsert is repeated.
    """

    def __init__(self, table: Table, database: Secret, patience: Patience) -> None:
        self.table = table
        self.patience = patience
        self._database = database
        self._place = _place(_parameters(database))
        self._connection: psycopg.Connection | None = None

    def upsert(self, rows: pa.RecordBatch) -> None:
        """Merge rows into the table, all of them or none; repeating it changes nothing.

        Raises:
          RuntimeError: the database can't be reached for too long, or refuses the rows.
        """
        distinct = merged(rows, self.table)
        if not self.table.accumulates:  # in the order of the index; a merge sees to that itself
            distinct = distinct.sort_by([(name, "ascending") for name in self.table.key])
        encoded = copied(distinct, self.table)
        try:
            self.patience.repeat(lambda: self._attempt(encoded), self._passes)
        except psycopg.Error as error:  # not as the cause: its own text may show rows
            raise RuntimeError(
                f"could not write to table {self.table.name} of {self._place}: {_reason(error)}"
            ) from None

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _attempt(self, encoded: bytes) -> None:
        try:
            if self._connection is None:
                self._connection = self._connect()
            # Rows that come once each go in at half the price, and hardly ever one is there.
            if self.table.accumulates or not self._added(self._connection, encoded):
                with self._connection.transaction():
                    self._copy(self._connection, _INCOMING, encoded)
                    self._connection.execute(merge_sql(self.table))
        except BaseException:
            self.close()  # whatever state it is in, a new one is sound
            raise

    def _added(self, connection: psycopg.Connection, encoded: bytes) -> bool:
        """Add rows, all of them or none; returns whether none of their keys was there."""
        with suppress(psycopg.errors.UniqueViolation), connection.transaction():
            self._copy(connection, _quoted(self.table.name), encoded)
            return True
        return False

    def _copy(self, connection: psycopg.Connection, target: str, encoded: bytes) -> None:
        columns = ", ".join(_quoted(name) for name in self.table.schema.names)
        sql = f"COPY {target} ({columns}) FROM STDIN (FORMAT binary)"
        with connection.cursor() as cursor, cursor.copy(sql) as copy:
            copy.write(encoded)

    def _connect(self) -> psycopg.Connection:
        connection = open_postgres(self._database)
        try:
            connection.execute(_SESSION)
            _require_table(connection, self.table, self._place)
            columns = ", ".join(f"{_quoted(c.name)} {_sql_type(c)}" for c in self.table.schema)
            connection.execute(f"CREATE TEMP TABLE {_INCOMING} ({columns}) ON COMMIT DELETE ROWS")
        except BaseException:
            connection.close()
            raise
        return connection

    def _passes(self, error: Exception) -> bool:
        if not is_transient(error):
            return False
        _LOGGER.warning("Trying again to write to %s: %s", self._place, _reason(error))
        return True


def open_postgres(database: Secret) -> psycopg.Connection:
    """Connect to the database that a secret names; each statement commits by itself.

    The only way to a connection: it parses the URL strictly, so that no part of a password
    is taken for a host or a parameter, which errors would show.

    Raises:
      MissingSecret: there is no such secret here.
      ValueError: it is no URL of a Postgres database; the message doesn't show it.
      psycopg.Error: the database can't be reached, or refuses.
    """
    return psycopg.connect(autocommit=True, **_parameters(database))


def check_postgres(database: Secret, tables: Sequence[Table]) -> None:
    """Connect once and compare the tables with what is there, before a run begins.

    Raises:
      MissingSecret: there is no such secret here.
      ValueError: it is no URL of a Postgres database.
      RuntimeError: the database can't be reached, or a table is missing or differs.
    """
    place = _place(_parameters(database))
    try:
        with open_postgres(database) as connection:
            for table in tables:
                _require_table(connection, table, place)
    except psycopg.Error as error:
        raise RuntimeError(
            f"can't use {place}, which {database.reference} names: {_reason(error)}"
        ) from None


def is_transient(error: Exception) -> bool:
    """Tell whether an error of Postgres may be gone the next time, on a new connection."""
    if not isinstance(error, psycopg.OperationalError):
        return False
    if error.sqlstate is not None:
        return error.sqlstate in _PASSES_BY_ITSELF or error.sqlstate.startswith("08")
    return not _REFUSED_FOR_GOOD.search(str(error))  # the connection was lost, or never made


def merge_sql(table: Table) -> str:
    """Return the statement that merges the copied rows into a table.

    Rows that would stay as they are aren't written: a repeat leaves no dead rows behind.
    """
    upsert = upsert_sql(table, _INCOMING)
    kept = [name for name in table.schema.names if name not in table.key]
    if not kept:
        return upsert
    name = _quoted(table.name)
    old = [f"{name}.{_quoted(column)}" for column in kept]
    new = [f"excluded.{_quoted(column)}" for column in kept]
    for i, column in enumerate(kept):
        if table.merge.get(column) == "greatest":
            new[i] = f"greatest({old[i]}, {new[i]})"
    return f"{upsert} WHERE ({', '.join(old)}) IS DISTINCT FROM ({', '.join(new)})"


def _parameters(database: Secret) -> dict[str, Any]:
    """Return the settings of a connection, parsed strictly: what libpq misreads, it shows.

    An @ or / in a password makes its end a part of the host, which errors then name.
    """
    url = database.resolve()
    try:
        if not re.fullmatch(r"postgres(ql)?://([^/?@]*@)?[^@]*", url):
            raise ValueError
        given = conninfo_to_dict(url)
        if not re.fullmatch(r"[\d,]*", str(given.get("port", ""))):
            raise ValueError
    except (ValueError, psycopg.ProgrammingError):
        raise ValueError(
            f"{database.reference} holds no URL such as "
            "postgresql://USER:PASSWORD@HOST:5432/DATABASE (it isn't shown, for its password); "
            "reserved characters in a password are percent-encoded: @ is %40, / is %2F"
        ) from None
    return {**_CONNECTION, **given, "client_encoding": "UTF8"}


def _place(parameters: dict[str, Any]) -> str:
    host, port = parameters.get("host", "localhost"), parameters.get("port", 5432)
    name = parameters.get("dbname", parameters.get("user", "postgres"))
    return f"database {name} at {host}:{port}"


def _require_table(connection: psycopg.Connection, table: Table, place: str) -> None:
    found = connection.execute(
        """
        SELECT a.attname, format_type(a.atttypid, a.atttypmod),
            a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        FROM pg_attribute a LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND i.indisprimary
        WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
        """,
        [_quoted(table.name)],
    ).fetchall()
    if not found:
        raise RuntimeError(f"table {table.name} does not exist in {place}: run init-db.sql")
    remedy = "alter it to what init-db.sql says, or drop it and run that"
    types = {name: sql_type for name, sql_type, _ in found}
    for column in table.schema:
        wanted, there = _sql_type(column), types.get(column.name, "missing")
        if there != wanted:
            raise RuntimeError(
                f"column {column.name} of table {table.name} in {place} is {there}, "
                f"not {wanted}; {remedy}"
            )
    key = {name for name, _, in_key in found if in_key}
    if key != set(table.key):
        raise RuntimeError(
            f"the primary key of table {table.name} in {place} is "
            f"({', '.join(sorted(key)) or 'missing'}), not ({', '.join(table.key)}); {remedy}"
        )


def _reason(error: Exception) -> str:
    """Return what an error says without its details, which may show rows."""
    if isinstance(error, psycopg.Error) and error.diag.message_primary is not None:
        return f"{error.diag.message_primary} (SQLSTATE {error.sqlstate})"
    return " ".join(str(error).split())


def _sql_type(column: pa.Field) -> str:
    is_coded = pa.types.is_dictionary(column.type)
    plain = column.type.value_type if is_coded else column.type
    if plain not in _SQL_TYPES:
        raise ValueError(f"column {column.name!r} of type {plain} has no Postgres type here")
    return _SQL_TYPES[plain]


def _quoted(name: str) -> str:
    return Identifier(name).as_string()
