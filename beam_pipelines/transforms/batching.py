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

from beam_pipelines.kernels.epoch import UNITS_NS, epoch_micros
from beam_pipelines.model.batches import BatchOf, Rows, batch_of_rows, schema_of
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP, with_append_time

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Batch(beam.PTransform):
    """Gather dicts or `beam.Row`s into batches of columns.

    Input: mappings or Rows with the columns of `schema`; other keys are ignored.
    Output: batches of `schema`, at most `max_rows` each, gathered within a bundle and
    window. Where `schema` has an `event_time` that a row lacks, it is the element's
    timestamp.

    Columns of type `TIMESTAMP` (timestamp[us, UTC]) take aware `datetime`s, RFC 3339 text, and
    integers where `time_unit` names their unit. Integers before 1973-03-03 are refused, as
    they look like times of a coarser unit; so are floats and naive `datetime`s.

    Nobody has judged how late these rows are. On unbounded input name the column with the
    time at which a row was stored, and let `ClassifyLateness` follow: windows, sessions and
    dedupe refuse the batches without, as a runner drops rows that are too late unseen.

    A batch has one timestamp, the earliest of its elements'. Don't put a WindowInto on
    batches: it would put all rows of a batch into the window of that one timestamp. The
    transforms of this package window rows by their `event_time`.

    Args:
      schema: Columns; those that are not nullable must be there.
      max_rows: Rows a batch holds at most.
      append_time: Column that holds when a row was stored, for `ClassifyLateness`; None:
        there is none.
      time_unit: Unit of integers in columns of time: `s`, `ms`, `us` or `ns`, since 1970.

    Raises:
      ValueError: `append_time` is no column of type `TIMESTAMP`, `event_time` has another
        type, or the unit is unknown; (at run time) a row lacks a column, or a value has
        another type or is no time.
    """

    schema: pa.Schema
    max_rows: int = 10_000
    append_time: str | None = None
    time_unit: str | None = None

    def __post_init__(self) -> None:
        if self.max_rows <= 0:
            raise ValueError(f"max_rows must be positive, got {self.max_rows}")
        if self.time_unit not in (None, *UNITS_NS):
            raise ValueError(f"time_unit is one of {', '.join(UNITS_NS)}, not {self.time_unit!r}")
        if EVENT_TIME in self.schema.names and self.schema.field(EVENT_TIME).type != TIMESTAMP:
            found = self.schema.field(EVENT_TIME).type
            raise ValueError(f"{EVENT_TIME} must be {TIMESTAMP}, it is {found}")
        if self.append_time is not None:
            self.schema = with_append_time(self.schema, self.append_time)

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        return rows | "Gather rows" >> beam.ParDo(
            _GatherFn(self.schema, self.max_rows, self.time_unit)
        ).with_output_types(BatchOf(self.schema))


class _GatherFn(beam.DoFn):
    def __init__(self, schema: pa.Schema, max_rows: int, time_unit: str | None) -> None:
        self.schema = schema
        self.max_rows = max_rows
        self.time_unit = time_unit
        self.times = [field.name for field in schema if field.type == TIMESTAMP]

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
        for name in self.times:
            if row.get(name) is not None:
                row[name] = epoch_micros(row[name], name, self.time_unit)
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
