"""Columns as NumPy arrays, and rows divided by key."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.kernels.hashing import hash_strings
from beam_pipelines.model.records import TIMESTAMP


def micros(column: pa.Array) -> np.ndarray:
    """View a timestamp[us] or int64 array as int64, without a copy; nulls hold any value."""
    data = column.buffers()[1]
    if data is None:
        return np.zeros(len(column), np.int64)
    return np.frombuffer(data, np.int64)[column.offset : column.offset + len(column)]


def hashes(column: pa.Array) -> np.ndarray:
    """View a uint64 array, without a copy."""
    return micros(column).view(np.uint64)


def hashes_of(column: pa.Array) -> np.ndarray:
    """Return a uint64 hash of each value: of its text, or the value if it is a hash itself."""
    if pa.types.is_uint64(column.type):
        return hashes(column)
    return hash_strings(texts_of(column))


def texts_of(column: pa.Array) -> pa.Array:
    """Return a column of texts or bytes as it is, and any other as its values' texts."""
    if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        return column
    return column.cast(pa.string())


def timestamps(values: np.ndarray) -> pa.Array:
    """Make a timestamp[us, UTC] array from int64 µs."""
    return pa.array(values, pa.int64()).view(TIMESTAMP)


def shards_of(values: np.ndarray, shards: int) -> np.ndarray:
    """Choose a shard for each hash from its low bits; tables and sketches use the high ones."""
    return (values & np.uint64(0xFFFF)) % np.uint64(shards)


def row_bytes(rows: pa.RecordBatch) -> np.ndarray:
    """Return how many bytes each row takes in its columns: a function of its values alone."""
    sizes = np.zeros(len(rows), np.int64)
    for column in rows.columns:
        if pa.types.is_dictionary(column.type):
            column = column.indices
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            sizes += pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False)
            sizes += 4
        else:
            sizes += max(column.type.bit_width // 8, 1)
    return sizes


def in_pieces(rows: pa.RecordBatch, limit_bytes: int) -> Iterator[pa.RecordBatch]:
    """Cut rows into pieces of so many bytes at most, or of one row that is larger."""
    if rows.nbytes <= limit_bytes:
        yield rows
        return
    ends = np.cumsum(row_bytes(rows))
    start, before = 0, 0
    while start < len(rows):
        end = max(int(np.searchsorted(ends, before + limit_bytes, side="right")), start + 1)
        yield rows.slice(start, end - start)
        start, before = end, int(ends[end - 1])


def divided(rows: pa.RecordBatch, keys: np.ndarray) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Divide rows by an integer key, keeping their order within each.

    Args:
      rows: Any batch.
      keys: Integers, one per row.

    Yields:
      (key, its rows), by ascending key.
    """
    if len(keys) == 0:
        return
    low, high = keys.min(), keys.max()
    if low == high:
        yield int(low), rows
        return
    # A stable sort of 16 bits is a radix sort; of 64 bits it is ten times slower.
    narrow = (keys - low).astype(np.uint16) if high - low < 1 << 16 else keys
    order = np.argsort(narrow, kind="stable")
    keys = keys[order]
    starts = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [len(keys)]])
    taken = rows.take(pa.array(order))
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield int(keys[start]), taken.slice(start, end - start)
