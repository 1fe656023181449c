"""Files on the local disk: which ones there are, what they hold, and their lines."""

import glob
import gzip
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import apache_beam as beam
import numpy as np
import pyarrow as pa

from beam_pipelines.model.batches import BatchOf, empty_batch
from beam_pipelines.model.records import MAX_KEPT_BYTES, PAYLOADS
from beam_pipelines.model.span import Span, spanned

RANGE_BYTES = 64 << 20
"""Bytes of the decompressed stream that make a range of the lake."""

BLOCK_BYTES = 8 << 20
"""Bytes read at once, so about the most that a batch holds."""

MAX_BATCH_RECORDS = 50_000

_LOGGER = logging.getLogger(__name__)

_BEGINNING_BYTES = 64 << 10
_GZIP_MAGIC = b"\x1f\x8b"
_AVRO_MAGIC = b"Obj\x01"
_NEWLINE, _CARRIAGE_RETURN = b"\n\r"


@dataclass(frozen=True)
class InputFile:
    """A file as it was when the input was matched."""

    path: str
    size_bytes: int
    modified_us: int  # µs since 1970


def match(pattern: str) -> list[InputFile]:
    """Return the files that a pattern matches, each once, sorted by path.

    Of several names of one file (symbolic and hard links, `./a` for `a`) one is taken, and
    a warning names the others: a name that is no link rather than one that is, then one
    whose folders are no links, then the first by its absolute path.

    Args:
      pattern: A path, a glob (`**` spans folders), or several of them with commas between.
        Folders are skipped.

    Raises:
      FileNotFoundError: one of them matches no file.
      ValueError: the name of a file is not UTF-8.
    """
    paths: set[str] = set()
    for part in pattern.split(","):
        # A file may really be called a[1].log.
        found = [part] if os.path.isfile(part) else glob.glob(part, recursive=True)
        files = [path for path in found if os.path.isfile(path)]
        if not files:
            raise FileNotFoundError(
                f"no file matches {part!r}; give a path or a pattern, e.g. 'logs/*.gz'"
            )
        paths.update(files)
    names: dict[object, list[str]] = {}
    for path in sorted(paths):
        _require_utf8(path)
        names.setdefault(_file_behind(path), []).append(path)
    taken = sorted(_without_links(same) for same in names.values())
    stats = [(path, os.stat(path)) for path in taken]
    return [InputFile(path, stat.st_size, stat.st_mtime_ns // 1_000) for path, stat in stats]


def _require_utf8(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the name of the file {os.fsencode(path)!r} is not UTF-8, as the lake's and the "
            "dead letters' text is; rename it"
        ) from None


def _file_behind(path: str) -> object:
    """Return what the names of one file have in common."""
    stat = os.stat(path)
    # Some file systems number no files.
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path)


def _without_links(same: list[str]) -> str:
    """Return one of the names of a file, and warn of the others."""

    def rank(path: str) -> tuple[bool, bool, str, str]:
        absolute = os.path.abspath(path)
        return os.path.islink(path), os.path.realpath(path) != absolute, absolute, path

    taken = min(same, key=rank)
    for path in same:
        if path != taken:
            _LOGGER.warning("%r is left out: it is the same file as %r", path, taken)
    return taken


def detect_format(path: str) -> str | None:
    """Return what a file holds, judged by its beginning: `ndjson`, `access_log` or `avro`.

    An Avro container has its magic bytes. Else the first 100 lines that aren't blank decide:
    those that begin with `{` speak for ndjson, those with a time in brackets before a quoted
    request for access_log. None where all is blank: an empty file has every format.

    Raises:
      ValueError: neither prevails, or a gzip stream is corrupt.
    """
    with open_decompressed(path) as stream:
        beginning = read_block(stream, path, 0, _BEGINNING_BYTES)
    if beginning.startswith(_AVRO_MAGIC):
        return "avro"
    lines = [line for line in beginning.split(b"\n") if line.strip()][:100]
    if not lines:
        return None
    json_lines = sum(line.lstrip().startswith(b"{") for line in lines)
    log_lines = sum(_is_logged_request(line) for line in lines)
    if json_lines == log_lines:
        raise ValueError(
            f"can't tell what {path} holds: of its first {len(lines)} lines {json_lines} look "
            f"like ndjson and {log_lines} like access_log; say --format=ndjson, "
            "--format=access_log or --format=avro"
        )
    return "ndjson" if json_lines > log_lines else "access_log"


def _is_logged_request(line: bytes) -> bool:
    before, _, rest = line.partition(b" [")
    time, _, request = rest.partition(b"] ")
    return not before.lstrip().startswith(b"{") and bool(time) and request.startswith(b'"')


def is_gzip(path: str) -> bool:
    """Return whether a file is called .gz, or begins as gzip files do."""
    if path.endswith(".gz"):
        return True
    with open(path, "rb") as stream:
        return stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


def open_decompressed(path: str) -> BinaryIO:
    """Open a plain or gzip file (of any number of members) to read its decompressed bytes."""
    return cast(BinaryIO, gzip.open(path)) if is_gzip(path) else open(path, "rb")


def read_block(stream: BinaryIO, path: str, offset: int, size_bytes: int = BLOCK_BYTES) -> bytes:
    """Read the next bytes of a file that `open_decompressed` opened; none at its end.

    Args:
      stream: Where to read from.
      path: The file's path, and
      offset: how far it has been read: both for the message of an error.
      size_bytes: How many bytes to read; there are fewer at the end only.

    Raises:
      ValueError: a gzip stream is corrupt or cut short.
    """
    try:
        block = stream.read(size_bytes)
        if not block and not offset and is_gzip(path) and not os.path.getsize(path):
            raise EOFError("a gzip file is never empty")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} can't be decompressed within {size_bytes} bytes after offset {offset}: {error}"
        ) from error
    return block


