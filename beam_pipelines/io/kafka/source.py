"""Kafka topics as a source: batches are born in the poll, offsets live in the restriction."""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.coders import StrUtf8Coder
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.io.kafka.client import KafkaCluster
from beam_pipelines.io.kafka.positions import Positions, PositionsCoder, PositionsTracker
from beam_pipelines.io.kafka.reading import APPEND_TIMES, OpenReadings, Reading, Subscription
from beam_pipelines.kernels.key_groups import even_labels, varint
from beam_pipelines.model.batches import BatchOf
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import spanned
from beam_pipelines.telemetry import Counter

IDLE_S = 1.0
"""Seconds that a poll waits for a record: the pace at which an idle reader checkpoints
itself, and how far the watermark of an idle partition lags."""

_OPEN = OpenReadings()


@dataclass
class ReadKafka(beam.PTransform):
    """Read the records of topics, each partition in offset order.

    Output: (Span, batch of PAYLOADS). A batch holds records of one partition and one range
    of RANGE_OFFSETS offsets (the first range read may begin later), and is stamped with
    its least append time less `out_of_orderness_s`: a lower bound of the event times in it
    that are on time.

    Guarantee: each record once, in what is checkpointed: the offsets are part of the
    runner's state, not of a consumer group. An offset that is no longer there, a topic
    that was deleted or made anew and a record without the broker's time stop the job; none
    is skipped. Aborted transactions are not read.

    The watermark is the least of the partitions'; `model.watermark` has its rule. New
    partitions are found within METADATA_PERIOD_S and read from their beginning; while one
    can't be read as yet, or no look at the topics succeeds, the watermark waits. So a row
    that is on time or late by its append time is within what windows and state are kept.

    Partitions are divided among `readers` elements: a reader is one unit of work, which
    polls all of its partitions with one consumer and runs on one subtask. Their labels are
    chosen so that Flink's key groups put them on different subtasks.

    Args:
      cluster: The brokers.
      topics: Names of topics.
      out_of_orderness_s: Seconds that events on time may lie behind their append time.
      start: Where new reading begins: `earliest`, µs since 1970 (the first record appended
        then or later), or `latest`: the time at which the job is submitted, so that a job
        that fails before its first checkpoint begins there again. A job that resumes goes
        on where it was.
      until_end: Read up to the end offsets seen at the start, and no further.
      append_time: `broker`: the broker's (LogAppendTime); `producer`: the producer's
        (CreateTime), no later than the clock; `none`: none, the input is complete (with
        `until_end` only). Both never fall within a partition, nor behind its watermark:
        what `PAYLOADS` holds is what a row is judged by.
      readers: Units that the partitions are divided into.
      group: Consumer group to commit offsets to, for those who watch its lag.
      settings: What the state of the stages behind depends on, as the user gives it: flags. It
        is kept with the offsets, and a job that goes on from them with others is stopped.
      checks: Called on a worker before anything is read; what they raise stops the job.

    Raises:
      ValueError: a field can't be used.
    """

    cluster: KafkaCluster
    topics: tuple[str, ...]
    out_of_orderness_s: int = 120
    start: str | int = "earliest"
    until_end: bool = False
    append_time: str = "broker"
    readers: int = 1
    group: str | None = None
    settings: str = ""
    checks: tuple[Callable[[], object], ...] = ()

    def __post_init__(self) -> None:
        if not self.topics or "" in self.topics:
            raise ValueError(f"topics need names, got {self.topics}")
        if isinstance(self.start, str) and self.start not in ("earliest", "latest"):
            raise ValueError(f"start is earliest, latest or a time in µs, not {self.start!r}")
        if self.append_time not in APPEND_TIMES:
            raise ValueError(f"append_time is one of {APPEND_TIMES}, not {self.append_time!r}")
        if self.append_time == "none" and not self.until_end:
            raise ValueError("an endless topic has append times: none is for complete input")
        if self.readers <= 0:
            raise ValueError(f"readers must be positive, got {self.readers}")

    def expand(self, pipeline: beam.pvalue.PBegin) -> beam.PCollection:
        subscription = Subscription(
            self.cluster,
            self.topics,
            self.out_of_orderness_s,
            time.time_ns() // 1000 if self.start == "latest" else self.start,
            self.until_end,
            self.append_time,
            self.group,
            self.settings,
        )
        read = _ReadToEndFn(subscription) if self.until_end else _ReadFn(subscription)
        return (
            pipeline
            | "Start" >> beam.Impulse()
            | "Check connections" >> beam.ParDo(_CheckFn(self.checks)).with_output_types(bytes)
            | "Readers" >> beam.FlatMap(_labels, self.readers).with_output_types(str)
            | "Poll" >> beam.ParDo(read).with_output_types(spanned(BatchOf(PAYLOADS)))
        )


