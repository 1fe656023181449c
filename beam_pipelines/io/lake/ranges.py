"""Ranges of records as Parquet files: the bytes, and the writer for bounded input."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.io.lake.layout import (
    EIGHTHS,
    Range,
    eighth,
    is_published,
    open_files,
    open_folder,
    open_name,
    published_name,
    spilled_files,
    spilled_name,
)
from beam_pipelines.io.parquet import write_parquet
from beam_pipelines.io.publication import listed, published, remove, stored
from beam_pipelines.kernels.columns import divided, micros, row_bytes
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

ROW_GROUP_BYTES = 64 << 20
"""Of the rows of a row group, before they are encoded; a larger row is one of its own."""

IN_MEMORY_BYTES = 64 << 20
"""Rows of a range, or of dates in it, that are gathered in memory."""

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


class SpilledGone(Exception):  # noqa: N818 (what it means is up to who catches it)
    """Rows that were put aside are no longer there: their range was published since."""


class RangeFiles:
    """Writes the files of ranges into a lake.

    Rows are given as batches in the order of their offsets, which may be iterated over several
    times. Those of a file are gathered in memory as far as `IN_MEMORY_BYTES` go; beyond, they
    are read once to see which dates there are, and then for each date, or for several small
    ones, again.

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
        self,
        of: Range,
        batches: Iterable[pa.RecordBatch],
        known_end: int | None = None,
        size_bytes: int | None = None,
    ) -> Iterator[str]:
        """Publish the rows of a range; yields the names of its files.

        Args:
          of: The range.
          batches: All its rows.
          known_end: Up to where open files have them already.
          size_bytes: How large the batches are; None: they are in memory.

        Raises:
          SpilledGone: the range was published by somebody else.
        """
        known_end = of.start if known_end is None else known_end
        for day, rows, _ in self._by_day(of, batches, size_bytes, known_end):
            name = published_name(of, day)
            self._write(name, rows)
            yield name

    def write_open(
        self,
        of: Range,
        start: int,
        batches: Iterable[pa.RecordBatch],
        known_end: int,
        covered_end: int,
        size_bytes: int | None = None,
    ) -> None:
        """Write the rows of an eighth of a range, for the dates that gained some.

        Args:
          of: The range.
          start: Where the eighth starts.
          batches: All rows of [start, covered_end).
          known_end: Up to where an earlier call wrote them.
          covered_end: Up to where they are known now.
          size_bytes: How large the batches are; None: they are in memory.

        Raises:
          SpilledGone: the range was published by somebody else.
        """
        for day, rows, last_offset in self._by_day(of, batches, size_bytes, known_end):
            if last_offset >= known_end:
                self._write(open_name(of, day, start, covered_end), rows)

    def write_tail(self, of: Range, batches: list[pa.RecordBatch], covered_end: int) -> None:
        """Write the open files of a range in which the input ended.

        Args:
          of: The range.
          batches: All rows of [its start, covered_end).
          covered_end: Where the input ended.
        """
        for number in range(EIGHTHS):
            start, end = eighth(number, of)
            if start < (end := min(end, covered_end)):
                rows = [between(batch, start, end) for batch in batches]
                self.write_open(of, start, rows, start, end)
        self.remove_open(of, kept=KEPT_TAILS)

    def remove_open(self, of: Range, kept: int) -> None:
        """Remove open files of a range, but for the longest `kept` of each eighth and date.

        If none is kept the rows that were put aside are removed, too.
        """
        names = listed(self.folder, open_folder(of))
        superseded = [name for files in open_files(names, of).values() for name in files[kept:]]
        for name in superseded if kept else [*superseded, *spilled_files(names, of)]:
            remove(self.folder, name)

    def spill(self, of: Range, start: int, end: int, batches: list[pa.RecordBatch]) -> int:
        """Put the rows of [start, end) aside; returns their size in bytes, 0 if none is stored."""
        kept = [rows for batch in batches if len(rows := _without_future(batch))]
        if not kept:
            return 0
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            published(self.folder, spilled_name(of, start, end)) as path,
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_stream(file, self.gathered, options=options) as stream,
        ):
            for rows in kept:
                stream.write_batch(rows)
        return sum(rows.nbytes for rows in kept)

    def spilled(self, of: Range, start: int, end: int) -> Iterator[pa.RecordBatch]:
        """Yield rows that were put aside.

        Raises:
          SpilledGone: they were removed, as is done once their range was published.
          RuntimeError: they were removed, and it wasn't: the lake has lost files.
        """
        try:
            content = stored(self.folder, spilled_name(of, start, end))
        except FileNotFoundError:
            if is_published(listed(self.folder), of):
                raise SpilledGone from None
            raise RuntimeError(
                f"{spilled_name(of, start, end)} is gone from the lake, and {of} isn't published: "
                "restore the file, or start a new job on another lake"
            ) from None
        with pa.ipc.open_stream(content) as stream:
            yield from stream

    def _by_day(
        self,
        of: Range,
        batches: Iterable[pa.RecordBatch],
        size_bytes: int | None,
        known_end: int,
    ) -> Iterator[tuple[int, Iterable[pa.RecordBatch], int]]:
        """Yield (day, its rows, the offset of the last one), by ascending day."""
        if size_bytes is None:
            size_bytes = sum(batch.nbytes for batch in batches)
        if size_bytes <= IN_MEMORY_BYTES:
            rows = self._stored(of, list(batches))
            self.written.inc(_new(rows, known_end))
            for day, of_day in divided(rows, _days(rows)):
                yield day, [of_day], of_day["offset"][-1].as_py()
            return
        sizes: defaultdict[int, int] = defaultdict(int)
        last_offsets: dict[int, int] = {}
        new = 0
        for rows in self._each_stored(of, batches):
            new += _new(rows, known_end)
            for day, of_day in divided(rows, _days(rows)):
                sizes[day] += of_day.nbytes
                last_offsets[day] = of_day["offset"][-1].as_py()
        self.written.inc(new)
        for days in _together(sizes):
            if len(days) == 1:
                yield days[0], self._of_day(of, batches, days[0]), last_offsets[days[0]]
                continue
            gathered: dict[int, list[pa.RecordBatch]] = {day: [] for day in days}
            for rows in self._each_stored(of, batches):
                for day, of_day in divided(rows, _days(rows)):
                    if day in gathered:
                        gathered[day].append(of_day)
            for day in days:
                yield day, gathered[day], last_offsets[day]

    def _of_day(
        self, of: Range, batches: Iterable[pa.RecordBatch], day: int
    ) -> Iterator[pa.RecordBatch]:
        for rows in self._each_stored(of, batches):
            of_day = rows.filter(pa.array(_days(rows) == day))
            if len(of_day):
                yield of_day

    def _each_stored(
        self, of: Range, batches: Iterable[pa.RecordBatch]
    ) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield self._stored(of, [batch])

    def _write(self, name: str, rows: Iterable[pa.RecordBatch]) -> None:
        with published(self.folder, name) as path:
            write_parquet(_row_groups(rows, self.schema), path)

    def _stored(self, of: Range, batches: list[pa.RecordBatch]) -> pa.RecordBatch:
        rows = _without_future(concatenated(batches, self.gathered))
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


