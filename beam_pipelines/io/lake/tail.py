"""The writer for endless input: ranges gather in state, and show their open tail meanwhile.

Rows that are too large for state are put aside, in files beside those of the open tail, and only
their spans stay in state. Such a file is a pure function of its name and the topic, like all
others: whoever writes it again, after a crash or late, writes the same rows. It is removed
when its range has been published for a while, by anybody. So a writer that goes on from older
state and finds it gone knows that nothing is left to do for the range.
"""

import logging
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
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

from beam_pipelines.io.lake.layout import EIGHTHS, Range, eighth, eighth_of
from beam_pipelines.io.lake.ranges import KEPT_TAILS, RangeFiles, SpilledGone, between
from beam_pipelines.kernels.columns import in_pieces
from beam_pipelines.model.batches import BatchCoder, Rows
from beam_pipelines.model.span import Span
from beam_pipelines.transforms.bags import AddedBytes, taking_bags
from beam_pipelines.transforms.worker import tune_worker

TAIL_S = 10
"""Seconds of processing time between two writings of the open tail of a range."""

BAG_BYTES = 16 << 20
"""Above this, the state channels of runners have broken; a bag that holds more is logged."""

PAGE_BYTES = 4 << 20
"""Of the rows in a page: each is sent as a whole."""

PART_BYTES = 4 << 20
"""Of the rows of an eighth that stay in state when others are put aside."""

ADDED_BYTES = 8 << 20
"""Rows of a range are put aside once a process has put that many bytes of them into state: so it
holds some eight times `PART_BYTES` and this much at most."""

_OVERLAP = "some overlap; the source and the state of this job don't belong together"
_LOGGER = logging.getLogger(__name__)
_PAGE = struct.Struct("<qq?q")  # start, end, whether the input ends there, bytes put aside

KEYED_PAGES = typehints.Tuple[typehints.Tuple[str, int, int, int], bytes]


class PagesFn(beam.DoFn):
    """Turns (Span, batch) into (range, page): encoded here once, decoded to be written.

    A page lies within one eighth of its range: so a bag has all of one, and no more. It holds
    `PAGE_BYTES` of rows, or one that is larger.
    """

    def __init__(self, files: RangeFiles) -> None:
        self.columns = files.gathered.names
        self.coder = BatchCoder(files.gathered)

    def process(self, element: tuple[Span, Rows]) -> Iterator[tuple[tuple, bytes]]:
        span, rows = element
        of = Range(*span[:4])
        start = span.start
        while True:
            end = span.end
            if start < end:
                end = min(end, eighth(eighth_of(start, of), of)[1])
            part = rows if (start, end) == (span.start, span.end) else between(rows, start, end)
            for page in self._pages(part, start, end, span.last and end == span.end):
                yield tuple(of), page
            start = end
            if end == span.end:
                return

    def _pages(self, rows: pa.RecordBatch, start: int, end: int, last: bool) -> Iterator[bytes]:
        if not len(rows):
            yield _PAGE.pack(start, end, last, 0)
            return
        pieces = list(in_pieces(rows.select(self.columns), PAGE_BYTES))
        ends = [*(piece["offset"][0].as_py() for piece in pieces[1:]), end]
        for piece, piece_end in zip(pieces, ends, strict=True):
            header = _PAGE.pack(start, piece_end, last and piece_end == end, 0)
            yield header + self.coder.encode(piece)
            start = piece_end


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


_PAGES = [BagStateSpec(f"pages_{number}", BytesCoder()) for number in range(EIGHTHS)]
_WITH_PAGES = taking_bags("pages", _PAGES)


class _Part(NamedTuple):
    """The rows of an eighth of a range: all of [start, covered_end), by offset."""

    start: int
    pages: list[bytes]
    covered_end: int


