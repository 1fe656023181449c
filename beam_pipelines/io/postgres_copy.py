"""Rows as `COPY … FROM STDIN (FORMAT binary)` takes them, encoded column by column.

A header; for each row the number of its values (16 bits) and each value as its length
(32 bits, -1 where it is null) and bytes; a trailer. See "File Formats" of COPY in the manual of
Postgres, and the types' send functions for their bytes.
"""

import pyarrow as pa

from beam_pipelines.kernels.columns import micros
from beam_pipelines.kernels.wire import fixed, joined, laid_out, nulls_of, sized
from beam_pipelines.model.tables import Table

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)  # its signature, no flags, no more header
_TRAILER = b"\xff\xff"
_NULL = -1
_NUMBERS = {pa.int32(): ">i4", pa.int64(): ">i8", pa.float64(): ">f8"}
_EPOCH_US = 946_684_800_000_000  # 2000-01-01, in µs since 1970


def copied(rows: pa.Table, table: Table) -> bytes:
    """Return rows as COPY reads them, in the order of the table's columns.

    Args:
      rows: Columns of the table's schema, texts as such.
      table: Names the columns.
    """
    if len(rows) == 0:
        return _HEADER + _TRAILER
    parts: list[pa.Array | pa.Scalar] = [
        pa.scalar(len(table.schema).to_bytes(2), pa.binary()),
    ]
    for name in table.schema.names:
        values = rows[name].combine_chunks()
        parts += sized(_bytes_of(values), nulls_of(values), _NULL)
    encoded, starts = laid_out(joined(parts))
    return b"".join((_HEADER, encoded[starts[0] : starts[-1]], _TRAILER))


def _bytes_of(values: pa.Array) -> pa.Array:
    type_ = values.type
    if pa.types.is_string(type_):
        return values.cast(pa.binary())
    if pa.types.is_timestamp(type_):
        return fixed(micros(values) - _EPOCH_US, ">i8")
    if pa.types.is_boolean(type_):
        return fixed(values.fill_null(False).to_numpy(zero_copy_only=False), ">u1")
    if values.null_count:
        values = values.fill_null(0)
    return fixed(values.to_numpy(), _NUMBERS[type_])
