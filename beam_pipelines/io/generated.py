"""A made-up stream as a source: a function makes its records, a chunk at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Timestamp

from beam_pipelines.model.batches import BatchOf, empty_batch
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import Span, spanned

RANGE_OFFSETS = 500_000
"""Records of a range of the lake."""


@dataclass
class ReadGenerated(beam.PTransform):
    """Read a stream that a function makes, with offsets 0, 1, ... in partition 0.

    Output: (Span, batch of PAYLOADS), one pair per chunk. The chunks of a range come in
    offset order from one element, within one bundle; ranges are read in parallel where the
    runner can. A batch is stamped `out_of_orderness_s` before its first append time: a
    lower bound of the event times in it that are on time.

    Args:
      chunk: Returns chunk i: records [i * chunk_records, (i + 1) * chunk_records), as far
        as `total` goes, with those offsets and, if any, non-decreasing append times. The
        same ones whenever it is called: a retried bundle calls it again.
      total: Number of records.
      chunk_records: Records of a chunk; divides `RANGE_OFFSETS`.
      topic: Name of the stream in spans.
      out_of_orderness_s: Seconds that events on time may lie behind their append time.

    Raises:
      ValueError: a number is out of range, or (at run time) a chunk has other offsets.
    """

    chunk: Callable[[int], pa.RecordBatch]
    total: int
    chunk_records: int
    topic: str
    out_of_orderness_s: int = 120

    def __post_init__(self) -> None:
        if self.chunk_records <= 0 or RANGE_OFFSETS % self.chunk_records:
            raise ValueError(f"chunk_records must divide {RANGE_OFFSETS}: {self.chunk_records}")
        if self.total < 0 or self.out_of_orderness_s < 0:
            raise ValueError(
                f"total and out_of_orderness_s must not be negative: {self.total}, "
                f"{self.out_of_orderness_s}"
            )

    def expand(self, pipeline: beam.pvalue.PBegin) -> beam.PCollection:
        starts = range(0, max(self.total, 1), RANGE_OFFSETS)
        return (
            pipeline
            | "Ranges" >> beam.Create(starts)
            | "Generate"
            >> beam.ParDo(_GenerateFn(self)).with_output_types(spanned(BatchOf(PAYLOADS)))
        )


class _GenerateFn(beam.DoFn):
    def __init__(self, stream: ReadGenerated) -> None:
        self.chunk = stream.chunk
        self.total = stream.total
        self.chunk_records = stream.chunk_records
        self.topic = stream.topic
        self.out_of_orderness_us = stream.out_of_orderness_s * 1_000_000

    def process(self, range_start: int) -> Iterator:
        range_end = range_start + RANGE_OFFSETS
        if not self.total:
            yield Span(self.topic, 0, 0, range_end, 0, 0, True), empty_batch(PAYLOADS)
        for start in range(range_start, min(range_end, self.total), self.chunk_records):
            end = min(start + self.chunk_records, self.total)
            last = end in (range_end, self.total)
            span = Span(self.topic, 0, range_start, range_end, start, end, last)
            batch = self.chunk(start // self.chunk_records)
            self._check(batch, span)
            yield self._stamped(span, batch)

    def _check(self, batch: pa.RecordBatch, span: Span) -> None:
        found, expected = len(batch), span.end - span.start
        if found != expected or batch["offset"][0].as_py() != span.start:
            raise ValueError(
                f"the chunk of {self.topic} at offset {span.start} must have {expected} records "
                f"from there on, not {found} from {batch['offset'].slice(0, 1).to_pylist()}"
            )

    def _stamped(self, span: Span, batch: pa.RecordBatch) -> object:
        append_time = batch["append_time"]
        if append_time.null_count == len(batch):
            return span, batch
        earliest_us = pc.min(append_time).cast(pa.int64()).as_py() - self.out_of_orderness_us
        stamp = max(Timestamp(micros=earliest_us), MIN_TIMESTAMP)
        return TimestampedValue((span, batch), stamp)
