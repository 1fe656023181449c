"""A reader at work: what it fetches, how its watermark moves, what it finds anew."""

import logging
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp
from confluent_kafka import KafkaException
from confluent_kafka.admin import OffsetSpec

from beam_pipelines.io.kafka.client import KafkaCluster, topic_partitions
from beam_pipelines.io.kafka.fetch import Fetched, Fetcher, SourceError
from beam_pipelines.io.kafka.positions import Partition, Position, Positions
from beam_pipelines.model.span import Span
from beam_pipelines.model.watermark import CLOCK_SKEW_US, PartitionWatermark

_LOGGER = logging.getLogger(__name__)

RANGE_OFFSETS = 100_000
"""Records of a range of the lake."""

BATCH_ROWS = 50_000
"""Rows of a batch, at most."""

METADATA_PERIOD_S = 30
"""Seconds between two looks at the topics. The records of a new partition that is found
this late still count: windows and state are kept for longer."""

_ENDS_PERIOD_S = 0.5
_COMMIT_PERIOD_S = 5
_UNUSED_S = 60  # an open consumer that no reader asks for is closed after this long

APPEND_TIMES = ("broker", "producer", "none")


@dataclass(frozen=True)
class Subscription:
    """What is read, and from where on; `ReadKafka` says what the fields mean."""

    cluster: KafkaCluster
    topics: tuple[str, ...]
    out_of_orderness_s: int
    start: str | int
    until_end: bool
    append_time: str
    group: str | None
    settings: str = ""

    @property
    def behind_us(self) -> int:
        """The out-of-orderness in µs."""
        return self.out_of_orderness_s * 1_000_000


