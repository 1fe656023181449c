import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.seen import SeenTable

IDS = st.one_of(
    st.integers(0, 20),
    st.sampled_from([i << 20 for i in range(30)]),  # share their first slot
    st.integers(0, 2**64 - 1),
)


@given(st.lists(st.lists(IDS, max_size=50), max_size=8))
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
