"""A Kafka cluster that isn't one: what readers of it see, for tests that move its clock."""

import numpy as np
import pyarrow as pa
from apache_beam.transforms.window import TimestampedValue
from confluent_kafka import KafkaException

from beam_pipelines.io.kafka.client import KafkaUnreachable, Topic
from beam_pipelines.io.kafka.fetch import Fetched
from beam_pipelines.model.span import Span

S = 1_000_000
NOON_S = 1_767_614_400
NOON = NOON_S * S
DISORDER_S = 120
DISORDER = DISORDER_S * S
RANGE = 100_000

P0, P1, P2 = ("views", 0), ("views", 1), ("views", 2)


class Broker:
    """What readers see of a cluster: topics, offsets, and a clock that they share."""

    def __init__(self):
        self.now_s = float(NOON_S)
        self.monotonic_s = 1000.0
        self.reachable = True
        self.leaderless = set()
        self.topics = {"views": ("id-1", 2, "LogAppendTime")}
        self.begins = {}
        self.ends = {P0: 0, P1: 0}
        self.at_time = {}  # partition → the answer to a request by time
        self.looks = 0
        self.learnt = set()  # partitions that the client knows of
        self.asked = []  # -2: the first offsets, -1: the ends, else by this time in ms

    def go(self, seconds):
        self.now_s += seconds
        self.monotonic_s += seconds

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

    def assign(self, offsets):
        self.assigned = dict(offsets)

    def fetch(self, wait_s):
        fetched, self.coming = self.coming, {}
        return fetched

    def ends(self, partitions):
        reachable = self.broker.reachable
        return {p: self.broker.ends.get(p, 0) if reachable else None for p in partitions}

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


def records(first, *times_s, next_=None, log_append_time=True, offsets=None):
    """Return what came of a partition: a record per time, in seconds after noon."""
    offsets = range(first, first + len(times_s)) if offsets is None else offsets
    offsets = np.array(offsets, np.int64)
    return Fetched(
        values=pa.array([b"%d" % offset for offset in offsets], pa.binary()),
        offsets=offsets,
        times_ms=np.array([(NOON_S + t) * 1000 for t in times_s], np.int64),
        log_append_time=log_append_time,
        next=int(offsets[-1]) + 1 if next_ is None else next_,
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


def span(start, end, last=False, range_start=0, range_end=RANGE, partition=0):
    return Span("views", partition, range_start, range_end, start, end, last)
