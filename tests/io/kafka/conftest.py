"""The cluster of tests that need none."""

import pytest

from beam_pipelines.io.kafka import reading
from tests.io.kafka.broker import Broker


@pytest.fixture
def broker(monkeypatch):
    broker = Broker()
    monkeypatch.setattr(reading, "topic_partitions", broker.topic_partitions)
    monkeypatch.setattr(reading, "time", broker.clocks())
    return broker
