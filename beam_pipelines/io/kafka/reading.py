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
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.model.watermark import CLOCK_SKEW_US, BrokersClock, PartitionWatermark

_LOGGER = logging.getLogger(__name__)

RANGE_OFFSETS = 100_000
"""Records of a range of the lake."""

BATCH_ROWS = 50_000
"""Rows of a batch, at most."""

METADATA_PERIOD_S = 30
"""Seconds between two looks at the topics. The records of a new partition that is found
this late still count: windows and state are kept for longer."""

UNSEEN_S = SLACK_S - CLOCK_SKEW_US / 1_000_000
"""Seconds after a look at the topics for which the watermark goes on without another. What
a partition that was added since holds is no further behind it than windows and state are
kept for longer."""

_ENDS_PERIOD_S = 0.5
_NEWEST_PERIOD_S = 5
_COMMIT_PERIOD_S = 5
_UNUSED_S = 60  # an open consumer that no reader asks for is closed after this long

_LATEST_MS = 253_402_300_799_999  # the end of the year 9999; the product fits as µs

APPEND_TIMES = ("broker", "producer", "none")


@dataclass(frozen=True)
class Subscription:
    """What is read, and from where on; `ReadKafka` says what the fields mean.

    `start` is `earliest` or a time: every attempt of a job begins at the same place.
    """

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
        self.looked_at = self.asked_at = self.newest_at = self.committed_at = float("-inf")
        self.listed: list[Partition] = []  # of all readers
        self.unread = False  # whether a partition is known, but can't be read as yet
        self.brokers_clock = BrokersClock(_monotonic_us())

    def looked_up(self, positions: Positions, watermark_us: int | None = None) -> Positions:
        """Every METADATA_PERIOD_S, look at the topics: add new partitions.

        A new partition begins at the reader's watermark, less the time that windows and
        state are kept for longer: what it holds is judged by that, if it was stored before.

        Args:
          positions: Where reading is.
          watermark_us: The reader's watermark, as the runner has it.

        Raises:
          SourceError: a topic was made anew, lacks the broker's time or is no longer asked
            for, or other settings made the state.
        """
        if positions.begun and positions.settings != self.read.settings:
            raise SourceError(
                f"the state that this job goes on from was made with {positions.settings}; with "
                f"{self.read.settings} it would be taken for something else. Start it with the "
                "flags it was made with, or start a new job, not from a savepoint"
            )
        if removed := sorted({*positions.topic_ids} - {*self.read.topics}):
            raise SourceError(
                f"--input names {', '.join(self.read.topics)}; the state that this job goes on "
                f"from has also read {', '.join(removed)}, whose next records nobody would read. "
                "Name all of them, or start a new job, not from a savepoint"
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
        listed = [(name, number) for name, topic in topics.items() for number in topic.partitions]
        found = [
            (name, number)
            for name, number in listed
            if (zlib.crc32(name.encode()) + number) % self.readers == self.index
        ]
        new = [partition for partition in found if partition not in positions.partitions]
        try:
            begun = self._begun(new, positions, watermark_us)
            if listed != self.listed:
                self.fetcher.learn(topics)
        except KafkaException as error:  # a partition that was just made may lack a leader
            if not positions.begun:
                raise
            self.unread = True
            _LOGGER.warning(
                "new partitions can't be read as yet, and the watermark waits for them: %s", error
            )
            return positions
        self.looked_at, self.listed, self.unread = now, listed, False
        return replace(
            positions.moved(begun),
            topic_ids={name: topic.topic_id for name, topic in topics.items()},
            begun=True,
            settings=self.read.settings,
        )

    def _begun(
        self, new: list[Partition], positions: Positions, watermark_us: int | None
    ) -> dict[Partition, Position]:
        if not new or (self.read.until_end and positions.begun):
            return {}
        self.fetcher.learn({topic for topic, _ in new})
        first = self.fetcher.list_offsets(new, OffsetSpec.earliest())
        end = self.fetcher.list_offsets(new, OffsetSpec.latest())
        begin = first
        if not positions.begun and isinstance(self.read.start, int):
            found = self.fetcher.list_offsets(
                new, OffsetSpec.for_timestamp(-(-self.read.start // 1000))
            )
            begin = {p: end[p] if offset < 0 else offset for p, offset in found.items()}
        since_us = None if watermark_us is None else watermark_us - SLACK_S * 1_000_000
        return {
            p: Position(begin[p], begin[p], end[p] if self.read.until_end else None, since_us)
            for p in new
        }

    def fetched(self, positions: Positions, wait_s: float) -> dict[Partition, Fetched]:
        """Fetch what comes next of the partitions that are not done."""
        open_ = {p: at for p, at in positions.partitions.items() if not at.done}
        self.fetcher.assign(
            {p: at.next for p, at in open_.items()},
            {p: at.leader_epoch for p, at in open_.items()},
        )
        if not open_:
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
        epoch = position.leader_epoch if fetched.leader_epoch is None else fetched.leader_epoch
        moved = replace(
            position,
            next=max(end, position.next),
            watermark_us=watermark.now(),
            leader_epoch=epoch,
        )
        return moved, elements

    def _append_times(
        self, partition: Partition, position: Position, fetched: Fetched
    ) -> np.ndarray | None:
        """Return the times that records are judged by, which never fall (µs since 1970).

        Clocks of producers are as they are, and a broker's may step back, or that of a new
        leader be behind: a time counts as no earlier than the ones before it, nor than what
        the watermark has passed. So verdicts agree with the watermark.
        """
        if self.read.append_time == "none":
            return None
        latest_ms = _LATEST_MS
        if self.read.append_time == "producer":
            latest_ms = int(self.clock() * 1000)
        elif not fetched.log_append_time:
            raise SourceError(_not_log_append_time(partition[0]))
        # Clipped first, as a time in ns times 1,000 is another one; -1: the record has none.
        times_us: np.ndarray = np.clip(fetched.times_ms, 0, latest_ms) * 1000
        if len(times_us):
            self.brokers_clock.seen(int(times_us.max()), _monotonic_us())
        if position.watermark_us is not None:
            times_us = np.maximum(times_us, position.watermark_us + self.read.behind_us)
        if (times_us[1:] < times_us[:-1]).any():  # seldom; to look is cheaper
            times_us = np.maximum.accumulate(times_us)
        return times_us

    def idle(self, positions: Positions, fetched: dict[Partition, Fetched]) -> Positions:
        """Let the watermarks of partitions that are caught up follow the brokers' clock."""
        if time.monotonic() - self.asked_at < _ENDS_PERIOD_S:
            return positions
        quiet = {
            p: at
            for p, at in positions.partitions.items()
            if not at.done and (p not in fetched or len(fetched[p].offsets) == 0)
        }
        asked_us = self._brokers_us()
        self.asked_at = time.monotonic()
        if asked_us is None:
            return positions
        ends = self.fetcher.ends(quiet)
        moved = {}
        for partition, at in quiet.items():
            watermark = PartitionWatermark(self.read.behind_us, at.watermark_us)
            watermark.asked_for_end(asked_us, ends[partition], at.next)
            moved[partition] = replace(at, watermark_us=watermark.now())
        return positions.moved(moved)

    def _brokers_us(self) -> int | None:
        """Return how late it is for the brokers; ask for the newest record if that is unsure."""
        now_us = self.brokers_clock.now(clock_us := self._clock_us(), _monotonic_us())
        sure = now_us is not None and clock_us - now_us <= CLOCK_SKEW_US
        if sure or time.monotonic() - self.newest_at < _NEWEST_PERIOD_S:
            return now_us
        newest_us = self.fetcher.newest_us(self.listed)
        self.newest_at = time.monotonic()
        if newest_us is not None:
            self.brokers_clock.seen(min(newest_us, self._clock_us()), _monotonic_us())
        return self.brokers_clock.now(self._clock_us(), _monotonic_us())

    def _clock_us(self) -> int:
        return int(self.clock() * 1_000_000)

    def commit(self, positions: Positions) -> None:
        """Commit where a checkpointed restriction begins, now and then."""
        if self.read.group and time.monotonic() - self.committed_at > _COMMIT_PERIOD_S:
            self.committed_at = time.monotonic()
            self.fetcher.commit({p: at.next for p, at in positions.partitions.items()})

    def watermark_us(self, positions: Positions) -> int | None:
        """Return how far the reader's watermark may move; None: it stays where it is.

        It waits while a known partition can't be read, or none of the topics could be looked
        at for `UNSEEN_S`. Without partitions it follows the brokers' clock.
        """
        if self.unread or time.monotonic() - self.looked_at > UNSEEN_S:
            return None
        if positions.partitions or not positions.begun:
            return positions.watermark_us()
        brokers_us = self.brokers_clock.now(self._clock_us(), _monotonic_us())
        return None if brokers_us is None else brokers_us - CLOCK_SKEW_US - self.read.behind_us


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


def _monotonic_us() -> int:
    return int(time.monotonic() * 1_000_000)


def _not_log_append_time(topic: str) -> str:
    return (
        f"topic {topic} has records without the broker's time (CreateTime), which says nothing "
        "of when they arrived. Either let the broker set it for new records: kafka-configs.sh "
        f"--bootstrap-server HOST:PORT --alter --entity-type topics --entity-name {topic} "
        "--add-config message.timestamp.type=LogAppendTime; or judge lateness by the "
        "producers' clocks: --append_time=producer"
    )