def _labels(_: bytes, readers: int) -> list[str]:
    """Name the readers: index/readers/label."""

    def encoded(index: int) -> Callable[[int], bytes]:
        def encode(label: int) -> bytes:
            text = StrUtf8Coder().encode(f"{index}/{readers}/{label}")
            return varint(len(text)) + text

        return encode

    return [f"{i}/{readers}/{even_labels(encoded(i), readers)[i]}" for i in range(readers)]


class _CheckFn(beam.DoFn):
    def __init__(self, checks: tuple[Callable[[], object], ...]) -> None:
        self.checks = checks

    def process(self, impulse: bytes) -> Iterator[bytes]:
        for check in self.checks:
            check()
        yield impulse


class _PositionsProvider(RestrictionProvider):
    def __init__(self, bounded: bool) -> None:
        self.bounded = bounded

    def initial_restriction(self, element: str) -> Positions:
        return Positions()

    def create_tracker(self, restriction: Positions) -> PositionsTracker:
        return PositionsTracker(restriction, self.bounded)

    def restriction_coder(self) -> PositionsCoder:
        return PositionsCoder()

    def restriction_size(self, element: str, restriction: Positions) -> float:
        return 1.0

    def truncate(self, element: str, restriction: Positions) -> None:
        """On draining, nothing is left to do: reading ends where it is."""
        return None


_ENDLESS = beam.DoFn.RestrictionParam(_PositionsProvider(bounded=False))
_BOUNDED = beam.DoFn.RestrictionParam(_PositionsProvider(bounded=True))
_WATERMARK = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider())


class _ReadFn(beam.DoFn):
    """Reads without end: a slice per call, then a self-checkpoint.

    Flink never asks to split, so a call that didn't return would hold up its bundle,
    checkpoints and watermark included.
    """

    def __init__(self, read: Subscription) -> None:
        self.read = read
        self.stage = f"read-{uuid.uuid4()}"
        self.slices = Counter("slices")  # each is a self-checkpoint

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        reader: str,
        tracker: Any = _ENDLESS,
        estimator: Any = _WATERMARK,
    ) -> Iterator[Any]:
        before = tracker.current_restriction()
        reading = _OPEN.take((self.stage, reader)) or Reading(self.read, reader)
        try:
            reading.commit(before)
            now = estimator.current_watermark()
            positions = reading.looked_up(before, None if now is None else now.micros)
            fetched = reading.fetched(positions, IDLE_S)
            positions, elements = reading.taken(positions, fetched)
            positions = reading.idle(positions, fetched)
            watermark_us = reading.watermark_us(positions)
        except BaseException:
            reading.fetcher.close()
            raise
        _OPEN.leave((self.stage, reader), reading)
        if not tracker.try_claim(positions):
            return
        self.slices.inc()
        yield from elements
        if watermark_us is not None:
            watermark = Timestamp(micros=watermark_us)
            if now is None or watermark > now:  # a new partition starts behind
                estimator.set_watermark(watermark)
        tracker.defer_remainder()


class _ReadToEndFn(beam.DoFn):
    """Reads up to where the topics ended at the start, in one call: whole ranges a bundle."""

    def __init__(self, read: Subscription) -> None:
        self.read = read

    def process(
        self,
        reader: str,
        tracker: Any = _BOUNDED,
    ) -> Iterator[Any]:
        reading = Reading(self.read, reader)
        try:
            positions = reading.looked_up(tracker.current_restriction())
            while tracker.try_claim(positions) and not positions.done:
                fetched = reading.fetched(positions, IDLE_S)
                positions, elements = reading.taken(positions, fetched)
                if not tracker.try_claim(positions):
                    return
                yield from elements
        finally:
            reading.fetcher.close()
