"""Ranges of records as Parquet files: the bytes, and the writer for bounded input."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.io.lake.layout import (
    EIGHTHS,
    OPEN,
    Range,
    eighth,
    open_files,
    open_name,
    published_name,
)
from beam_pipelines.io.parquet import write_parquet
from beam_pipelines.io.publication import listed, published, remove
from beam_pipelines.kernels.columns import divided, micros
from beam_pipelines.model.batches import Rows, concatenated
from beam_pipelines.model.records import (
    EVENT_TIME,
    FUTURE,
    IDENTITY,
    PAYLOADS,
    VERDICT,
    declared_names,
)
from beam_pipelines.model.span import Span
from beam_pipelines.telemetry import Counter

ROW_GROUP_ROWS = 131_072

KEPT_TAILS = 2
"""Open files of an eighth and date that stay, so that a reader has time to read a file that it
found: endless input writes the next one `tail.TAIL_S` later."""

_DAY_US = 86_400_000_000


def lake_schema(rows: pa.Schema) -> pa.Schema:
    """Return the columns of the lake's files for rows as the time rule yields them.

    The declared columns and the identity, then where the record was read (topic,
    partition, offset), its append time and its verdict.
    """
    declared = [rows.field(name) for name in declared_names(rows)]
    return pa.schema(
        [
            *declared,
            IDENTITY,
            pa.field("topic", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("partition", pa.int32(), nullable=False),
            PAYLOADS.field("offset"),
            PAYLOADS.field("append_time"),
            VERDICT,
        ]
    )


class RangeFiles:
    """Writes the files of ranges into a lake.

    Args:
      folder: The lake.
      rows: Schema of the rows as the time rule yields them.
    """

    def __init__(self, folder: str, rows: pa.Schema) -> None:
        self.folder = folder
        self.schema = lake_schema(rows)
        self.gathered = pa.schema([field for field in rows if field.name in self.schema.names])
        self.written = Counter("rows_written.lake")

    def publish(
        self, of: Range, batches: list[pa.RecordBatch], known_end: int | None = None
    ) -> Iterator[str]:
        """Publish the rows of a range; yields the names of its files.

        Args:
          of: The range.
          batches: All its rows, in the order of their offsets.
          known_end: Up to where open files have them already.
        """
        rows = self._stored(of, batches)
        for day, of_day in divided(rows, _days(rows)):
            name = published_name(of, day)
            self._write(name, of_day)
            yield name
        self._count(rows, of.start if known_end is None else known_end)

    def write_open(
        self, of: Range, start: int, batches: list[pa.RecordBatch], known_end: int, covered_end: int
    ) -> None:
        """Write the rows of an eighth of a range, for the dates that gained some.

        Args:
          of: The range.
          start: Where the eighth starts.
          batches: All rows of [start, covered_end), in the order of their offsets.
          known_end: Up to where an earlier call wrote them.
          covered_end: Up to where they are known now.
        """
        rows = self._stored(of, batches)
        for day, of_day in divided(rows, _days(rows)):
            if of_day["offset"][-1].as_py() >= known_end:
                self._write(open_name(of, day, start, covered_end), of_day)
        self._count(rows, known_end)

    def write_tail(self, of: Range, batches: list[pa.RecordBatch], covered_end: int) -> None:
        """Write the open files of a range in which the input ended.

        Args:
          of: The range.
          batches: All rows of [its start, covered_end), in the order of their offsets.
          covered_end: Where the input ended.
        """
        rows = concatenated(batches, self.gathered)
        for number in range(EIGHTHS):
            start, end = eighth(number, of)
            if start < (end := min(end, covered_end)):
                self.write_open(of, start, [between(rows, start, end)], start, end)
        self.remove_open(of, kept=KEPT_TAILS)

    def remove_open(self, of: Range, kept: int) -> None:
        """Remove the open files of a range but for the longest `kept` of each eighth and date."""
        for names in open_files(listed(self.folder, OPEN), of).values():
            for name in names[kept:]:
                remove(self.folder, name)

    def _count(self, rows: pa.RecordBatch, known_end: int) -> None:
        """Count each row once: when it first lies in a file."""
        known = np.searchsorted(rows["offset"].to_numpy(), known_end)
        self.written.inc(len(rows) - int(known))

    def _write(self, name: str, rows: pa.RecordBatch) -> None:
        with published(self.folder, name) as path:
            write_parquet(_row_groups(rows), path)

    def _stored(self, of: Range, batches: list[pa.RecordBatch]) -> pa.RecordBatch:
        rows = concatenated(batches, self.gathered)
        future = pc.equal(rows[VERDICT.name].indices, FUTURE)
        if pc.any(future).as_py():
            rows = rows.filter(pc.invert(future))
        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        columns["topic"] = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(len(rows), np.int8)), pa.array([of.topic])
        )
        columns["partition"] = pa.array(np.full(len(rows), of.partition, np.int32))
        return pa.RecordBatch.from_arrays(
            [columns[name] for name in self.schema.names], schema=self.schema
        )


def between(rows: pa.RecordBatch, start: int, end: int) -> pa.RecordBatch:
    """Return the rows of offsets [start, end), where they come in the order of theirs."""
    first, last = np.searchsorted(rows["offset"].to_numpy(), (start, end)).tolist()
    return rows.slice(first, last - first)


def _days(rows: pa.RecordBatch) -> np.ndarray:
    days: np.ndarray = micros(rows[EVENT_TIME]) // _DAY_US
    return days


def _row_groups(rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), ROW_GROUP_ROWS):
        yield rows.slice(start, ROW_GROUP_ROWS)


@dataclass
class _OpenRange:
    covered: int  # up to this offset
    batches: list[pa.RecordBatch] = field(default_factory=list)


class WriteRangesFn(beam.DoFn):
    """Publishes ranges whose spans come in order, within one bundle.

    A range in which the input ends stays open: another run may read on, and what it writes
    would be hidden by a published file.
    """

    def __init__(self, folder: str, rows: pa.Schema) -> None:
        self.files = RangeFiles(folder, rows)

    def start_bundle(self) -> None:
        self._open: dict[Range, _OpenRange] = {}

    def process(self, element: tuple[Span, Rows]) -> Iterator[str]:
        span, rows = element
        key = Range(*span[:4])
        opened = self._open.setdefault(key, _OpenRange(covered=key.start))
        if span.start != opened.covered:
            raise RuntimeError(
                f"a span of {key} starts at {span.start}, but the ones before it "
                f"reach to {opened.covered}"
            )
        opened.covered = span.end
        if len(rows):
            opened.batches.append(rows.select(self.files.gathered.names))
        if span.last:
            del self._open[key]
            if span.open:
                self.files.write_tail(key, opened.batches, span.end)
            else:
                yield from self.files.publish(key, opened.batches)

    def finish_bundle(self) -> None:
        if self._open:
            key, opened = next(iter(self._open.items()))
            raise RuntimeError(
                f"a bundle ends at {opened.covered}, within {key}; the lake needs whole ranges"
            )
