import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.columns import (
    divided,
    hashes_of,
    in_pieces,
    micros,
    row_bytes,
    shards_of,
    timestamps,
)
from beam_pipelines.kernels.counts import counts_per_slice


@given(st.lists(st.one_of(st.integers(-3, 3), st.integers(-(2**40), 2**40)), max_size=50))
def test_divided_rows_keep_their_order(keys):
    rows = pa.record_batch({"row": pa.array(range(len(keys)), pa.int64())})
    parts = {k: p["row"].to_pylist() for k, p in divided(rows, np.array(keys, np.int64))}
    assert list(parts) == sorted(set(keys))
    assert parts == {k: [i for i, key in enumerate(keys) if key == k] for k in set(keys)}


def test_views_respect_slices_and_all_null_columns():
    column = timestamps(np.arange(5))
    assert micros(column.slice(2, 2)).tolist() == [2, 3]
    assert len(micros(pa.nulls(3, pa.timestamp("us", tz="UTC")))) == 3


def test_a_hash_column_is_its_own_hash():
    assert hashes_of(pa.array([7, 2**64 - 1], pa.uint64())).tolist() == [7, 2**64 - 1]
    assert hashes_of(pa.array([12])).tolist() == hashes_of(pa.array(["12"])).tolist()


def test_shards_take_other_bits_than_tables():
    ids = np.arange(1000, dtype=np.uint64)
    assert np.bincount(shards_of(ids, 4).astype(int)).tolist() == [250] * 4


@given(st.lists(st.tuples(st.integers(-300, 300), st.sampled_from("abc")), max_size=40))
def test_counts_agree_with_counting_one_by_one(rows):
    counts = counts_per_slice(
        np.array([t for t, _ in rows], np.int64) // 60,
        pa.array([v for _, v in rows], pa.string()),
    )
    expected: dict = {}
    for t, v in rows:
        expected[t // 60, v] = expected.get((t // 60, v), 0) + 1
    assert {(r["slice"], r["value"]): r["count"] for r in counts.to_pylist()} == expected


def test_pieces_hold_as_many_rows_as_the_limit_takes_and_one_that_is_larger():
    texts = ["a" * 10, None, "", "é" * 40, "b" * 300, "c", "d"]
    rows = pa.record_batch(
        {
            "text": texts,
            "number": pa.array(range(7), pa.int64()),
            "one_of": pa.array(["x"] * 7).dictionary_encode(),
            "flag": pa.array([True] * 7),
        }
    )
    sizes = [10, 0, 0, 80, 300, 1, 1]
    per_row = 4 + 8 + 4 + 1  # offset, number, index, flag
    assert row_bytes(rows).tolist() == [size + per_row for size in sizes]
    assert row_bytes(rows.slice(3, 2)).tolist() == [80 + per_row, 300 + per_row]
    pieces = list(in_pieces(rows, 100))
    assert [len(piece) for piece in pieces] == [3, 1, 1, 2]
    assert pa.Table.from_batches(pieces).to_pylist() == rows.to_pylist()
    assert [len(piece) for piece in in_pieces(rows.slice(4), 1)] == [1, 1, 1]
    assert list(in_pieces(rows, 1 << 20)) == [rows]
