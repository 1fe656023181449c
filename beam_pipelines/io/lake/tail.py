"""The writer for endless input: ranges gather in state, and show their open tail meanwhile."""

import logging
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
from apache_beam.coders import BooleanCoder, BytesCoder, Coder, TupleCoder, VarIntCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.typehints import typehints

from beam_pipelines.io.lake.layout import OPEN, Range, open_files
from beam_pipelines.io.lake.ranges import RangeFiles
from beam_pipelines.io.publication import listed, remove
from beam_pipelines.model.batches import BatchCoder, Rows
from beam_pipelines.model.span import Span

TAIL_S = 10
"""Seconds of processing time between two writings of the open tail of a range."""

BAG_BYTES = 14 << 20
"""Pages go to a range's next bag once it holds so much. With pages of up to 2 MB no bag
passes 16 MB, above which the state channels of runners have broken."""

_BAGS = 8
_ROOM_BYTES = _BAGS * BAG_BYTES

KEPT_TAILS = 2
"""Open files of a range and date that stay, so that a reader has `TAIL_S` to read a file
that it found."""

_LOGGER = logging.getLogger(__name__)
_PAGE = struct.Struct("<qq?")

KEYED_PAGES = typehints.Tuple[typehints.Tuple[str, int, int, int], bytes]


class PagesFn(beam.DoFn):
    """Turns (Span, batch) into (range, page): encoded here once, decoded to be written."""

    def __init__(self, files: RangeFiles) -> None:
        self.columns = files.gathered.names
        self.coder = BatchCoder(files.gathered)

    def process(self, element: tuple[Span, Rows]) -> Iterator[tuple[tuple, bytes]]:
        span, rows = element
        batch = self.coder.encode(rows.select(self.columns)) if len(rows) else b""
        yield tuple(span[:4]), _PAGE.pack(span.start, span.end, span.last) + batch


class Progress(NamedTuple):
    """What is known of a range, beside its pages.

    covered: offsets, over all its spans so far.
    end: where it is complete: its end, or the input's within it.
    paged_bytes: over all its pages.
    open_end: up to this offset its open files have been written.
    timed: whether a timer is set.
    published: whether its files are; then there are no pages.
    """

    covered: int
    end: int
    paged_bytes: int
    open_end: int
    timed: bool
    published: bool


class ProgressCoder(Coder):
    """Encodes progress field by field."""

    _fields = TupleCoder([VarIntCoder()] * 4 + [BooleanCoder()] * 2)

    def encode(self, value: Progress) -> bytes:
        encoded: bytes = self._fields.encode(tuple(value))
        return encoded

    def decode(self, encoded: bytes) -> Progress:
        return Progress(*self._fields.decode(encoded))

    def is_deterministic(self) -> bool:
        return True


