import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.seen import _SECRET, SeenTable


def ids_at(places):
    """Return the ids that this process's table takes for these numbers."""
    mixed = np.asarray(places, np.uint64)
    for turn, odd in enumerate(reversed(_SECRET)):
        if turn:
            mixed = mixed ^ (mixed >> np.uint64(32))
        mixed = mixed * np.uint64(pow(int(odd), -1, 1 << 64))
    return mixed


IDS = st.one_of(
    st.integers(0, 20),
    st.sampled_from(ids_at(range(1, 31)).tolist()),  # share their first slot
    # Share the last, and go round the end.
    st.sampled_from(ids_at([2**64 - 1 - i for i in range(30)]).tolist()),
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
    ids = ids_at(np.uint64(2**64 - 1) - np.arange(5000, dtype=np.uint64))
    for part in np.split(ids, 50):
        assert table.add(part).all()
    assert not table.add(ids).any()
    assert len(table) == 5000


def test_ids_made_to_share_high_or_low_bits_have_homes_apart():
    honest = np.random.default_rng(1).integers(1, 2**40, 8_000, np.uint64)
    for made in (honest | np.uint64(0xABCDEF << 40), honest << np.uint64(24), honest):
        table = SeenTable()
        assert table.add(made).all()
        assert longest_run(table) < 300  # what a new id is compared with; 8,000 of one home


def longest_run(table):
    free = np.flatnonzero(table._slots == 0)
    return int(np.diff(free, append=free[0] + len(table._slots)).max())  # round the end
