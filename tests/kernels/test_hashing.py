import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beam_pipelines.kernels.hashing import hash_strings, hash_with

M, MASK = 0xC6A4A7935BD1E995, (1 << 64) - 1


def naive_murmur64a(data, seed=0):
    """MurmurHash64A, as published."""
    h = (seed ^ (len(data) * M)) & MASK
    whole = len(data) & ~7
    for i in range(0, whole, 8):
        k = int.from_bytes(data[i : i + 8], "little") * M & MASK
        k = (k ^ (k >> 47)) * M & MASK
        h = (h ^ k) * M & MASK
    if len(data) & 7:
        h = (h ^ int.from_bytes(data[whole:], "little")) * M & MASK
    h = (h ^ (h >> 47)) * M & MASK
    return h ^ (h >> 47)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"", 0x0), (b"/pricing", 0x41D0128AE0E62EFD), (b"hello, world", 0x9659AD0699A8465F)],
)
def test_known_values_never_change(text, expected):
    assert naive_murmur64a(text) == expected
    assert hash_strings(pa.array([text])).tolist() == [expected]


@given(st.lists(st.binary(max_size=40), max_size=60))
@example([b"x" * 5000, b"", b"y" * 7])
@example([b"1234567"])
@example([b"abcdefgh"] * 40 + [b"z" * 41])
def test_columns_hash_like_single_values(values):
    column = pa.array(values, pa.binary())
    expected = [naive_murmur64a(value) for value in values]
    assert hash_strings(column).tolist() == expected
    assert hash_strings(column.slice(1)).tolist() == expected[1:]


def test_nulls_hash_like_the_empty_string():
    assert hash_strings(pa.array([None, "a", None])).tolist()[::2] == [0, 0]


@given(st.lists(st.tuples(st.integers(0, MASK), st.integers(-(2**63), 2**63 - 1)), max_size=20))
def test_an_extended_hash_depends_on_both_parts(pairs):
    def naive(h, value):
        k = (value & MASK) * M & MASK
        k = (k ^ (k >> 47)) * M & MASK
        h = (h ^ k) * M & MASK
        h = (h ^ (h >> 47)) * M & MASK
        return h ^ (h >> 47)

    hashes = np.array([h for h, _ in pairs], np.uint64)
    values = np.array([v for _, v in pairs], np.int64)
    assert hash_with(hashes, values).tolist() == [naive(h, v) for h, v in pairs]
