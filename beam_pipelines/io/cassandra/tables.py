"""Tables of Cassandra, and what of a batch their columns hold."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from beam_pipelines.model.batches import require_columns
from beam_pipelines.model.records import TIMESTAMP

_CQL_TYPES = {
    pa.string(): "text",
    pa.bool_(): "boolean",
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.uint64(): "bigint",  # of the same 64 bits: CQL has no unsigned types
    pa.float64(): "double",
    TIMESTAMP: "timestamp",  # in ms: see MicrosOf
}


@dataclass(frozen=True)
class DayOf:
    """The day (UTC) of a time, a CQL `date`: what keeps partitions from growing for ever."""

    time: str


@dataclass(frozen=True)
class MicrosOf:
    """What a CQL `timestamp`, which has milliseconds, leaves out of a time: 0 to 999 µs."""

    time: str


Origin = str | DayOf | MicrosOf
"""A column of a batch, or what is derived from one."""


@dataclass(frozen=True)
class CassandraTable:
    """A table that whole rows are upserted into by their primary key.

    Rows are delivered at least once and in any order. Where the rows of one key are equal,
    nothing needs deciding. Where they carry a count that grows, `greatest` decides.

    Args:
      name: Table name.
      schema: Columns of the batches.
      columns: Column of the table → where its values come from. Nulls are left unset, as a
        tombstone for each would be dear to read; so the rows of a key agree on them.
      partition_key: Columns of the table that choose the partition.
      clustering_key: Columns of the table that order the rows of a partition.
      greatest: A time and a count, columns of the batches: each row is written USING
        TIMESTAMP time (µs since 1970) + count, so of the rows of a key the one with the
        greatest count stays, in whatever order they come. The time must follow from the
        key. Rows that were deleted come back only with a later timestamp than the
        deletion's: to fill a table anew, truncate it.

    Raises:
      ValueError: a column isn't in the schema, or its type doesn't fit.
    """

    name: str
    schema: pa.Schema
    columns: Mapping[str, Origin]
    partition_key: tuple[str, ...]
    clustering_key: tuple[str, ...] = ()
    greatest: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        for column in self.primary_key:
            if column not in self.columns:
                raise ValueError(f"table {self.name}: no key column {column!r} in `columns`")
            if self.field_of(column).nullable:
                raise ValueError(f"table {self.name}: key column {column!r} may be null")
        for column in self.columns:
            self.cql_type(column)
        if self.greatest is not None:
            time, count = self.greatest
            require_columns(self.schema, time, count)
            found = (self.schema.field(time).type, self.schema.field(count).type)
            if found != (TIMESTAMP, pa.int64()):
                raise ValueError(
                    f"table {self.name}: greatest needs a time and a count of type "
                    f"{TIMESTAMP}, int64; {time} and {count} are {found[0]}, {found[1]}"
                )

    @property
    def primary_key(self) -> tuple[str, ...]:
        """The partition key, then the clustering key."""
        return (*self.partition_key, *self.clustering_key)

    def field_of(self, column: str) -> pa.Field:
        """Return the column of the batches that a column of the table comes from."""
        origin = self.columns[column]
        name = origin if isinstance(origin, str) else origin.time
        require_columns(self.schema, name)
        return self.schema.field(name)

    def cql_type(self, column: str) -> str:
        """Return the type that a column of the table must have."""
        field, origin = self.field_of(column), self.columns[column]
        is_coded = pa.types.is_dictionary(field.type)
        plain = field.type.value_type if is_coded else field.type
        if plain not in _CQL_TYPES:
            raise ValueError(f"column {column!r} of type {plain} has no CQL type here")
        if isinstance(origin, str):
            return _CQL_TYPES[plain]
        if plain != TIMESTAMP:
            raise ValueError(f"column {column!r} is part of a time, but {field.name} is {plain}")
        return "date" if isinstance(origin, DayOf) else "smallint"


def insert_cql(table: CassandraTable, keyspace: str) -> str:
    """Return the statement that upserts a row: a marker per column, one for the timestamp."""
    name = f"{_quoted(keyspace)}.{_quoted(table.name)}"
    markers = ", ".join("?" for _ in table.columns)
    timestamp = " USING TIMESTAMP ?" if table.greatest is not None else ""
    columns = _listed(table.columns)
    return f"INSERT INTO {name} ({columns}) VALUES ({markers}){timestamp}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_quoted(name) for name in names)