class WriteTailsFn(beam.DoFn):
    """Publishes a range when its spans cover it, and its open tail while they don't.

    The spans of a range may come in any order, and never overlap. Every file is a pure
    function of its name, so it doesn't matter who writes it, how often and when. Files are
    removed only `TAIL_S` or more after what replaces them was there.

    Args:
      files: Writes the files.
      clock: Seconds since 1970. It decides when tails are written, never what they hold.
    """

    PAGES = tuple(BagStateSpec(f"pages_{i}", BytesCoder()) for i in range(_BAGS))
    PROGRESS = ReadModifyWriteStateSpec("progress", ProgressCoder())
    TAIL = TimerSpec("tail", TimeDomain.REAL_TIME)

    def __init__(self, files: RangeFiles, clock: Callable[[], float]) -> None:
        self.files = files
        self.clock = clock
        self.coder = BatchCoder(files.gathered)

    def process(
        self,
        element: tuple[tuple, bytes],
        pages_0: Any = beam.DoFn.StateParam(PAGES[0]),
        pages_1: Any = beam.DoFn.StateParam(PAGES[1]),
        pages_2: Any = beam.DoFn.StateParam(PAGES[2]),
        pages_3: Any = beam.DoFn.StateParam(PAGES[3]),
        pages_4: Any = beam.DoFn.StateParam(PAGES[4]),
        pages_5: Any = beam.DoFn.StateParam(PAGES[5]),
        pages_6: Any = beam.DoFn.StateParam(PAGES[6]),
        pages_7: Any = beam.DoFn.StateParam(PAGES[7]),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        tail: Any = beam.DoFn.TimerParam(TAIL),
    ) -> Iterator[str]:
        bags = (pages_0, pages_1, pages_2, pages_3, pages_4, pages_5, pages_6, pages_7)
        key, page = element
        of = Range(*key)
        now = progress.read()
        timed = now is not None and now.timed
        if now is None or now.published:
            now = Progress(0, of.end, 0, of.start, timed, False)
        if now.paged_bytes < _ROOM_BYTES <= now.paged_bytes + len(page):
            _LOGGER.warning("%s: rows of more than %d bytes wait in state", of, _ROOM_BYTES)
        bags[min(now.paged_bytes // BAG_BYTES, _BAGS - 1)].add(page)
        start, end, last = _PAGE.unpack_from(page)
        now = now._replace(
            covered=now.covered + end - start,
            end=end if last else now.end,
            paged_bytes=now.paged_bytes + len(page),
        )
        complete = now.covered >= now.end - of.start
        if complete and now.end == of.end:
            batches, covered_end = self._gathered(of, _used(bags, now))
            if covered_end != of.end:
                raise RuntimeError(
                    f"the spans of {of} hold enough offsets, but reach to {covered_end} only: "
                    "some overlap; the source and the state of this job don't belong together"
                )
            yield from self.files.publish(of, batches, now.open_end)
            for used in _used(bags, now):
                used.clear()
            now = Progress(0, 0, 0, 0, False, True)
        elif complete:
            # The input ends within the range. It may go on in another run, so this is no
            # published range, whose file would hide what the other one writes.
            now = self._shown(of, bags, now)
        if now.published or not now.timed:
            tail.set(self.clock() + TAIL_S)
        progress.write(now._replace(timed=True))

    @on_timer(TAIL)
    def write_tail(
        self,
        key: Any = beam.DoFn.KeyParam,
        pages_0: Any = beam.DoFn.StateParam(PAGES[0]),
        pages_1: Any = beam.DoFn.StateParam(PAGES[1]),
        pages_2: Any = beam.DoFn.StateParam(PAGES[2]),
        pages_3: Any = beam.DoFn.StateParam(PAGES[3]),
        pages_4: Any = beam.DoFn.StateParam(PAGES[4]),
        pages_5: Any = beam.DoFn.StateParam(PAGES[5]),
        pages_6: Any = beam.DoFn.StateParam(PAGES[6]),
        pages_7: Any = beam.DoFn.StateParam(PAGES[7]),
        progress: Any = beam.DoFn.StateParam(PROGRESS),
    ) -> None:
        bags = (pages_0, pages_1, pages_2, pages_3, pages_4, pages_5, pages_6, pages_7)
        of = Range(*key)
        now = progress.read()
        if now is None:
            return
        if now.published:
            self._remove_open(of, kept=0)
            progress.clear()
            return
        now = self._shown(of, bags, now)
        progress.write(now._replace(timed=False))

    def _shown(self, of: Range, bags: tuple, now: Progress) -> Progress:
        """Write the open files of a range that has news."""
        batches, covered_end = self._gathered(of, _used(bags, now))
        if covered_end <= now.open_end:
            return now
        self.files.write_open(of, batches, now.open_end, covered_end)
        self._remove_open(of, kept=KEPT_TAILS)
        return now._replace(open_end=covered_end)

    def _gathered(self, of: Range, bags: tuple) -> tuple[list[pa.RecordBatch], int]:
        """Return the rows that follow each other from the range's start, and where they end."""
        pages = sorted((_PAGE.unpack_from(page), page) for bag in bags for page in bag.read())
        batches, covered_end = [], of.start
        for (start, end, _), page in pages:
            if start != covered_end:
                break
            if len(page) > _PAGE.size:
                batches.append(self.coder.decode(page[_PAGE.size :]))
            covered_end = end
        return batches, covered_end

    def _remove_open(self, of: Range, kept: int) -> None:
        for names in open_files(listed(self.files.folder, OPEN), of).values():
            for name in names[kept:]:
                remove(self.files.folder, name)


def _used(bags: tuple, now: Progress) -> tuple:
    return bags[: now.paged_bytes // BAG_BYTES + 1]
