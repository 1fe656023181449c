"""Records of Kafka partitions as batches: one consumer, many partitions."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import confluent_kafka
import numpy as np
import pyarrow as pa
from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from beam_pipelines.io.kafka.client import KafkaCluster
from beam_pipelines.io.kafka.positions import Partition
from beam_pipelines.model.records import PAYLOADS, TIMESTAMP

_LOGGER = logging.getLogger(__name__)

SLICE_S, SLICE_S_PER_PARTITION = 0.1, 0.005
"""Seconds that records are gathered for, from the first one on: the reader's share of the
latency, and the pace of its self-checkpoints. What comes of one partition has its price, however
little it is: a reader of many gathers for longer."""

BEHIND_S, BEHIND_SLICE_S = 2.0, 1.0
"""Records that are this old (s) are gathered for longer: larger batches catch up faster."""

SLICE_ROWS, SLICE_BYTES = 200_000, 64 << 20
"""Where gathering ends before. On Flink a reader's bundle stays open for the runner's bundle time,
whatever it fetched: a slice that is gathered in less leaves the reader idle."""

_CHUNK = 500  # messages asked for at once; larger chunks are slower
_REQUEST_S = 10


class SourceError(RuntimeError):
    """Reading can't go on without losing or repeating records; the message says what to do."""


@dataclass(frozen=True)
class Fetched:
    """What came of one partition, in offset order.

    Args:
      values: binary; null: a tombstone.
      offsets: int64.
      times_ms: Timestamps of the records, int64, in ms since 1970.
      log_append_time: Whether the broker set all of these times.
      next: The offset after the last one.
      leader_epoch: Of the last record; None: not known.
    """

    values: pa.Array
    offsets: np.ndarray
    times_ms: np.ndarray
    log_append_time: bool
    next: int
    leader_epoch: int | None = None

    def payloads(self, append_us: np.ndarray | None) -> pa.RecordBatch:
        """Return a batch of PAYLOADS with these append times (µs); None: without any."""
        rows = len(self.offsets)
        times = pa.nulls(rows, TIMESTAMP) if append_us is None else pa.array(append_us, TIMESTAMP)
        return pa.RecordBatch.from_arrays(
            [self.values, pa.array(self.offsets), times], schema=PAYLOADS
        )