def check_unchanged(file: InputFile) -> None:
    """Raise ValueError where a file is not what it was when it was matched.

    A file that was rewritten with as many bytes tells it by its time of modification.
    """
    stat = os.stat(file.path)
    if stat.st_size != file.size_bytes:
        raise ValueError(
            f"{file.path} had {file.size_bytes} bytes when the run began and has {stat.st_size} "
            "now; read files that nobody writes any more"
        )
    if stat.st_mtime_ns // 1_000 != file.modified_us:
        raise ValueError(
            f"{file.path} was modified while it was read: at {_shown_time(file.modified_us)} "
            f"when the run began, at {_shown_time(stat.st_mtime_ns // 1_000)} now; read files "
            "that nobody writes any more"
        )


def _shown_time(micros: int) -> str:
    return str(np.datetime64(micros, "us")) + "Z"


class SpanCutter:
    """Cuts what is read from a file, in order, into spans and their batches.

    The spans tile the ranges without hole or overlap. A record belongs to the range that
    holds its first byte; a range in which no record begins gets a span without records.
    """

    def __init__(self, topic: str, range_bytes: int = RANGE_BYTES, range_start: int = 0) -> None:
        self._topic = topic
        self._range_bytes = range_bytes
        self._range_start = range_start
        self._covered = range_start

    def cut(
        self, records: pa.RecordBatch, next_offset: int, at_end: bool
    ) -> Iterator[tuple[Span, pa.RecordBatch]]:
        """Cut the next records.

        Args:
          records: Batch of PAYLOADS, in offset order, beginning where the last one ended.
          next_offset: Where the record after them begins, or the file ends.
          at_end: Whether the file ends there.
        """
        offsets = records["offset"].to_numpy()
        row = 0
        while True:
            range_end = self._range_start + self._range_bytes
            stop = min(row + MAX_BATCH_RECORDS, int(offsets.searchsorted(range_end)))
            reached = int(offsets[stop]) if stop < len(offsets) else next_offset
            ended = at_end and stop == len(offsets)
            end, last = min(reached, range_end), ended or reached >= range_end
            if last or stop > row:
                yield (
                    Span(self._topic, 0, self._range_start, range_end, self._covered, end, last),
                    records.slice(row, stop - row),
                )
                self._covered = end
            row = stop
            if reached > range_end or (last and not ended):
                self._range_start = range_end
            elif ended or stop == len(offsets):
                return


@dataclass
class ReadLines(beam.PTransform):
    r"""Read the lines of text files, plain or gzip.

    Output: (Span, batch of PAYLOADS), with topic = path and partition 0. A payload is a line
    without its `\n` or `\r\n`. A blank line is a payload of no bytes; nothing follows the
    last newline, which may be missing. Of a line longer than `MAX_KEPT_BYTES` it is the first
    bytes, and a warning tells its length; the rest is passed over and never held. An offset
    is that of the line's first byte in the decompressed stream. There is no append time: a
    file is complete.

    A line belongs to the range of `RANGE_BYTES` that holds its first byte. What a range
    yields comes in offset order from one element, within one bundle; the ranges of a plain
    file are read in parallel where the runner can, a gzip file in one go.

    Args:
      files: What to read, as `match` found it.

    Raises:
      ValueError: (at run time) a file was changed, or a gzip stream is corrupt or cut short.
    """

    files: list[InputFile]

    def expand(self, pipeline: beam.pvalue.PBegin) -> beam.PCollection:
        pieces: list[tuple[InputFile, int | None]] = []
        for file in self.files:
            whole = is_gzip(file.path)
            starts = [None] if whole else range(0, max(file.size_bytes, 1), RANGE_BYTES)
            pieces += [(file, start) for start in starts]
        return (
            pipeline
            | "Ranges" >> beam.Create(pieces)
            | "Lines" >> beam.FlatMapTuple(read_lines).with_output_types(spanned(BatchOf(PAYLOADS)))
        )


