"""DuckDB: result tables, and a view of the lake, in one file."""

import glob
import hashlib
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import apache_beam as beam
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.io.ndjson import ndjson
from beam_pipelines.io.upsert import upsert
from beam_pipelines.kernels.columns import hashes_of, micros
from beam_pipelines.kernels.hashing import hash_with
from beam_pipelines.kernels.texts import key_limit, short_columns
from beam_pipelines.model.records import IDENTITY, LATE, ON_TIME, TIMESTAMP, VERDICTS
from beam_pipelines.model.tables import Table
from beam_pipelines.model.windows import refuse_partial_results

EVENTS_VIEW = "events"

_DIGEST_ROWS = 50_000
_IN_UTC = "SET TimeZone = 'UTC'"

_SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.uint64(): "UBIGINT",
    pa.float64(): "DOUBLE",
    TIMESTAMP: "TIMESTAMPTZ",
}


@dataclass
class WriteToDuckDB(beam.PTransform):
    """Upsert batches of rows into a table of a DuckDB file.

    Input: batches of the table's schema. Output: nothing.

    Guarantee: at least once, and repeats change nothing: the key decides which row, the
    table's merge (monotone) what it holds. Rows are gathered within a bundle and upserted
    at its end, or when there are `upsert.FLUSH_ROWS`, in one transaction each; of rows
    that repeat a key the merge is stored, where `replace` takes the last one.

    A DuckDB file has one writing process. Within it, all sinks of a file share one
    connection, closed with the last of them. The table is made where it is missing.

    Long texts of a key are stored shortened (`kernels.texts`), as in Postgres: their
    beginning, then their SHA-256.

    Args:
      table: Table name, columns, key and merge.
      path: The database file; made where it is missing.

    Raises:
      ValueError: the batches have other columns, a column type has no counterpart, or the
        rows come from discarding windows and the table keeps the greatest value.
      RuntimeError: (at run time) another process has the file open.
    """

    table: Table
    path: str

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        for column in self.table.schema:
            _sql_type(column)
        if self.table.accumulates:
            refuse_partial_results(rows, f"table {self.table.name}")
        open_table = partial(_OpenTable, self.table, self.path)
        return upsert(rows, self.table.name, self.table.schema, open_table)


class _OpenTable:
    def __init__(self, table: Table, path: str) -> None:
        self.table = table
        self._database = _database(path)
        self._database.execute(create_table_sql(table))

    def upsert(self, rows: pa.RecordBatch) -> None:
        self._database.execute(upsert_sql(self.table, "rows"), rows=merged(rows, self.table))

    def close(self) -> None:
        del self._database  # the last one closes the file


def create_table_sql(table: Table) -> str:
    """Return the statement that makes a table where it is missing."""
    columns = [
        f"{_quoted(column.name)} {_sql_type(column)}{'' if column.nullable else ' NOT NULL'}"
        for column in table.schema
    ]
    key = f"PRIMARY KEY ({_listed(table.key)})"
    return f"CREATE TABLE IF NOT EXISTS {_quoted(table.name)} ({', '.join([*columns, key])})"


def upsert_sql(table: Table, rows: str) -> str:
    """Return the statement that merges the relation `rows`, one row per key, into a table."""
    columns = _listed(table.schema.names)
    updates = [
        f"{name} = greatest({_quoted(table.name)}.{name}, excluded.{name})"
        if table.merge.get(column) == "greatest"
        else f"{name} = excluded.{name}"
        for column in table.schema.names
        if column not in table.key
        for name in [_quoted(column)]
    ]
    return (
        f"INSERT INTO {_quoted(table.name)} ({columns}) "
        f"SELECT {columns} FROM {rows} ORDER BY {_listed(table.key)} "
        f"ON CONFLICT ({_listed(table.key)}) "
        f"DO {'UPDATE SET ' + ', '.join(updates) if updates else 'NOTHING'}"
    )


def merged(rows: pa.RecordBatch, table: Table) -> pa.Table:
    """Merge rows of one key into one row: databases refuse to update a row twice at once.

    Texts of the key are shortened before, as what is one key there must be one here.
    """
    rows = short_columns(rows, table.key, key_limit(rows.schema, table.key))
    plain = pa.table(
        {
            field.name: column.dictionary_decode() if pa.types.is_dictionary(field.type) else column
            for field, column in zip(rows.schema, rows.columns, strict=True)
        }
    )
    if not _keys_repeat(rows, table.key):
        return plain
    keep_nulls = pc.ScalarAggregateOptions(skip_nulls=False)
    greatest = [c for c in table.schema.names if table.merge.get(c) == "greatest"]
    replaced = [c for c in table.schema.names if c not in (*table.key, *greatest)]
    return (
        plain.group_by(list(table.key), use_threads=False)  # "last" needs the rows' order
        .aggregate([*((c, "max") for c in greatest), *((c, "last", keep_nulls) for c in replaced)])
        .rename_columns([*table.key, *greatest, *replaced])
    )