class Fetcher:
    """A consumer of given partitions from given offsets.

    Args:
      cluster: The brokers.
      group: Consumer group that `commit` commits to; None: none.
      consumer: Makes a client from its settings.
      admin: Makes an admin client from its settings.
    """

    def __init__(
        self,
        cluster: KafkaCluster,
        group: str | None,
        consumer: Callable[[dict[str, Any]], Any] = confluent_kafka.Consumer,
        admin: Callable[[dict[str, Any]], Any] = AdminClient,
    ) -> None:
        self.offsets: dict[Partition, int] = {}
        self._group = group
        self._admin = cluster.client(admin)
        self._consumer = cluster.client(
            consumer,
            **{
                # A group must be named, though none is joined.
                "group.id": group or "beam_pipelines",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,  # also passes what transactions leave behind
                "auto.offset.reset": "error",  # never skip
                # Of many partitions a few records are always there: brokers gather some.
                "fetch.min.bytes": 32 << 10,
                "fetch.wait.max.ms": 50,
                "fetch.message.max.bytes": 4 << 20,
                "queued.max.messages.kbytes": 64 << 10,
            },
        )

    def assign(
        self, offsets: Mapping[Partition, int], epochs: Mapping[Partition, int | None]
    ) -> None:
        """Read these partitions from these offsets on.

        Args:
          offsets: The next offset of each partition.
          epochs: The leader epoch of the record before, where it is known: the client then
            finds out whether the log was cut before the offset.
        """
        if offsets != self.offsets:
            known = {p: epoch for p, epoch in epochs.items() if epoch is not None}
            self._consumer.assign(
                [
                    TopicPartition(*p, offset, leader_epoch=known.get(p, -1))
                    for p, offset in offsets.items()
                ]
            )
            self.offsets = dict(offsets)

    def fetch(self, wait_s: float) -> dict[Partition, Fetched]:
        """Wait for a record, gather what comes in the next slice, and move on.

        Partitions of which nothing came are left out.

        Raises:
          SourceError: an offset is gone.
          KafkaException: access is denied.
        """
        deadline = time.monotonic() + wait_s
        gathered: defaultdict[Partition, _Gathered] = defaultdict(_Gathered)
        ends: dict[Partition, int] = {}
        rows = size = 0
        while (left_s := deadline - time.monotonic()) > 0:
            chunk = self._consumer.consume(_CHUNK if rows else 1, left_s)
            if any([message.error() for message in chunk]):  # a list is faster than a generator
                chunk = self._without_errors(chunk, ends)
            if chunk and not rows:
                behind = time.time() - chunk[0].timestamp()[1] / 1000 > BEHIND_S
                slice_s = SLICE_S + len(self.offsets) * SLICE_S_PER_PARTITION
                deadline = time.monotonic() + (BEHIND_SLICE_S if behind else slice_s)
            for partition, messages in groupby(chunk, _partition):  # they mostly come in runs
                gathered[partition].add(list(messages))
            rows += len(chunk)
            size += sum(map(len, chunk))
            if rows >= SLICE_ROWS or size >= SLICE_BYTES:
                break
        fetched = {partition: of.fetched() for partition, of in gathered.items()}
        for partition, end in ends.items():
            fetched[partition] = _up_to(fetched.get(partition), end)
        self.offsets.update((partition, of.next) for partition, of in fetched.items())
        return fetched

    def ends(self, partitions: Collection[Partition]) -> dict[Partition, int | None]:
        """Ask for the end offsets; None where there is no answer."""
        try:
            return {**self.list_offsets(partitions, OffsetSpec.latest(), request_s=1)}
        except KafkaException as error:
            _LOGGER.warning("no end offsets: %s", error)
            return dict.fromkeys(partitions)

    def list_offsets(
        self, partitions: Collection[Partition], spec: Any, request_s: float = _REQUEST_S
    ) -> dict[Partition, int]:
        """Ask for offsets by an OffsetSpec.

        Raises:
          KafkaException: there was no answer.
        """
        asked = {TopicPartition(*partition): spec for partition in partitions}
        if not asked:
            return {}
        answers = self._admin.list_offsets(asked, request_timeout=request_s)
        return {(tp.topic, tp.partition): answer.result().offset for tp, answer in answers.items()}

    def newest_us(self, partitions: Collection[Partition]) -> int | None:
        """Ask for the greatest timestamp that a record there has, in µs since 1970.

        None without an answer, or without records. Brokers answer since Kafka 3.0.
        """
        asked = {TopicPartition(*p): OffsetSpec.max_timestamp() for p in partitions}
        if not asked:
            return None
        times_ms = [-1]
        for answer in self._admin.list_offsets(asked, request_timeout=1).values():
            try:
                times_ms.append(answer.result().timestamp)
            except KafkaException as error:
                _LOGGER.debug("no newest record: %s", error)
        return max(times_ms) * 1000 if max(times_ms) >= 0 else None

    def learn(self, topics: Collection[str]) -> None:
        """Look these topics up anew, as far as `list_offsets` is concerned.

        A partition that was added since the client looked last has no leader to it.

        Raises:
          KafkaException: there was no answer.
        """
        for topic in topics:
            self._admin.list_topics(topic, timeout=_REQUEST_S)

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Commit offsets to the group, for those who watch its lag; nothing depends on them."""
        try:
            self._consumer.commit(
                offsets=[TopicPartition(*p, offset) for p, offset in offsets.items()],
                asynchronous=True,
            )
        except KafkaException as error:
            _LOGGER.warning("offsets of group %s are not committed: %s", self._group, error)

    def close(self) -> None:
        """Leave the brokers."""
        self._consumer.close()

    def _without_errors(self, chunk: list[Any], ends: dict[Partition, int]) -> list[Any]:
        for message in chunk:
            error = message.error()
            if error is None:
                continue
            partition = message.topic(), message.partition()
            if error.code() == KafkaError._PARTITION_EOF:
                ends[partition] = message.offset()
            elif error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION):
                raise SourceError(self._gone(partition))
            elif error.code() in _DENIED or error.fatal():
                raise KafkaException(error)
            else:  # the client goes on trying
                _LOGGER.warning("%s, partition %s: %s", *partition, error)
        return [message for message in chunk if message.error() is None]

    def _gone(self, partition: Partition) -> str:
        topic, number = partition
        try:
            first, end = (
                self.list_offsets([partition], spec)[partition]
                for spec in (OffsetSpec.earliest(), OffsetSpec.latest())
            )
            there = f"the broker has {first} to {end}"
        except KafkaException as error:
            there = f"the broker doesn't say what it has: {error}"
        return (
            f"offset {self.offsets.get(partition)} of {topic}, partition {number}, is not there; "
            f"{there}. Retention removed records before they were read, the topic was made anew, "
            "or a new leader lacks records (an unclean election). To go on without them, start a "
            "new job, not from a savepoint, and choose where by --kafka_start"
        )


_DENIED = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
)


def _partition(message: Any) -> Partition:
    return message.topic(), message.partition()


class _Gathered:
    """What came of one partition so far: columns, and no messages.

    A slice of messages kept alive would have the garbage collector go through all of this
    process' objects again and again; that took a quarter of a busy worker's time.
    """

    def __init__(self) -> None:
        self.values: list[bytes | None] = []
        self.offsets: list[int] = []
        self.times_ms: list[int] = []
        self.time_types: set[int] = set()
        self.leader_epoch: int | None = None

    def add(self, messages: list[Any]) -> None:
        types, times_ms = zip(*[message.timestamp() for message in messages], strict=True)
        self.values += [message.value() for message in messages]
        self.offsets += [message.offset() for message in messages]
        self.times_ms += times_ms
        self.time_types.update(types)
        self.leader_epoch = messages[-1].leader_epoch()

    def fetched(self) -> Fetched:
        return Fetched(
            values=pa.array(self.values, pa.binary()),
            offsets=np.array(self.offsets, np.int64),
            times_ms=np.array(self.times_ms, np.int64),
            log_append_time=self.time_types == {TIMESTAMP_LOG_APPEND_TIME},
            next=self.offsets[-1] + 1,
            leader_epoch=self.leader_epoch,
        )


def _up_to(fetched: Fetched | None, end: int) -> Fetched:
    """Take in that a partition ends there; what lies before holds no more records."""
    if fetched is None:
        nothing = np.empty(0, np.int64)
        return Fetched(pa.array([], pa.binary()), nothing, nothing, True, end)
    return replace(fetched, next=max(fetched.next, end))