def read_lines(
    file: InputFile,
    range_start: int | None = None,
    *,
    range_bytes: int = RANGE_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[Span, pa.RecordBatch]]:
    """Read the lines of a file as `ReadLines` describes it.

    Args:
      file: A plain or gzip file.
      range_start: Where the one range begins that is to be read, of a plain file; None: all
        ranges.
      range_bytes: Length of a range.
      block_bytes: How much to read at once.
    """
    check_unchanged(file)
    first = range_start or 0
    spans = SpanCutter(file.path, range_bytes, first)
    with open_decompressed(file.path) as stream:
        start = _next_line_start(stream, first, first + range_bytes) if first else 0
        if start >= first + range_bytes:  # amid a line that spans the whole range
            yield next(spans.cut(empty_batch(PAYLOADS), start, at_end=False))
            return
        block_bytes = min(block_bytes, MAX_KEPT_BYTES)
        for lines, next_offset, at_end in _line_batches(stream, file, start, block_bytes):
            for span, batch in spans.cut(lines, next_offset, at_end):
                yield span, batch
                if span.last and range_start is not None:
                    check_unchanged(file)
                    return


def _next_line_start(stream: BinaryIO, offset: int, limit: int) -> int:
    """Go to the first line that begins at `offset` or after it; don't look beyond `limit`."""
    position = stream.seek(offset - 1)
    while position < limit:
        piece = stream.readline(min(limit - position, BLOCK_BYTES))
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return position


def _line_batches(
    stream: BinaryIO, file: InputFile, start: int, block_bytes: int
) -> Iterator[tuple[pa.RecordBatch, int, bool]]:
    """Yield whole lines, where the next one begins, and whether the file ends there.

    No block is larger than what is kept of a line. So a line that is too long begins before
    the block that shows it, and is yielded by itself; no more of it is held than is kept.
    """
    block_start = start
    block = read_block(stream, file.path, start, block_bytes)
    unfinished: list[bytes] = []  # the beginning of a line, from `start` on: what is kept of it
    while True:
        block_end = block_start + len(block)
        following = read_block(stream, file.path, block_end, block_bytes) if block else b""
        at_end = not following
        if at_end:
            check_unchanged(file)
        first_end = block.find(b"\n")
        if first_end < 0:
            first_end = len(block)
        line_bytes = block_start + first_end - start
        if line_bytes > MAX_KEPT_BYTES:
            unfinished.append(block[: max(start + MAX_KEPT_BYTES - block_start, 0)])
            if first_end == len(block) and not at_end:  # the line goes on
                block_start, block = block_end, following
                continue
            _LOGGER.warning(
                "%r: the line at offset %d has %d bytes; its dead letter keeps the first %d",
                *(file.path, start, line_bytes, MAX_KEPT_BYTES),
            )
            line = _lines(b"".join(unfinished), start)
            unfinished, block = [], block[first_end + 1 :]
            start = block_end - len(block)
            yield line, start, at_end and not block
            if at_end and not block:
                return
        whole = len(block) if at_end else block.rfind(b"\n") + 1
        if whole or at_end:
            text = b"".join([*unfinished, block[:whole]])
            yield _lines(text, start), start + len(text), at_end
            start += len(text)
            unfinished = []
        if at_end:
            return
        unfinished.append(block[whole:])
        block_start, block = block_end, following


def _lines(text: bytes, start: int) -> pa.RecordBatch:
    """Split whole lines, the first of which begins at offset `start`."""
    characters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(characters == _NEWLINE)
    before_newline = characters[ends - 1] if len(ends) else characters[:0]
    if text and not text.endswith(b"\n"):
        ends = np.append(ends, len(text))
        before_newline = np.append(before_newline, 0)
    starts = np.zeros(len(ends), np.int64)
    starts[1:] = ends[:-1] + 1
    # Every other slice of the text is a line; those between are the line ends.
    bounds = np.empty((len(ends), 2), np.int32)
    bounds[:, 0] = starts
    bounds[:, 1] = ends - ((before_newline == _CARRIAGE_RETURN) & (ends > starts))
    slices = pa.BinaryArray.from_buffers(
        pa.binary(), max(bounds.size - 1, 0), [None, pa.py_buffer(bounds), pa.py_buffer(text)]
    )
    return pa.RecordBatch.from_arrays(
        [
            slices.take(pa.array(np.arange(0, bounds.size, 2))),
            pa.array(starts + start),
            pa.nulls(len(ends), PAYLOADS.field("append_time").type),
        ],
        schema=PAYLOADS,
    )
