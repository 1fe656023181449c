import pytest
from apache_beam.runners.worker import statecache
from apache_beam.runners.worker.statecache import StateCache

from beam_pipelines.io.lake.tail import Progress
from beam_pipelines.transforms.state_cache import weigh_cheaply

VALUES = [
    b"a token",
    1_767_603_600_000_000,
    [b"page" * 100, b"another page", b""],
    [],
    [Progress(0, 1_000_000, True, False)],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_state_weighs_what_it_does_for_beam(monkeypatch, value):
    monkeypatch.setattr(statecache, "get_deep_size", statecache.get_deep_size)  # put back later
    expected = statecache.get_deep_size(value)
    weigh_cheaply()
    assert statecache.get_deep_size.__module__ == weigh_cheaply.__module__
    assert statecache.get_deep_size(value) == expected


def test_the_cache_weighs_by_it_and_no_module_is_looked_at(monkeypatch):
    monkeypatch.setattr(statecache, "get_deep_size", statecache.get_deep_size)
    weigh_cheaply()
    monkeypatch.setattr(
        "objsize.traverse._iter_modules_globals", lambda: pytest.fail("modules are listed")
    )
    cache = StateCache(1 << 20)
    for value in VALUES:
        cache.put("key", value)
        assert cache.peek("key") == value
