import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels import hyperloglog as hll


def dense(hashes):
    sketch = np.zeros(hll.REGISTERS, np.uint8)
    _, register, rank = hll.sketches(np.zeros(len(hashes), np.int64), hashes)
    hll.merge(sketch, register, rank)
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
    group, register, rank = hll.sketches(groups, hashes)
    assert sorted(zip(group.tolist(), register.tolist(), strict=True)) == list(
        zip(group.tolist(), register.tolist(), strict=True)
    )
    for g in set(groups.tolist()):
        sketch = np.zeros(hll.REGISTERS, np.uint8)
        hll.merge(sketch, register[group == g], rank[group == g])
        assert sketch.tolist() == naive_sketch(hashes[groups == g].tolist())


@pytest.mark.parametrize("distinct", [1, 10, 1_000, 10_000, 20_000, 100_000, 1_000_000])
def test_estimates_lie_within_their_error(distinct):
    errors = []
    for seed in range(5):
        hashes = np.random.default_rng(seed).integers(0, 2**64 - 1, distinct, np.uint64)
        errors.append(hll.estimate(dense(hashes)) / distinct - 1)
    assert max(map(abs, errors)) < 3.5 * 0.01625 + 0.5 / distinct


def test_an_empty_sketch_counts_nothing():
    assert hll.estimate(np.zeros(hll.REGISTERS, np.uint8)) == 0.0


@given(
    st.lists(st.integers(0, 53), min_size=1, max_size=60),
    st.integers(0, 4095),
    st.integers(0, 53),
)
def test_the_estimate_never_falls_when_a_register_rises(ranks, register, rank):
    sketch = np.resize(np.array(ranks, np.uint8), hll.REGISTERS)
    before = hll.estimate(sketch)
    hll.merge(sketch, np.array([register], np.uint16), np.array([rank], np.uint8))
    assert hll.estimate(sketch) >= before


def test_the_estimate_never_falls_while_values_come():
    sketch, before = np.zeros(hll.REGISTERS, np.uint8), 0.0
    values = np.random.default_rng(7).integers(0, 2**64 - 1, 40_000, np.uint64)
    for part in np.split(values, 400):
        _, register, rank = hll.sketches(np.zeros(len(part), np.int64), part)
        hll.merge(sketch, register, rank)
        estimate = hll.estimate(sketch)
        assert estimate >= before
        before = estimate
