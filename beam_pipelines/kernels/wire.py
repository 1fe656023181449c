"""Columns as the values of a row in a database's protocol: each its length, then its bytes.

Postgres (COPY in its binary format) and Cassandra (the values of a statement) have them alike:
lengths are 32 bits, a negative one stands for a value that isn't there, and all numbers are in
network byte order.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NOTHING = pa.scalar(b"", pa.binary())


def fixed(values: np.ndarray, wire_type: str) -> pa.Array:
    """Return numbers as their bytes, in numpy's `wire_type`, e.g. `>i8`."""
    wire = values.astype(wire_type)
    data = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(wire.itemsize), len(wire), [None, pa.py_buffer(wire)]
    )
    return data.cast(pa.binary())


def nulls_of(values: pa.Array) -> np.ndarray | None:
    """Return which values are null; None: none is."""
    return values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None


def sized(data: pa.Array, nulls: np.ndarray | None, null_length: int) -> list[pa.Array]:
    """Return the lengths that go before values, and the values.

    Args:
      data: The bytes of each value.
      nulls: Which of them are null; None: none is.
      null_length: The length that says so.
    """
    lengths = pc.binary_length(data).fill_null(0).to_numpy()
    if nulls is None:
        return [fixed(lengths, ">i4"), data]
    kept = pc.if_else(pa.array(nulls), _NOTHING, data)
    return [fixed(np.where(nulls, null_length, lengths), ">i4"), kept]


def joined(parts: Iterable[pa.Array | pa.Scalar]) -> pa.Array:
    """Join the parts of each row; one of them at least is no scalar."""
    return pc.binary_join_element_wise(*parts, _NOTHING)


def laid_out(rows: pa.Array) -> tuple[memoryview, np.ndarray]:
    """Return the bytes of rows one after the other, without a copy.

    Returns:
      The bytes, and where each row starts, and the last one ends; the first start need not be 0.
    """
    starts = np.frombuffer(rows.buffers()[1], np.int32)[rows.offset :][: len(rows) + 1]
    return memoryview(rows.buffers()[2] or b""), starts