class Reading:
    """A reader at work: an open consumer, and what it knows of the topics."""

    def __init__(
        self,
        read: Subscription,
        reader: str,
        fetcher: Callable[[KafkaCluster, str | None], Fetcher] = Fetcher,
        clock: Callable[[], float] = time.time,
    ) -> None:
        index, readers = reader.split("/")[:2]
        self.index, self.readers = int(index), int(readers)
        self.read = read
        self.fetcher = fetcher(read.cluster, read.group)
        self.clock = clock
        self.looked_at = self.asked_at = self.committed_at = float("-inf")

    def looked_up(self, positions: Positions) -> Positions:
        """Look at the topics, when it is time to: nothing was made anew, and what is new?"""
        if positions.begun and positions.settings != self.read.settings:
            raise SourceError(
                f"the state that this job goes on from was made with {positions.settings}; with "
                f"{self.read.settings} it would be taken for something else. Start it with the "
                "flags it was made with, or start a new job, not from a savepoint"
            )
        now = time.monotonic()
        if now - self.looked_at < METADATA_PERIOD_S:
            return positions
        try:
            topics = topic_partitions(self.read.cluster, self.read.topics)
        except ConnectionError as error:
            if self.looked_at == float("-inf"):
                raise
            _LOGGER.warning("the topics could not be looked at: %s", error)
            return positions
        for name, topic in topics.items():
            known = positions.topic_ids.get(name, topic.topic_id)
            if known != topic.topic_id:
                raise SourceError(
                    f"topic {name} was deleted and made anew (its id was {known}, is "
                    f"{topic.topic_id}): its offsets mean other records now. Start a new job, "
                    "not from a savepoint"
                )
            if topic.timestamp_type != "LogAppendTime" and self.read.append_time == "broker":
                raise SourceError(_not_log_append_time(name))
        found = [
            (name, number)
            for name, topic in topics.items()
            for number in topic.partitions
            if (zlib.crc32(name.encode()) + number) % self.readers == self.index
        ]
        new = [partition for partition in found if partition not in positions.partitions]
        try:
            begun = self._begun(new, positions)
        except KafkaException as error:  # a partition that was just made may lack a leader
            if not positions.begun:
                raise
            _LOGGER.warning("new partitions can't be read as yet: %s", error)
            return positions
        self.looked_at = now
        return replace(
            positions.moved(begun),
            topic_ids={name: topic.topic_id for name, topic in topics.items()},
            begun=True,
            settings=self.read.settings,
        )

    def _begun(self, new: list[Partition], positions: Positions) -> dict[Partition, Position]:
        if not new or (self.read.until_end and positions.begun):
            return {}
        self.fetcher.learn({topic for topic, _ in new})
        first = self.fetcher.list_offsets(new, OffsetSpec.earliest())
        end = self.fetcher.list_offsets(new, OffsetSpec.latest())
        begin = first
        if not positions.begun and self.read.start == "latest":
            begin = end
        elif not positions.begun and isinstance(self.read.start, int):
            found = self.fetcher.list_offsets(
                new, OffsetSpec.for_timestamp(-(-self.read.start // 1000))
            )
            begin = {p: end[p] if offset < 0 else offset for p, offset in found.items()}
        return {
            p: Position(begin[p], begin[p], end[p] if self.read.until_end else None) for p in new
        }

    def fetched(self, positions: Positions, wait_s: float) -> dict[Partition, Fetched]:
        """Fetch what comes next of the partitions that are not done."""
        offsets = {p: at.next for p, at in positions.partitions.items() if not at.done}
        self.fetcher.assign(offsets)
        if not offsets:
            time.sleep(wait_s)  # a reader without partitions, as yet
            return {}
        return self.fetcher.fetch(wait_s)

    def taken(
        self, positions: Positions, fetched: dict[Partition, Fetched]
    ) -> tuple[Positions, list[Any]]:
        """Return the positions after what was fetched, and the elements made of it."""
        moved, elements = {}, []
        for partition, of in fetched.items():
            position, more = self._outputs(partition, positions.partitions[partition], of)
            moved[partition] = position
            elements += more
        return positions.moved(moved), elements

    def _outputs(
        self, partition: Partition, position: Position, fetched: Fetched
    ) -> tuple[Position, list[Any]]:
        """Return the new position and the elements that lead to it."""
        end = fetched.next if position.stop is None else min(fetched.next, position.stop)
        append_us = self._append_times(partition, position, fetched)
        payloads = fetched.payloads(append_us)
        watermark = PartitionWatermark(self.read.behind_us, position.watermark_us)
        elements = []
        at, row = position.next, 0
        rows = int(np.searchsorted(fetched.offsets, end))
        while at < end:
            border = at // RANGE_OFFSETS * RANGE_OFFSETS + RANGE_OFFSETS
            upto = int(np.searchsorted(fetched.offsets, border))
            upto = min(upto, rows, row + BATCH_ROWS)
            # A span reaches as far as is known to hold nothing but its rows.
            after = int(fetched.offsets[upto]) if upto < rows else end
            span_end = min(border, after)
            span = Span(
                *partition,
                max(border - RANGE_OFFSETS, position.began),
                border,
                at,
                span_end,
                span_end in (border, position.stop),
                open=span_end == position.stop != border,
            )
            element: Any = (span, payloads.slice(row, upto - row))
            if append_us is not None and upto > row:
                earliest_us = int(append_us[row:upto].min()) - self.read.behind_us
                element = TimestampedValue(element, Timestamp(micros=earliest_us))
            elements.append(element)
            at, row = span_end, upto
        if append_us is not None and rows:
            watermark.appended(int(append_us[:rows].max()))
        moved = replace(position, next=max(end, position.next), watermark_us=watermark.now())
        return moved, elements

    def _append_times(
        self, partition: Partition, position: Position, fetched: Fetched
    ) -> np.ndarray | None:
        times_us: np.ndarray = fetched.times_ms * 1000
        if self.read.append_time == "none":
            return None
        if self.read.append_time == "broker":
            if not fetched.log_append_time:
                raise SourceError(_not_log_append_time(partition[0]))
            return times_us
        # Producers' clocks may be wrong, and records of several arrive mixed: such a time
        # counts as no earlier than the ones before it, as the watermark has passed them.
        times_us = np.minimum(times_us, int(self.clock() * 1_000_000))
        if position.watermark_us is not None:
            times_us = np.maximum(times_us, position.watermark_us + self.read.behind_us)
        return np.maximum.accumulate(times_us)

    def idle(self, positions: Positions, fetched: dict[Partition, Fetched]) -> Positions:
        """Let the watermarks of partitions that are caught up follow the clock."""
        if time.monotonic() - self.asked_at < _ENDS_PERIOD_S:
            return positions
        quiet = {
            p: at
            for p, at in positions.partitions.items()
            if not at.done and (p not in fetched or len(fetched[p].offsets) == 0)
        }
        asked_us = int(self.clock() * 1_000_000)
        self.asked_at = time.monotonic()
        ends = self.fetcher.ends(quiet)
        moved = {}
        for partition, at in quiet.items():
            watermark = PartitionWatermark(self.read.behind_us, at.watermark_us)
            watermark.asked_for_end(asked_us, ends[partition], at.next)
            moved[partition] = replace(at, watermark_us=watermark.now())
        return positions.moved(moved)

    def commit(self, positions: Positions) -> None:
        """Commit where a checkpointed restriction begins, now and then."""
        if self.read.group and time.monotonic() - self.committed_at > _COMMIT_PERIOD_S:
            self.committed_at = time.monotonic()
            self.fetcher.commit({p: at.next for p, at in positions.partitions.items()})

    def watermark_us(self, positions: Positions) -> int | None:
        """Return the reader's watermark; without partitions it follows the clock."""
        if positions.partitions or not positions.begun:
            return positions.watermark_us()
        return int(self.clock() * 1_000_000) - CLOCK_SKEW_US - self.read.behind_us


class OpenReadings:
    """Readings of this process between two calls: consumers stay open, and their fetches.

    Kept per process, as a runner hands the calls of one reader to any of its DoFns. A
    reader that moved elsewhere leaves one behind, which is closed after a while.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Any, tuple[float, Reading]] = {}

    def take(self, key: Any) -> Reading | None:
        with self._lock:
            return self._open.pop(key, (0.0, None))[1]

    def leave(self, key: Any, reading: Reading) -> None:
        now = time.monotonic()
        with self._lock:
            before = self._open.get(key)
            self._open[key] = now, reading
            unused = [k for k, (used_at, _) in self._open.items() if now - used_at > _UNUSED_S]
            closing = [self._open.pop(k)[1] for k in unused] + ([before[1]] if before else [])
        for each in closing:
            each.fetcher.close()


def _not_log_append_time(topic: str) -> str:
    return (
        f"topic {topic} has records without the broker's time (CreateTime), which says nothing "
        "of when they arrived. Either let the broker set it for new records: kafka-configs.sh "
        f"--bootstrap-server HOST:PORT --alter --entity-type topics --entity-name {topic} "
        "--add-config message.timestamp.type=LogAppendTime; or judge lateness by the "
        "producers' clocks: --append_time=producer"
    )