class _Batches:
    """The rows of pages as batches, read again whenever they are iterated over."""

    def __init__(self, files: RangeFiles, coder: BatchCoder, of: Range, pages: list[bytes]) -> None:
        self.files, self.coder, self.of = files, coder, of
        self.pages = pages

    @property
    def size_bytes(self) -> int:
        return sum(len(page) + _PAGE.unpack_from(page)[3] for page in self.pages)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for page in self.pages:
            start, end, _, spilled_bytes = _PAGE.unpack_from(page)
            if spilled_bytes:
                yield from self.files.spilled(self.of, start, end)
            elif _has_rows(page):
                yield self.coder.decode(page[_PAGE.size :])


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
        self.added = AddedBytes()

    def setup(self) -> None:
        tune_worker()

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
        start, end, last, _ = _PAGE.unpack_from(page)
        before = progress.read()
        now = before
        if now is None or now.published:
            if start == end:  # it covers nothing
                return
            now = Progress(0, of.start, now is not None and now.timed, False)
        if start < end:
            pages[eighth_of(start, of)].add(page)
            if self.added.add(key, len(page)) > ADDED_BYTES:
                self._spill(of, pages)
        if last or end == of.end:
            now = now._replace(end=end)
        if now.end and (held := _held(pages)) >= now.end - of.start:
            gathered = list(self._gathered(of, pages, of.start))
            covered_end = gathered[-1].covered_end
            if held > now.end - of.start or covered_end < now.end:
                raise RuntimeError(
                    f"the spans of {of} hold {held} offsets, and reach to {covered_end}: {_OVERLAP}"
                )
            if now.end == of.end:
                batches = self._batches(of, [page for part in gathered for page in part.pages])
                with suppress(SpilledGone):
                    yield from self.files.publish(of, batches, now.open_end, batches.size_bytes)
                for bag in pages:
                    bag.clear()
                self.added.emptied(key)
                now = Progress(0, 0, False, True)
            else:
                # The input ends within the range. It may go on in another run, so this is no
                # published range, whose file would hide what the other one writes.
                now = self._shown(of, pages, now)
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
            self.files.remove_open(of, kept=0)
            progress.clear()
            return
        shown = min(eighth_of(now.open_end, of), EIGHTHS - 1)
        now = self._shown(of, pages, now)
        self._spill(of, pages[shown:])
        progress.write(now._replace(timed=False))

    def _shown(self, of: Range, pages: tuple, now: Progress) -> Progress:
        """Write the open files of a range that has news."""
        known_end = now.open_end
        for part in self._gathered(of, pages, known_end):
            if part.covered_end > now.open_end:
                batches = self._batches(of, part.pages)
                try:
                    self.files.write_open(
                        of, part.start, batches, known_end, part.covered_end, batches.size_bytes
                    )
                except SpilledGone:  # readers have the published files
                    return now
                now = now._replace(open_end=part.covered_end)
        if now.open_end > known_end:
            self.files.remove_open(of, kept=KEPT_TAILS)
        return now

    def _gathered(self, of: Range, pages: tuple, known_end: int) -> Iterator[_Part]:
        """Yield the rows that follow each other, an eighth at a time.

        Args:
          of: The range.
          pages: Its bags.
          known_end: An offset up to where all are there: those of its own eighth come first.
        """
        number = min(eighth_of(known_end, of), EIGHTHS - 1)
        start, end = eighth(number, of)
        while True:
            by_start = self._by_start(of, pages[number])
            following, covered_end = [], start
            while covered_end in by_start:
                following.append(by_start[covered_end])
                covered_end = _PAGE.unpack_from(following[-1])[1]
            yield _Part(start, following, covered_end)
            if covered_end < end or end == of.end:
                return
            number = eighth_of(end, of)
            start, end = eighth(number, of)

    def _by_start(self, of: Range, bag: Any) -> dict[int, bytes]:
        pages = list(bag.read())
        if (held := sum(map(len, pages))) > BAG_BYTES:
            _LOGGER.warning("%s: a bag of rows holds %d bytes", of, held)
        by_start = {_PAGE.unpack_from(page)[0]: page for page in pages}
        if len(by_start) < len(pages):
            raise RuntimeError(f"several spans of {of} begin at the same offset: " + _OVERLAP)
        return by_start

    def _batches(self, of: Range, pages: list[bytes]) -> _Batches:
        return _Batches(self.files, self.coder, of, pages)

    def _spill(self, of: Range, pages: tuple) -> None:
        """Put the rows of bags aside that hold many bytes, and keep their spans."""
        for bag in pages:
            held = sorted(bag.read(), key=_PAGE.unpack_from)
            if sum(len(page) for page in held if _has_rows(page)) <= PART_BYTES:
                continue
            bag.clear()
            for run in _runs(held):
                if any(map(_has_rows, run)):
                    start = _PAGE.unpack_from(run[0])[0]
                    _, end, last, _ = _PAGE.unpack_from(run[-1])
                    spilled_bytes = self.files.spill(of, start, end, list(self._batches(of, run)))
                    run = [_PAGE.pack(start, end, last, spilled_bytes)]
                for page in run:
                    bag.add(page)
        self.added.emptied(tuple(of))


def _has_rows(page: bytes) -> bool:
    """Whether a page holds rows itself, and hasn't put them aside."""
    return len(page) > _PAGE.size


def _runs(pages: list[bytes]) -> Iterator[list[bytes]]:
    """Divide pages, in the order of their offsets, into runs without a gap.

    One whose rows were put aside already is a run of its own.
    """
    run: list[bytes] = []
    for page in pages:
        start, _, _, spilled_bytes = _PAGE.unpack_from(page)
        if run and (spilled_bytes or _PAGE.unpack_from(run[-1])[1] != start):
            yield run
            run = []
        run.append(page)
        if spilled_bytes:
            yield run
            run = []
    yield from filter(None, [run])


def _turn_s(of: Range) -> float:
    """Return when a range is shown first: partitions that begin together then take turns."""
    return zlib.crc32(f"{of.topic} {of.partition}".encode()) % 1000 / 1000 * TAIL_S


def _held(pages: tuple) -> int:
    """Return how many offsets the spans of a range's pages have."""
    spans = (_PAGE.unpack_from(page) for bag in pages for page in bag.read())
    return sum(end - start for start, end, *_ in spans)
