"""A Kafka cluster that isn't one: what readers of it see, for tests that move its clock."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.window import TimestampedValue
from confluent_kafka import KafkaException

from beam_pipelines.io.kafka import source
from beam_pipelines.io.kafka.client import KafkaCluster, KafkaUnreachable, Topic
from beam_pipelines.io.kafka.fetch import Fetched
from beam_pipelines.io.kafka.positions import Positions, PositionsTracker
from beam_pipelines.model.span import Span

S = 1_000_000
NOON_S = 1_767_614_400
NOON = NOON_S * S
DISORDER_S = 120
DISORDER = DISORDER_S * S
RANGE = 100_000
CLUSTER = KafkaCluster("b:9092")

P0, P1, P2 = ("views", 0), ("views", 1), ("views", 2)


class Broker:
    """What readers see of a cluster: topics, offsets, its clock; and the worker's clocks."""

    def __init__(self):
        self.now_s = float(NOON_S)
        self.worker_ahead_s = 0.0
        self.monotonic_s = 1000.0
        self.reachable = True
        self.leaderless = set()
        self.topics = {"views": ("id-1", 2, "LogAppendTime")}
        self.begins = {}
        self.ends = {P0: 0, P1: 0}
        self.at_time = {}  # partition → the answer to a request by time
        self.newest_us = NOON  # of the records that other readers may have read
        self.looks = 0
        self.learnt = set()  # partitions that the client knows of
        self.asked = []  # -2: the first offsets, -1: the ends, else by this time in ms

    def go(self, seconds):
        self.now_s += seconds
        self.monotonic_s += seconds

    def worker_s(self):
        return self.now_s + self.worker_ahead_s

    def clocks(self):
        """Return what stands in for the module `time` of a reader."""
        return SimpleNamespace(monotonic=lambda: self.monotonic_s, sleep=self.go)

    def partitions(self):
        return {(name, n) for name, (_, count, _) in self.topics.items() for n in range(count)}

    def topic_partitions(self, cluster, names):
        self.looks += 1
        if not self.reachable:
            raise KafkaUnreachable("no Kafka broker answers")
        return {
            name: Topic(name, id_, tuple(range(partitions)), kind, -1)
            for name, (id_, partitions, kind) in self.topics.items()
            if name in names
        }


class FakeFetcher:
    def __init__(self, broker):
        self.broker = broker
        self.assigned = None
        self.coming = {}  # what the next fetch finds
        self.committed = []
        self.closed = False

    def assign(self, offsets, epochs):
        self.assigned, self.epochs = dict(offsets), dict(epochs)

    def fetch(self, wait_s):
        fetched, self.coming = self.coming, {}
        return fetched

    def ends(self, partitions):
        reachable = self.broker.reachable
        return {p: self.broker.ends.get(p, 0) if reachable else None for p in partitions}

    def newest_us(self, partitions):
        self.broker.asked.append(sorted(partitions))
        return self.broker.newest_us if self.broker.reachable else None

    def learn(self, topics):
        self.broker.learnt = {p for p in self.broker.partitions() if p[0] in topics}

    def list_offsets(self, partitions, spec):
        if {*partitions} - self.broker.learnt:
            raise KafkaException("no leaders found")  # though there may be, by now
        if self.broker.leaderless & {*partitions}:
            raise KafkaException("no leader")
        self.broker.asked.append(spec._value)
        known = {-2: self.broker.begins, -1: self.broker.ends}.get(spec._value, self.broker.at_time)
        return {p: known.get(p, 0) for p in partitions}

    def commit(self, offsets):
        self.committed.append(dict(offsets))

    def close(self):
        self.closed = True


class Reader:
    """A reader as a runner calls it: restriction and watermark are kept between calls."""

    def __init__(self, name="0/1/0", append_time="broker"):
        self.name = name
        self.fn = source._ReadFn(
            source.Subscription(
                CLUSTER, ("views",), DISORDER_S, "earliest", False, append_time, None
            )
        )
        self.positions = Positions()
        self.watermark = None

    def call(self):
        """Return what a call yields, plainly; what is left is for the next one."""
        return plain(self.elements())

    def elements(self):
        """Return what a call yields."""
        tracker = _Deferring(PositionsTracker(self.positions, bounded=False))
        estimator = ManualWatermarkEstimator(self.watermark)
        elements = list(self.fn.process(self.name, tracker, estimator))
        assert tracker.tracker.check_done()
        self.positions = tracker.rest
        self.watermark = estimator.get_estimator_state()
        return elements


class _Deferring:
    """What a runner wraps a tracker in."""

    def __init__(self, tracker):
        self.tracker, self.rest = tracker, None

    def __getattr__(self, name):
        return getattr(self.tracker, name)

    def defer_remainder(self):
        _, self.rest = self.tracker.try_split(0)


def records(first, *times_s, next_=None, log_append_time=True, offsets=None, leader_epoch=None):
    """Return what came of a partition: a record per time, in seconds after noon."""
    offsets = range(first, first + len(times_s)) if offsets is None else offsets
    offsets = np.array(offsets, np.int64)
    return Fetched(
        values=pa.array([b"%d" % offset for offset in offsets], pa.binary()),
        offsets=offsets,
        times_ms=np.array([(NOON_S + t) * 1000 for t in times_s], np.int64),
        log_append_time=log_append_time,
        next=int(offsets[-1]) + 1 if next_ is None else next_,
        leader_epoch=leader_epoch,
    )


def plain(elements):
    """Return (span, offsets, append times in s after noon, stamp in s after noon)."""
    rows = []
    for element in elements:
        stamp = None
        if isinstance(element, TimestampedValue):
            stamp, element = element.timestamp.micros / S - NOON_S, element.value
        span, batch = element
        times = batch["append_time"].cast(pa.int64()).to_pylist()
        times = [None if t is None else t / S - NOON_S for t in times]
        rows.append((span, batch["offset"].to_pylist(), times, stamp))
    return rows


def span(start, end, last=False, range_start=0, range_end=RANGE, partition=0, open=False):
    return Span("views", partition, range_start, range_end, start, end, last, open)
