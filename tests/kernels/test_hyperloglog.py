import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels import hyperloglog as hll

MANY = 2**62


def dense(hashes):
    sketch = np.zeros(hll.REGISTERS, np.uint8)
    sketches = hll.sketches(np.zeros(len(hashes), np.int64), hashes)
    hll.merge(sketch, sketches.register, sketches.rank)
    return sketch


def naive_sketch(hashes):
    sketch = [0] * 4096
    for h in hashes:
        bits = f"{h:064b}"
        rest = bits[12:]
        rank = len(rest) - len(rest.lstrip("0")) + 1
        register = int(bits[:12], 2)
        sketch[register] = max(sketch[register], rank)
    return sketch


@given(st.lists(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 300)), max_size=100))
def test_registers_follow_the_rule(hashes):
    assert dense(np.array(hashes, np.uint64)).tolist() == naive_sketch(hashes)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=60))
def test_groups_are_sketched_apart(rows):
    groups = np.array([g for g, _ in rows], np.int64)
    hashes = np.array([h for _, h in rows], np.uint64)
    sketches = hll.sketches(groups, hashes)
    assert sketches.group.tolist() == sorted(set(groups.tolist()))
    assert len(sketches.starts) == len(sketches.group) + 1
    for i, g in enumerate(sketches.group.tolist()):
        assert sketches.rows[i] == (groups == g).sum()
        registers = slice(sketches.starts[i], sketches.starts[i + 1])
        register = sketches.register[registers]
        assert register.tolist() == sorted(set(register.tolist()))
        sketch = np.zeros(hll.REGISTERS, np.uint8)
        hll.merge(sketch, register, sketches.rank[registers])
        assert sketch.tolist() == naive_sketch(hashes[groups == g].tolist())


@pytest.mark.parametrize("distinct", [1, 10, 1_000, 10_000, 20_000, 100_000, 1_000_000])
def test_estimates_lie_within_their_error(distinct):
    errors = []
    for seed in range(5):
        hashes = np.random.default_rng(seed).integers(0, 2**64 - 1, distinct, np.uint64)
        errors.append(hll.estimate(dense(hashes), MANY) / distinct - 1)
    assert max(map(abs, errors)) < 3.5 * 0.01625 + 0.5 / distinct


def test_an_empty_sketch_counts_nothing():
    assert hll.estimate(np.zeros(hll.REGISTERS, np.uint8), 0) == 0.0


@pytest.mark.parametrize("made", [4_000, 4_095, 4_096])
def test_made_hashes_raise_no_estimate_above_the_number_of_rows(made):
    hashes = np.random.default_rng(1).integers(0, 2**64 - 1, 100_000, np.uint64)
    top = np.arange(made, dtype=np.uint64) << np.uint64(52)  # register i, rank 53
    estimate = hll.estimate(dense(np.concatenate([hashes, top])), 100_000 + made)
    assert estimate == 100_000 + made


@given(st.lists(st.integers(0, 53), min_size=1, max_size=60), st.integers(1, MANY))
def test_an_estimate_is_finite_and_never_falls_when_rows_are_added(ranks, rows):
    sketch = np.resize(np.array(ranks, np.uint8), hll.REGISTERS)
    estimate = hll.estimate(sketch, rows)
    assert 0 <= estimate <= rows
    assert hll.estimate(sketch, rows + 1) >= estimate


@given(
    st.lists(st.integers(0, 53), min_size=1, max_size=60),
    st.integers(0, 4095),
    st.integers(0, 53),
)
def test_the_estimate_never_falls_when_a_register_rises(ranks, register, rank):
    sketch = np.resize(np.array(ranks, np.uint8), hll.REGISTERS)
    before = hll.estimate(sketch, MANY)
    hll.merge(sketch, np.array([register], np.uint16), np.array([rank], np.uint8))
    assert hll.estimate(sketch, MANY) >= before


def test_the_estimate_never_falls_while_values_come():
    sketch, before = np.zeros(hll.REGISTERS, np.uint8), 0.0
    values = np.random.default_rng(7).integers(0, 2**64 - 1, 40_000, np.uint64)
    for part in np.split(values, 400):
        sketches = hll.sketches(np.zeros(len(part), np.int64), part)
        hll.merge(sketch, sketches.register, sketches.rank)
        estimate = hll.estimate(sketch, MANY)
        assert estimate >= before
        before = estimate
