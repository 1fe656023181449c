import gc

import pytest
from apache_beam.runners.worker import statecache
from apache_beam.runners.worker.statecache import StateCache

from beam_pipelines.io.lake.tail import Progress
from beam_pipelines.transforms.worker import YOUNG_OBJECTS, tune_worker

VALUES = [
    b"a token",
    1_767_603_600_000_000,
    [b"page" * 100, b"another page", b""],
    [],
    [Progress(0, 1_000_000, True, False)],
]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(statecache, "get_deep_size", statecache.get_deep_size)  # put back later
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)


def test_the_collector_waits_for_more_objects():
    tune_worker()
    tune_worker()
    assert gc.get_threshold() == (YOUNG_OBJECTS, 10, 10)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_state_weighs_what_it_does_for_beam(value):
    expected = statecache.get_deep_size(value)
    tune_worker()
    assert statecache.get_deep_size.__module__ == tune_worker.__module__
    assert statecache.get_deep_size(value) == expected


def test_the_cache_weighs_by_it_and_no_module_is_looked_at(monkeypatch):
    tune_worker()
    monkeypatch.setattr(
        "objsize.traverse._iter_modules_globals", lambda: pytest.fail("modules are listed")
    )
    cache = StateCache(1 << 20)
    for value in VALUES:
        cache.put("key", value)
        assert cache.peek("key") == value