def _without_future(rows: pa.RecordBatch) -> pa.RecordBatch:
    future = pc.equal(rows[VERDICT.name].indices, FUTURE)
    return rows.filter(pc.invert(future)) if pc.any(future).as_py() else rows


def _new(rows: pa.RecordBatch, known_end: int) -> int:
    """Count rows that no file has yet: each counts when it first lies in one."""
    return len(rows) - int(np.searchsorted(rows["offset"].to_numpy(), known_end))


def _days(rows: pa.RecordBatch) -> np.ndarray:
    days: np.ndarray = micros(rows[EVENT_TIME]) // _DAY_US
    return days


def _together(sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Divide days into groups that fit in memory, and days that don't, by ascending day."""
    group: list[int] = []
    for day, size_bytes in sorted(sizes.items()):
        if group and sum(sizes[other] for other in group) + size_bytes > IN_MEMORY_BYTES:
            yield group
            group = []
        group.append(day)
    yield from filter(None, [group])


def _row_groups(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Cut rows into row groups: a function of the rows, whatever batches they come in."""
    group: list[pa.RecordBatch] = []
    room_rows, room_bytes = ROW_GROUP_ROWS, ROW_GROUP_BYTES
    for rows in batches:
        ends = np.cumsum(row_bytes(rows))
        start, before = 0, 0
        while start < len(rows):
            fitting = int(np.searchsorted(ends, before + room_bytes, side="right")) - start
            taken = min(fitting, room_rows, len(rows) - start)
            if taken == 0 and not group:
                taken = 1  # larger than a row group should be
            if taken:
                group.append(rows.slice(start, taken))
                room_rows -= taken
                room_bytes -= int(ends[start + taken - 1]) - before
                start, before = start + taken, int(ends[start + taken - 1])
            if start < len(rows):
                yield concatenated(group, schema)
                group, room_rows, room_bytes = [], ROW_GROUP_ROWS, ROW_GROUP_BYTES
    if group:
        yield concatenated(group, schema)


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
