"""A topic with a history, and a job that reads it: whatever clocks, leaders and workers do."""

from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import KafkaException

from beam_pipelines.io.kafka import reading, source
from beam_pipelines.io.kafka.client import KafkaUnreachable
from beam_pipelines.io.kafka.fetch import Fetched
from beam_pipelines.io.kafka.reading import OpenReadings, Reading
from beam_pipelines.kernels.columns import micros
from tests.io.kafka.broker import Broker, FakeFetcher, Reader

PARTITIONS = 4


class Topic(Broker):
    """A topic that producers write to, each partition with a leader of its own clock."""

    def __init__(self):
        super().__init__()
        self.stored = {("views", n): [] for n in range(PARTITIONS)}  # (append time in ms, value)
        self.ahead_s = dict.fromkeys(self.stored, 0)  # of the leaders' clocks

    @property
    def ends(self):
        return {partition: len(times) for partition, times in self.stored.items()}

    @ends.setter
    def ends(self, _):
        pass

    @property
    def newest_us(self):
        there = self.partitions() - self.leaderless
        return max((ms * 1000 for p in there for ms, _ in self.stored[p]), default=None)

    @newest_us.setter
    def newest_us(self, _):
        pass

    def append(self, partition, value=b""):
        append_s = self.now_s + self.ahead_s[partition]
        self.stored[partition].append((round(append_s * 1000), value))


class LogFetcher(FakeFetcher):
    """Fetches what the topic holds of the partitions whose leaders are there."""

    def fetch(self, wait_s):
        fetched = {}
        for partition, first in self.assigned.items():
            stored = self.broker.stored[partition][first:]
            if stored and partition not in self.broker.leaderless:
                times_ms, values = zip(*stored, strict=True)
                fetched[partition] = Fetched(
                    pa.array(values, pa.binary()),
                    np.arange(first, first + len(stored)),
                    np.array(times_ms, np.int64),
                    True,
                    first + len(stored),
                )
        return fetched

    def ends(self, partitions):
        ends = super().ends(partitions)
        return {p: None if p in self.broker.leaderless else end for p, end in ends.items()}


class Job:
    """A job that reads the topic, and what it has read: (offset, judged time) by partition."""

    def __init__(self, topic, append_time="broker"):
        self.topic = topic
        self.reader = Reader(append_time=append_time)
        self.read = {partition: [] for partition in topic.stored}
        self.checkpoints = []

    def call(self):
        """Let the reader read once; yields (partition, watermark at that time, judged times)."""
        known, watermark = self.reader.positions, self.reader.watermark
        self.checkpoints.append((known, watermark, {p: [*rows] for p, rows in self.read.items()}))
        try:
            elements = self.reader.elements()
        except (KafkaUnreachable, KafkaException):  # the job starts again, and so on
            return []
        assert watermark is None or self.reader.watermark >= watermark
        told = []
        for element in elements:
            span, batch = element.value
            partition = span.topic, span.partition
            judged_us = micros(batch["append_time"])
            self.read[partition] += zip(batch["offset"].to_pylist(), judged_us, strict=True)
            told.append((partition, watermark, judged_us))
        return told

    def start_again(self, calls_lost):
        """Go back to a checkpoint: what was yielded since is forgotten."""
        source._OPEN = OpenReadings()
        lost = self.checkpoints[-min(calls_lost, len(self.checkpoints)) :]
        if lost:
            self.reader.positions, self.reader.watermark, self.read = lost[0]
            self.checkpoints = self.checkpoints[: -len(lost)]


@contextmanager
def job_on(topic, append_time="broker"):
    def opened(subscription, reader):
        return Reading(subscription, reader, lambda *_: LogFetcher(topic), topic.worker_s)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "topic_partitions", topic.topic_partitions)
        patched.setattr(reading, "time", topic.clocks())
        patched.setattr(source, "Reading", opened)
        patched.setattr(source, "_OPEN", OpenReadings())
        yield Job(topic, append_time)
