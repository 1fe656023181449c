"""The writer for endless input: ranges gather in state, and show their open tail meanwhile."""

import logging
import struct
import zlib
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
from beam_pipelines.transforms.bags import taking_bags

TAIL_S = 10
"""Seconds of processing time between two writings of the open tail of a range."""

BAGS = 8
"""A range's pages lie in so many bags, each in that of the eighth of the range it begins in."""

BAG_BYTES = 16 << 20
"""Above this, the state channels of runners have broken; a bag that holds more is logged."""

KEPT_TAILS = 2
"""Open files of a range and date that stay, so that a reader has `TAIL_S` to read a file
that it found."""

_OVERLAP = "some overlap; the source and the state of this job don't belong together"
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

    It changes with a firing and at the end of a range, not with every page: each change has
    its price, and a reader of many partitions brings as many pages at once.

    end: where it is complete: its end, or the input's within it; 0 until that is known.
    open_end: up to this offset its open files have been written.
    timed: whether a timer is set.
    published: whether its files are; then there are no pages.
    """

    end: int
    open_end: int
    timed: bool
    published: bool


class ProgressCoder(Coder):
    """Encodes progress field by field."""

    _fields = TupleCoder([VarIntCoder()] * 2 + [BooleanCoder()] * 2)

    def encode(self, value: Progress) -> bytes:
        encoded: bytes = self._fields.encode(tuple(value))
        return encoded

    def decode(self, encoded: bytes) -> Progress:
        return Progress(*self._fields.decode(encoded))

    def is_deterministic(self) -> bool:
        return True


_PAGES = [BagStateSpec(f"pages_{number}", BytesCoder()) for number in range(BAGS)]
_WITH_PAGES = taking_bags("pages", _PAGES)


class WriteTailsFn(beam.DoFn):
    """Publishes a range when its spans cover it, and its open tail while they don't.

    The spans of a range may come in any order, and never overlap. Every file is a pure
    function of its name, so it doesn't matter who writes it, how often and when. Files are
    removed only `TAIL_S` or more after what replaces them was there.

    Args:
      files: Writes the files.
      clock: Seconds since 1970. It decides when tails are written, never what they hold.
    """

    PROGRESS = ReadModifyWriteStateSpec("progress", ProgressCoder())
    TAIL = TimerSpec("tail", TimeDomain.REAL_TIME)

    def __init__(self, files: RangeFiles, clock: Callable[[], float]) -> None:
        self.files = files
        self.clock = clock
        self.coder = BatchCoder(files.gathered)

    @_WITH_PAGES
    def process(
        self,
        element: tuple[tuple, bytes],
        pages: Any,
        progress: Any = beam.DoFn.StateParam(PROGRESS),
        tail: Any = beam.DoFn.TimerParam(TAIL),
    ) -> Iterator[str]:
        key, page = element
        of = Range(*key)
        start, end, last = _PAGE.unpack_from(page)
        before = progress.read()
        now = before
        if now is None or now.published:
            if start == end:  # it covers nothing
                return
            now = Progress(0, of.start, now is not None and now.timed, False)
        if start < end:
            pages[_bag_of(start, of)].add(page)
        if last or end == of.end:
            now = now._replace(end=end)
        if now.end:
            batches, covered_end = self._gathered(of, pages)
            if covered_end == now.end == of.end:
                yield from self.files.publish(of, batches, now.open_end)
                for bag in pages:
                    bag.clear()
                now = Progress(0, 0, False, True)
            elif covered_end == now.end:
                # The input ends within the range. It may go on in another run, so this is no
                # published range, whose file would hide what the other one writes.
                now = self._shown(of, batches, covered_end, now)
            elif _held(pages) >= now.end - of.start:
                raise RuntimeError(
                    f"the spans of {of} hold enough offsets, but reach to {covered_end} only: "
                    + _OVERLAP
                )
        if now.published or not now.timed:
            shown = now.published or now.open_end > of.start
            tail.set(self.clock() + (TAIL_S if shown else _turn_s(of)))
        now = now._replace(timed=True)
        if now != before:
            progress.write(now)

    @on_timer(TAIL)
    @_WITH_PAGES
    def write_tail(
        self,
        pages: Any,
        key: Any = beam.DoFn.KeyParam,
        progress: Any = beam.DoFn.StateParam(PROGRESS),
    ) -> None:
        of = Range(*key)
        now = progress.read()
        if now is None:
            return
        if now.published:
            self._remove_open(of, kept=0)
            progress.clear()
            return
        now = self._shown(of, *self._gathered(of, pages), now)
        progress.write(now._replace(timed=False))

    def _shown(
        self, of: Range, batches: list[pa.RecordBatch], covered_end: int, now: Progress
    ) -> Progress:
        """Write the open files of a range that has news."""
        if covered_end <= now.open_end:
            return now
        self.files.write_open(of, batches, now.open_end, covered_end)
        self._remove_open(of, kept=KEPT_TAILS)
        return now._replace(open_end=covered_end)

    def _gathered(self, of: Range, pages: tuple) -> tuple[list[pa.RecordBatch], int]:
        """Return the rows that follow each other from the range's start, and where they end."""
        batches, covered_end = [], of.start
        known: dict[int, bytes] = {}
        read: set[int] = set()
        while covered_end < of.end:
            bag = _bag_of(covered_end, of)
            if bag not in read:
                read.add(bag)
                known |= self._by_start(of, pages[bag])
            if covered_end not in known:
                break
            page = known[covered_end]
            _, covered_end, _ = _PAGE.unpack_from(page)
            if len(page) > _PAGE.size:
                batches.append(self.coder.decode(page[_PAGE.size :]))
        return batches, covered_end

    def _by_start(self, of: Range, bag: Any) -> dict[int, bytes]:
        pages = list(bag.read())
        if (held := sum(map(len, pages))) > BAG_BYTES:
            _LOGGER.warning("%s: a bag of rows holds %d bytes", of, held)
        by_start = {_PAGE.unpack_from(page)[0]: page for page in pages}
        if len(by_start) < len(pages):
            raise RuntimeError(f"several spans of {of} begin at the same offset: " + _OVERLAP)
        return by_start

    def _remove_open(self, of: Range, kept: int) -> None:
        for names in open_files(listed(self.files.folder, OPEN), of).values():
            for name in names[kept:]:
                remove(self.files.folder, name)


def _turn_s(of: Range) -> float:
    """Return when a range is shown first: partitions that begin together then take turns."""
    return zlib.crc32(f"{of.topic} {of.partition}".encode()) % 1000 / 1000 * TAIL_S


def _bag_of(offset: int, of: Range) -> int:
    return (offset - of.start) * BAGS // (of.end - of.start)


def _held(pages: tuple) -> int:
    """Return how many offsets the spans of a range's pages have."""
    spans = (_PAGE.unpack_from(page) for bag in pages for page in bag.read())
    return sum(end - start for start, end, _ in spans)
