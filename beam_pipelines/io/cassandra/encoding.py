"""Rows as statements of Cassandra's native protocol, encoded column by column.

A BATCH message holds, per prepared statement: a byte 1; the length (16 bits) and bytes of
its id; the number of values (16 bits); and each value as its length (32 bits) and bytes,
where length -2 leaves the column unset. All integers are big-endian. See sections 3, 4.1.7
of native_protocol_v4.spec and native_protocol_v5.spec in the Cassandra repository.

The driver serializes each value by itself, which takes 13 to 20 µs a row; this takes about 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.io.cassandra.tables import CassandraTable, DayOf, MicrosOf
from beam_pipelines.kernels.columns import hashes_of, micros, timestamps
from beam_pipelines.kernels.hashing import hash_with
from beam_pipelines.kernels.wire import fixed, joined, laid_out, nulls_of, sized

BATCH_BYTES = 32_000
"""Encoded bytes of a batch of statements; a server refuses batches of 50 KiB by default."""

BATCH_ROWS = 500
"""Statements of a batch; the protocol allows 65,535."""

_UNSET = -2
_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Statements:
    """Statements of one batch, encoded; `len` tells how many.

    Args:
      encoded: The bytes of all of them.
      starts: Where each one starts in `encoded`, and where the last one ends; the first
        start need not be 0.
    """

    encoded: memoryview
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to_bytes(self) -> bytes:
        """Return the statements as they are sent."""
        return bytes(self.encoded[self.starts[0] : self.starts[-1]])

    def between(self, start: int, end: int) -> "Statements":
        """Return some of the statements."""
        return Statements(self.encoded, self.starts[start : end + 1])

    def halves(self) -> tuple["Statements", "Statements"]:
        """Return the first and the second half."""
        middle = len(self) // 2
        return self.between(0, middle), self.between(middle, len(self))


def by_partition(rows: pa.RecordBatch, table: CassandraTable) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of each partition.

    Returns:
      The order that brings the rows of a partition together, and where in it partitions
      start. (Two partitions of one hash come as one, which matters only to speed.)
    """
    keys = np.zeros(len(rows), np.uint64)
    for column in table.partition_key:
        values = _values(rows, table, column)
        keys = hash_with(keys, values if isinstance(values, np.ndarray) else hashes_of(values))
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return order, starts[: len(rows)]


def encoded(rows: pa.RecordBatch, table: CassandraTable, query_id: bytes) -> Statements:
    """Return an INSERT for each row, in their order.

    Args:
      rows: A batch of the table's schema.
      table: Which columns to take, in the order of `insert_cql`.
      query_id: What the server calls the prepared statement.
    """
    values = len(table.columns) + (table.greatest is not None)
    head = b"\x01" + len(query_id).to_bytes(2) + query_id + values.to_bytes(2)
    parts: list[pa.Array | pa.Scalar] = [pa.scalar(head, pa.binary())]
    for column in table.columns:
        parts += sized(*_bytes_of(_values(rows, table, column), table.cql_type(column)), _UNSET)
    if table.greatest is not None:
        time, count = (micros(rows[name]) for name in table.greatest)
        parts += sized(*_bytes_of(time + count, "bigint"), _UNSET)
    return Statements(*laid_out(joined(parts)))


def routing_keys(rows: pa.RecordBatch, table: CassandraTable) -> list[bytes]:
    """Return the key of each row's partition as its token is computed from it."""
    parts: list[pa.Array | pa.Scalar] = []
    for column in table.partition_key:
        data, _ = _bytes_of(_values(rows, table, column), table.cql_type(column))
        if len(table.partition_key) == 1:
            return list(data.to_pylist())
        parts += [fixed(pc.binary_length(data).to_numpy(), ">u2"), data, pa.scalar(b"\0")]
    return list(joined(parts).to_pylist())


def batches(statements: Statements) -> Iterator[Statements]:
    """Divide statements into batches that a server takes; a larger one is a batch alone."""
    starts, start = statements.starts, 0
    while start < len(statements):
        limit = np.int64(starts[start]) + BATCH_BYTES
        near = starts[start : start + BATCH_ROWS + 1]  # all of them would be converted each time
        fitting = start + int(np.searchsorted(near, limit, "right")) - 1
        end = min(max(fitting, start + 1), start + BATCH_ROWS, len(statements))
        yield statements.between(start, end)
        start = end


def _values(rows: pa.RecordBatch, table: CassandraTable, column: str) -> np.ndarray | pa.Array:
    """Return whole numbers (days, µs) of a column derived from a time, else its values."""
    origin = table.columns[column]
    if isinstance(origin, DayOf):
        return micros(rows[origin.time]) // _DAY_US
    if isinstance(origin, MicrosOf):
        return micros(rows[origin.time]) % 1000
    values = rows[origin]
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_timestamp(values.type) and values.null_count == 0:
        return timestamps(micros(values))  # without a validity bitmap
    return values


def _bytes_of(values: np.ndarray | pa.Array, cql_type: str) -> tuple[pa.Array, np.ndarray | None]:
    """Return the bytes of each value, and which ones are null (None: none is)."""
    nulls = None
    if isinstance(values, pa.Array):
        nulls = nulls_of(values)
        if cql_type == "text":
            return values.cast(pa.binary()), nulls
        if cql_type == "boolean":
            values = values.fill_null(False).to_numpy(zero_copy_only=False)
        elif cql_type == "int":
            values = values.fill_null(0).to_numpy()
        else:
            values = micros(values)
    match cql_type:
        case "timestamp":
            data = fixed(values // 1000, ">i8")
        case "date":
            data = fixed(values + (1 << 31), ">u4")  # day 0 is the middle of the range
        case "smallint":
            data = fixed(values, ">i2")
        case "int":
            data = fixed(values, ">i4")
        case "boolean":
            data = fixed(values, ">u1")
        case _:  # bigint and double: their 64 bits
            data = fixed(values, ">i8")
    return data, nulls
