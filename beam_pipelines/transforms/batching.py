"""Into and out of batches, for pipelines whose other parts handle single elements."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from beam_pipelines.model.batches import BatchOf, Rows, batch_of_rows, schema_of
from beam_pipelines.model.records import EVENT_TIME

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Batch(beam.PTransform):
    """Gather dicts or `beam.Row`s into batches of columns.

    Input: mappings or Rows with the columns of `schema`; other keys are ignored.
    Output: batches of `schema`, at most `max_rows` each, gathered within a bundle and
    window. Where `schema` has an `event_time` that a row lacks, it is the element's
    timestamp.

    A batch has one timestamp, the earliest of its elements'. Don't put a WindowInto on
    batches: it would put all rows of a batch into the window of that one timestamp. The
    transforms of this package window rows by their `event_time`.

    Args:
      schema: Columns; those that are not nullable must be there.
      max_rows: Rows a batch holds at most.

    Raises:
      ValueError: (at run time) a row lacks a column, or a value has another type.
    """

    schema: pa.Schema
    max_rows: int = 10_000

    def __post_init__(self) -> None:
        if self.max_rows <= 0:
            raise ValueError(f"max_rows must be positive, got {self.max_rows}")

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        return rows | "Gather rows" >> beam.ParDo(
            _GatherFn(self.schema, self.max_rows)
        ).with_output_types(BatchOf(self.schema))


class _GatherFn(beam.DoFn):
    def __init__(self, schema: pa.Schema, max_rows: int) -> None:
        self.schema = schema
        self.max_rows = max_rows

    def start_bundle(self) -> None:
        self._rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        self._earliest: dict[Any, Timestamp] = {}

    def process(
        self,
        element: Any,
        timestamp: Any = beam.DoFn.TimestampParam,
        window: Any = beam.DoFn.WindowParam,
    ) -> Iterator[WindowedValue]:
        row = dict(element) if isinstance(element, Mapping) else element._asdict()
        if EVENT_TIME in self.schema.names and row.get(EVENT_TIME) is None:
            if timestamp == MIN_TIMESTAMP:
                raise ValueError(f"a row has neither {EVENT_TIME} nor a timestamp")
            row[EVENT_TIME] = _EPOCH + timedelta(microseconds=timestamp.micros)
        self._rows[window].append(row)
        self._earliest[window] = min(timestamp, self._earliest.get(window, timestamp))
        if len(self._rows[window]) >= self.max_rows:
            yield self._emit(window)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for window in list(self._rows):
            yield self._emit(window)

    def _emit(self, window: Any) -> WindowedValue:
        rows = self._rows.pop(window)
        batch = batch_of_rows(rows, self.schema)
        return WindowedValue(batch, self._earliest.pop(window), (window,))


@dataclass
class Unbatch(beam.PTransform):
    """Turn batches into one dict per row, each with its own event time.

    Input: batches. Output: dicts, by column; where the batches have an `event_time`, it
    is the dict's timestamp too, so what follows may window the rows. In a global window
    only: rows of a batch that was windowed before are not put into other windows.
    """

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        timed = EVENT_TIME in schema_of(batches).names
        return batches | "Rows" >> beam.FlatMap(_timed_rows if timed else _rows).with_output_types(
            dict[str, Any]
        )


def _rows(batch: Rows) -> list[dict[str, Any]]:
    return batch.to_pylist()


def _timed_rows(batch: Rows) -> Iterator[TimestampedValue]:
    times = batch[EVENT_TIME].cast(pa.int64()).to_pylist()
    for row, micros in zip(batch.to_pylist(), times, strict=True):
        yield TimestampedValue(row, Timestamp(micros=micros))
