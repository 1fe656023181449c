"""Length-prefixed values, against a naive reference over generated columns."""

import struct

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.wire import fixed, joined, laid_out, nulls_of, sized


def naive(value, null_length):
    return (
        struct.pack(">i", null_length) if value is None else struct.pack(">i", len(value)) + value
    )


ROWS = st.lists(
    st.tuples(st.none() | st.binary(max_size=5), st.integers(-(2**63), 2**63 - 1)), min_size=1
)


@given(ROWS, st.integers(-9, -1), st.data())
def test_values_have_their_lengths_before_them(rows, null_length, data):
    texts = pa.array([text for text, _ in rows], pa.binary())
    numbers = fixed(np.array([number for _, number in rows], np.int64), ">i8")
    head = pa.scalar(b"head", pa.binary())
    row = joined(
        [
            head,
            *sized(texts, nulls_of(texts), null_length),
            *sized(numbers, nulls_of(numbers), null_length),
        ]
    )
    expected = [
        b"head" + naive(text, null_length) + naive(struct.pack(">q", number), null_length)
        for text, number in rows
    ]
    assert row.to_pylist() == expected
    first = data.draw(st.integers(0, len(rows)))
    encoded, starts = laid_out(row.slice(first))
    assert len(starts) == len(rows) - first + 1
    assert bytes(encoded[starts[0] : starts[-1]]) == b"".join(expected[first:])


def test_numbers_are_in_network_byte_order():
    assert fixed(np.array([1, -2]), ">i2").to_pylist() == [b"\x00\x01", b"\xff\xfe"]
    assert fixed(np.array([1.5]), ">f8").to_pylist() == [struct.pack(">d", 1.5)]
    assert fixed(np.array([True, False]), ">u1").to_pylist() == [b"\x01", b"\x00"]
