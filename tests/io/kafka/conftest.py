"""The cluster of tests that need none."""

from types import SimpleNamespace

import pytest

from beam_pipelines.io.kafka import reading
from tests.io.kafka.broker import Broker


@pytest.fixture
def broker(monkeypatch):
    broker = Broker()
    monkeypatch.setattr(reading, "topic_partitions", broker.topic_partitions)
    clock = SimpleNamespace(monotonic=lambda: broker.monotonic_s, sleep=broker.go)
    monkeypatch.setattr(reading, "time", clock)
    return broker
