"""The journal's promise: the cached table is used only if it matches the state."""

import pytest

from beam_pipelines.transforms import journal
from beam_pipelines.transforms.journal import Journal


class Bag:
    """A bag state whose changes are committed or dropped with the bundle."""

    def __init__(self):
        self.committed, self.now, self.reads = [], [], 0

    def read(self):
        self.reads += 1
        return list(self.now)

    def add(self, page):
        self.now.append(page)

    def clear(self):
        self.now = []


class Value:
    def __init__(self):
        self.committed = self.now = None

    def read(self):
        return self.now

    def write(self, value):
        self.now = value

    def clear(self):
        self.now = None


class State:
    """State of one key as the runner holds it."""

    def __init__(self):
        self.pages, self.token = Bag(), Value()

    def commit(self):
        self.pages.committed, self.token.committed = list(self.pages.now), self.token.now

    def roll_back(self):
        self.pages.now, self.token.now = list(self.pages.committed), self.token.committed


class Ids(set):
    nbytes = 100


@pytest.fixture(autouse=True)
def cold_cache(monkeypatch):
    monkeypatch.setattr(journal, "_CACHE", journal._Cache(limit_bytes=1000))


def worker(stage="stage"):
    made = Journal(stage, lambda pages: Ids(pages))
    made.start_bundle()
    return made


def sight(journal_, key, state, page):
    """Add a page unless seen; returns whether it is new."""
    table = journal_.table(key, (state.pages,), state.token)
    if page in table:
        return False
    table.add(page)
    journal_.append(key, page, (state.pages,), state.token)
    return True


def bundle(journal_, state, *pages, key="k", commit=True):
    journal_.start_bundle()
    sights = [sight(journal_, key, state, page) for page in pages]
    journal_.finish_bundle()
    state.commit() if commit else state.roll_back()
    return sights


def test_a_table_is_kept_between_bundles():
    here, state = worker(), State()
    assert bundle(here, state, b"a", b"a") == [True, False]
    assert bundle(here, state, b"a", b"b") == [False, True]
    assert state.pages.reads == 0


def test_a_cold_cache_derives_the_table_from_the_pages():
    state = State()
    bundle(worker(), state, b"a")
    journal._CACHE = journal._Cache(limit_bytes=1000)
    assert bundle(worker(), state, b"a", b"b") == [False, True]
    assert state.pages.reads == 1


def test_the_table_of_a_bundle_that_was_not_committed_is_not_trusted():
    here, state = worker(), State()
    bundle(here, state, b"a")
    assert bundle(here, state, b"b", commit=False) == [True]
    assert bundle(here, state, b"a", b"b") == [False, True]  # the retry must see b as new
    assert state.pages.reads == 1


def test_the_table_of_a_bundle_that_broke_off_is_not_trusted():
    here, state = worker(), State()
    bundle(here, state, b"a")
    here.start_bundle()
    sight(here, "k", state, b"b")  # then the bundle fails: no finish_bundle
    state.roll_back()
    assert bundle(here, state, b"b") == [True]


def test_a_bundle_after_one_that_broke_off_draws_a_token_of_its_own():
    here, state = worker(), State()
    bundle(here, state, b"a")
    here.start_bundle()
    sight(here, "k", state, b"b")  # then the bundle fails: no finish_bundle
    state.roll_back()
    bundle(here, state, b"b", commit=False)  # the retry fails, too
    assert bundle(here, state, b"b") == [True]


def test_two_attempts_at_one_bundle_do_not_share_a_token():
    here, state = worker(), State()
    bundle(here, state, b"a", commit=False)
    bundle(here, state, b"b")  # same number of changes, another content
    elsewhere = Journal("stage", lambda pages: Ids(pages))
    assert bundle(elsewhere, state, b"a", b"b") == [True, False]


def test_a_key_that_moved_away_and_back_is_derived_again(monkeypatch):
    here, state = worker(), State()
    bundle(here, state, b"a")
    stale = journal._CACHE
    monkeypatch.setattr(journal, "_CACHE", journal._Cache(limit_bytes=1000))
    bundle(worker(), state, b"b")  # another process
    monkeypatch.setattr(journal, "_CACHE", stale)
    assert bundle(here, state, b"a", b"b") == [False, False]


def test_a_cleared_journal_starts_anew():
    here, state = worker(), State()
    bundle(here, state, b"a")
    here.start_bundle()
    here.clear("k", (state.pages,), state.token)
    here.finish_bundle()
    state.commit()
    assert bundle(here, state, b"a") == [True]
    assert state.pages.now == [b"a"]


def test_a_cleared_journal_takes_no_memory():
    here, state = worker(), State()
    bundle(here, state, b"a")
    assert journal._CACHE._bytes == Ids.nbytes
    here.start_bundle()
    here.clear("k", (state.pages,), state.token)
    here.finish_bundle()
    assert journal._CACHE._bytes == 0


def test_keys_and_stages_are_kept_apart():
    state, other = State(), State()
    bundle(worker(), state, b"a", key="k")
    assert bundle(worker(), other, b"a", key="l") == [True]
    assert bundle(worker("other stage"), State(), b"a", key="k") == [True]


def test_the_cache_is_bounded_and_the_least_recently_used_go_first():
    here, states = worker(), [State() for _ in range(12)]
    for number, state in enumerate(states):
        bundle(here, state, b"a", key=number)
    bundle(here, states[11], b"a", key=11)
    assert states[11].pages.reads == 0
    assert bundle(here, states[0], b"a", key=0) == [False]  # slower, not wrong
    assert states[0].pages.reads == 1


def test_pages_are_spread_over_the_bags_and_read_from_all_of_them():
    bags, token = [Bag() for _ in range(3)], Value()
    here = worker()
    for number in range(40):
        here.start_bundle()
        here.table("k", bags, token).add(b"%d" % number)
        here.append("k", b"%d" % number, bags, token)
        here.append("k", b"more", bags, token)
        here.finish_bundle()
    assert all(bag.now for bag in bags)
    elsewhere = worker("moved")
    assert elsewhere.table("k", bags, token) == {b"%d" % number for number in range(40)} | {b"more"}

    here.clear("k", bags, token)
    assert not any(bag.now for bag in bags)
