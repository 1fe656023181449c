import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.seen import SeenTable

IDS = st.one_of(
    st.integers(0, 20),
    st.sampled_from([i + 1 for i in range(30)]),  # share their first slot
    st.sampled_from([2**64 - 1 - i for i in range(30)]),  # share the last, and go round the end
    st.integers(0, 2**64 - 1),
)


@given(st.lists(st.lists(IDS, max_size=50), max_size=40))
def test_first_sights_are_those_of_a_set(batches):
    table, seen = SeenTable(), set()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in seen)
            seen.add(value)
        assert table.add(np.array(batch, np.uint64)).tolist() == expected
        assert len(table) == len(seen)


def test_a_table_that_grows_forgets_nothing():
    table = SeenTable()
    ids = np.random.default_rng(1).integers(0, 2**63, 50_000).astype(np.uint64)
    for part in np.split(ids, 25):
        assert table.add(part).all()
    assert table.nbytes == 12 << 17
    assert not table.add(ids[::-1]).any()
    assert len(table) == len(ids)


def test_ids_whose_homes_lie_at_the_end_survive_growth():
    table = SeenTable()
    ids = np.uint64(2**64 - 1) - np.arange(5000, dtype=np.uint64)
    for part in np.split(ids, 50):
        assert table.add(part).all()
    assert not table.add(ids).any()
    assert len(table) == 5000
