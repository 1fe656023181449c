"""For tests of pipelines made of batches: rows, streams, and what came out."""

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.testing.test_stream import TestStream
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.model.batches import BatchCoder, BatchOf, Rows, batch_of_rows
from beam_pipelines.model.records import EVENT_TIME

_BEYOND_ALL_S = 1_000_000_000


def stream_pipeline() -> beam.Pipeline:
    """Return a pipeline on the direct runner that knows all triggers and TestStream."""
    options = PipelineOptions()
    options.view_as(StandardOptions).streaming = True
    return beam.Pipeline(runner=BundleBasedDirectRunner(), options=options)


class BatchStream:
    """A stream of batches, each added with a bundle of its own, under a moved watermark.

    Times are in seconds; a batch is stamped with the earliest of its on-time rows, as a
    source would: the later one of its earliest row and the watermark.

    Args:
      schema: Columns of the batches.
      lateness_s: Seconds behind the watermark that a stage before is said to allow, as
        `ClassifyLateness` does; None: nobody has judged the rows.
    """

    def __init__(self, schema: pa.Schema, lateness_s: int | None = 120) -> None:
        self.schema = schema
        self.stream = TestStream(coder=BatchCoder(schema)).with_output_types(
            BatchOf(schema, lateness_s)
        )
        self._watermark_s: float = 0
        self.stream.advance_watermark_to(0)

    def add(self, *rows: dict[str, Any]) -> "BatchStream":
        """Add a batch; its rows' `event_time` is in seconds."""
        earliest = min((row[EVENT_TIME] for row in rows), default=self._watermark_s)
        batch = batch_of_rows(
            [{**row, EVENT_TIME: round(row[EVENT_TIME] * 1_000_000)} for row in rows], self.schema
        )
        stamp = Timestamp(max(earliest, self._watermark_s))
        self.stream.add_elements([TimestampedValue(batch, stamp)])
        return self

    def watermark(self, seconds: float) -> "BatchStream":
        """Move the watermark."""
        self._watermark_s = seconds
        self.stream.advance_watermark_to(seconds)
        return self

    def processing_time(self, seconds: float) -> "BatchStream":
        """Let processing time go by."""
        self.stream.advance_processing_time(seconds)
        return self

    def end(self) -> TestStream:
        """Move the watermark beyond all rows, then to infinity, and return the stream."""
        # This runner ends a stream at infinity without firing the user's timers.
        self.stream.advance_watermark_to(_BEYOND_ALL_S).advance_watermark_to_infinity()
        return self.stream


class RowsWithPanesFn(beam.DoFn):
    """Yields (pane timing, row as a tuple) per row; timestamps in seconds.

    The timing is `EARLY`, `ON_TIME`, `LATE` or `UNKNOWN` (no pane, as from a timer).
    """

    def process(
        self, batch: Rows, pane: Any = beam.DoFn.PaneInfoParam
    ) -> Iterator[tuple[str, tuple[Any, ...]]]:
        timing = beam.utils.windowed_value.PaneInfoTiming.to_string(pane.timing)
        for row in rows_in_seconds(batch):
            yield timing, row


def rows_in_seconds(batch: Rows) -> list[tuple[Any, ...]]:
    """Return the rows of a batch as tuples, timestamps as seconds since 1970."""
    columns = [
        [None if v is None else v / 1_000_000 for v in column.cast(pa.int64()).to_pylist()]
        if pa.types.is_timestamp(column.type)
        else column.to_pylist()
        for column in batch.columns
    ]
    return list(zip(*columns, strict=True))