def _keys_repeat(rows: pa.RecordBatch, key: tuple[str, ...]) -> bool:
    """Tell whether two rows may have one key; if not, merging them would be for nothing."""
    keys = np.zeros(len(rows), np.uint64)
    for name in key:
        column = rows[name]
        whole = pa.types.is_timestamp(column.type) or pa.types.is_int64(column.type)
        keys = hash_with(keys, micros(column) if whole else hashes_of(column))
    return len(np.unique(keys)) < len(keys)


def create_events_view(path: str, lake_folder: str, columns: pa.Schema) -> None:
    """Make the view `events`, which shows each accepted event of a lake once.

    A lake keeps every valid record, re-sends and too late ones included. The view shows
    those that count, and of the records of one identity the one stored first (by append
    time, then topic, partition and offset): the declared columns, `identity`, and
    `event_date` for reading few files. Make it after the lake was written: without files
    it shows nothing, then and later. It names the lake's folder by its absolute path.

    Args:
      path: The database file; made where it is missing.
      lake_folder: The folder `WriteLake` wrote to.
      columns: The declared columns of the rows.
    """
    folder = Path(lake_folder).absolute()
    types = {**{c.name: _sql_type(c) for c in (*columns, IDENTITY)}, "event_date": "DATE"}
    if next(folder.glob("**/*.parquet"), None) is None:
        nothing = ", ".join(f"NULL::{type_} AS {_quoted(c)}" for c, type_ in types.items())
        query = f"SELECT {nothing} WHERE false"
    else:
        files = f"{glob.escape(str(folder))}/**/*.parquet".replace("'", "''")
        query = f"""
            SELECT {_listed(types)}
            FROM read_parquet('{files}', hive_types = {{'event_date': DATE}})
            WHERE verdict IN ('{VERDICTS[ON_TIME]}', '{VERDICTS[LATE]}')
            QUALIFY row_number() OVER (
                PARTITION BY event_date, identity
                ORDER BY append_time, topic, partition, "offset"
            ) = 1
        """
    _database(path).execute(f"CREATE OR REPLACE VIEW {EVENTS_VIEW} AS {query}")


def digest(path: str, tables: Iterable[Table]) -> str:
    """Return a SHA-256 of the rows of tables, whatever order they were written in.

    What is hashed: per table its name on a line, then its rows in the order of its key,
    as `ndjson` writes them, key columns first and times as µs since 1970. It depends on
    neither the version of DuckDB nor the file's layout.
    """
    sha = hashlib.sha256()
    with duckdb.connect(path, read_only=True) as connection:
        connection.execute(_IN_UTC)
        for table in tables:
            sha.update(f"{table.name}\n".encode())
            names = (*table.key, *(c for c in table.schema.names if c not in table.key))
            plain = pa.schema([_hashed(table.schema.field(name)) for name in names])
            rows = connection.sql(
                f"SELECT {_listed(names)} FROM {_quoted(table.name)} ORDER BY {_listed(table.key)}"
            ).to_arrow_reader(_DIGEST_ROWS)
            for batch in rows:
                sha.update(ndjson(batch.cast(plain)))
    return sha.hexdigest()


class _Database:
    """A DuckDB file open for writing; statements take turns, each one a transaction."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = duckdb.connect(path)
        except duckdb.IOException as error:
            if "lock" not in str(error):
                raise
            raise RuntimeError(
                f"{path} is open in another process, and a DuckDB file has one writer: "
                "end that process, then run again"
            ) from error
        connection.execute(_IN_UTC)
        self._connection = connection
        self._turn = threading.Lock()
        weakref.finalize(self, connection.close)

    def execute(self, sql: str, **relations: pa.Table) -> None:
        with self._turn:
            for name, rows in relations.items():
                self._connection.register(name, rows)
            try:
                self._connection.execute(sql)
            finally:
                for name in relations:
                    self._connection.unregister(name)


_open: weakref.WeakValueDictionary[str, _Database] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _database(path: str) -> _Database:
    """Return the connection that this process shares; it closes with its last user."""
    key = str(Path(path).resolve())
    with _opening:
        database = _open.get(key)
        if database is None:
            database = _open[key] = _Database(key)
        return database


def _plain(column: pa.Field) -> pa.Field:
    is_coded = pa.types.is_dictionary(column.type)
    return column.with_type(column.type.value_type) if is_coded else column


def _hashed(column: pa.Field) -> pa.Field:
    is_time = pa.types.is_timestamp(column.type)
    return column.with_type(pa.int64()) if is_time else _plain(column)


def _sql_type(column: pa.Field) -> str:
    plain = _plain(column).type
    if plain not in _SQL_TYPES:
        raise ValueError(f"column {column.name!r} of type {plain} has no DuckDB type here")
    return _SQL_TYPES[plain]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_quoted(name) for name in names)
