r"""Records that are all written alike, cut into columns without parsing them one by one.

Producers write every record of a topic with the same code, so the records of a batch
mostly differ in their values alone: `{"event_id":"…","event_time":"…"}`. A `Layout` is what
stays the same, as literals with a slot between two of them. It is learnt from one record,
then compared with all records at once, eight bytes at a time; those that have exactly its
literals, and in their slots plain strings (no backslash, no control character) or plain
integers, are valid JSON with exactly its keys. All others are left to a real parser.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa


class Bytes(NamedTuple):
    """The bytes of a binary column, row i from offsets[i] to offsets[i + 1]."""

    data: np.ndarray  # uint8, at least eight
    offsets: np.ndarray  # int64, one more than rows
    buffer: pa.Buffer  # the same bytes as `data`

    @classmethod
    def of(cls, column: pa.BinaryArray) -> "Bytes":
        """View a binary or string column, also a sliced one; nulls hold any bytes."""
        _, offsets_buffer, data_buffer = column.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int32)
        offsets = offsets[column.offset : column.offset + len(column) + 1].astype(np.int64)
        start, end = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
        buffer = data_buffer.slice(start, end - start) if data_buffer else pa.py_buffer(b"")
        if len(buffer) < _WORD:
            buffer = pa.py_buffer(buffer.to_pybytes().ljust(_WORD))
        return cls(np.frombuffer(buffer, np.uint8), offsets - start, buffer)

    @property
    def words(self) -> np.ndarray:
        """The eight bytes from each byte on, as little-endian uint64, without a copy."""
        return np.ndarray(len(self.data) - _WORD + 1, "<u8", self.data, strides=(1,))

    def per_row(self, flags: np.ndarray) -> np.ndarray:
        """Count the flagged bytes, which are few, in each row."""
        return self.counted(np.flatnonzero(flags))

    def counted(self, positions: np.ndarray) -> np.ndarray:
        """Count the positions, ascending and few, that lie in each row."""
        rows = np.searchsorted(self.offsets, positions, side="right") - 1
        rows_here = len(self.offsets) - 1  # a short column is padded behind its last row
        return np.bincount(rows, minlength=rows_here)[:rows_here]

    def cut(self, starts: np.ndarray, ends: np.ndarray) -> pa.StringArray:
        """Copy a stretch of each row, ascending, into a column; it must be UTF-8."""
        # As one column of stretches and the gaps between them, of which we take every other.
        bounds = np.empty(2 * len(starts) + 1, np.int32)
        bounds[0:-1:2], bounds[1::2] = starts, ends
        bounds[-1] = bounds[-2]
        column = pa.StringArray.from_buffers(2 * len(starts), pa.py_buffer(bounds), self.buffer)
        return column.take(pa.array(np.arange(0, 2 * len(starts), 2, dtype=np.int32)))


class Cut(NamedTuple):
    """Rows that have a layout, and their values."""

    rows: np.ndarray  # ascending indices
    # Key → strings, int64, or None where every one is null. Keys the layout lacks are absent.
    values: dict[str, pa.StringArray | np.ndarray | None]


@dataclass(frozen=True)
class _Slot:
    key: str
    is_text: bool
    is_read: bool


@dataclass(frozen=True)
class Layout:
    """What the records of a layout have in common.

    Args:
      literals: The bytes before, between and after the slots, without a backslash.
      slots: What lies between two literals: a string without its quotes, or an integer.
      nulls: Keys that are read and null in every record.
    """

    literals: tuple[bytes, ...]
    slots: tuple[_Slot, ...]
    nulls: tuple[str, ...]

    @classmethod
    def learn(cls, record: bytes, reads: Mapping[str, str]) -> "Layout | None":
        r"""Learn the layout of one record.

        Args:
          record: The record.
          reads: Keys that are read, and how: `"` as a string, `0` as an integer, `"0` as
            either. A key that is read otherwise maps to nothing of these.

        Returns:
          None where the record has no layout: no flat JSON object, a key twice, a backslash,
          a fraction, or a value that is to be read and is written in another way.
        """
        opening = _OPENING.match(record)
        if opening is None or len(record) > _LONGEST_BYTES:
            return None
        literals, slots, nulls, keys = [], [], [], []
        literal_start, position = 0, opening.end()
        while member := _MEMBER.match(record, position):
            try:
                key = member[1].decode()
            except UnicodeDecodeError:
                return None
            keys.append(key)
            first = member[2][:1]
            written = {b'"': '"', b"n": "null", b"t": "bool", b"f": "bool"}.get(first, "0")
            if key in reads and written != "null" and written not in reads[key]:
                return None
            if written == '"' or written == "0":
                inside = 1 if written == '"' else 0
                literals.append(record[literal_start : member.start(2) + inside])
                slots.append(_Slot(key, written == '"', key in reads))
                literal_start = member.end(2) - inside
            elif key in reads:
                nulls.append(key)
            position = member.end()
            if not member[3]:
                break
        else:
            return None
        if not slots or not _CLOSING.fullmatch(record, position) or len(set(keys)) < len(keys):
            return None
        if not all(_KEY_END in literal for literal in literals):
            return None  # white space before a colon
        return cls((*literals, record[literal_start:]), tuple(slots), tuple(nulls))

    @property
    def _skeleton(self) -> bytes:
        return b"".join(self.literals)

    def cut(self, text: Bytes, marks: "_Marks", rows: np.ndarray) -> Cut:
        """Cut the values out of those of the rows that have this layout."""
        skeleton, words = self._skeleton, text.words
        last = len(self.literals) - 1
        rows = rows[
            (marks.counts[rows] == skeleton.count(_KEY_END))
            & (marks.controls[rows] == sum(byte < _SPACE for byte in skeleton))
            & (text.offsets[rows + 1] - text.offsets[rows] >= max(len(skeleton), _WORD))
        ]
        row_starts, row_ends, first = text.offsets[rows], text.offsets[rows + 1], marks.first[rows]
        keys, starts = 0, []  # keys in the literals so far; where each literal starts
        good = np.ones(len(rows), bool)
        for i, literal in enumerate(self.literals):
            if i == 0:
                start = row_starts
            elif _KEY_END in literal:
                start = marks.key_ends[first + keys] - literal.index(_KEY_END)
            else:
                start = row_ends - len(literal)  # only the last literal may have none
            keys += literal.count(_KEY_END)
            good &= _is(words, literal, start, from_start=i == 0)
            starts.append(start)
        good &= starts[last] + len(self.literals[last]) == row_ends

        spans = []
        numbers: dict[str, np.ndarray] = {}
        for i, slot in enumerate(self.slots):
            begin, end = starts[i] + len(self.literals[i]), starts[i + 1]
            # Literals that follow each other, and end where the row ends, all lie within
            # it: no word compared above was another row's.
            good &= begin <= end
            spans.append((begin, end))
            if not slot.is_text:
                numbers[slot.key], plain = _integers(text.data, words, begin, end)
                good &= plain

        kept = np.flatnonzero(good)
        if not len(kept):
            return Cut(kept, {})
        texts = {
            slot.key: text.cut(begin[kept], end[kept])
            for slot, (begin, end) in zip(self.slots, spans, strict=True)
            if slot.is_text
        }
        plain = ~_any_quoted(list(texts.values()), len(kept))
        if not plain.all():
            texts = {key: column.filter(pa.array(plain)) for key, column in texts.items()}
            kept = kept[plain]
        values: dict[str, pa.StringArray | np.ndarray | None] = dict.fromkeys(self.nulls)
        for slot in self.slots:
            if slot.is_read:
                values[slot.key] = texts[slot.key] if slot.is_text else numbers[slot.key][kept]
        return Cut(rows[kept], values)


def cut_alike(text: Bytes, usable: np.ndarray, reads: Mapping[str, str]) -> list[Cut]:
    """Cut the rows that have one of the batch's most common layouts.

    Args:
      text: The records.
      usable: bool per row: UTF-8, and none that a layout must not accept.
      reads: As for `Layout.learn`.

    Returns:
      What was cut, at most `_MOST_LAYOUTS`; no row twice, and no empty one.
    """
    rows, cuts = np.flatnonzero(usable), []
    left = np.ones(len(usable), bool)
    marks: _Marks | None = None
    for _ in range(_MOST_LAYOUTS):
        if len(rows) < _FEWEST_ROWS:
            break
        layout = _most_common(text, rows, reads)
        if layout is None:
            break
        if marks is None:
            marks = _Marks.of(text)
            rows = rows[marks.backslashes[rows] == 0]
        cut = layout.cut(text, marks, rows)
        if len(cut.rows):
            cuts.append(cut)
            left[cut.rows] = False
            rows = rows[left[rows]]
    return cuts


_KEY_END = b'":'
_WORD = 8
_SPACE = 0x20
_FEWEST_ROWS = 32  # fewer are parsed faster than learnt
_MOST_LAYOUTS = 3
_SAMPLES = 5
_LONGEST_BYTES = 1 << 14  # a record worth learning from
_MOST_DIGITS = 16
_PIECE_BYTES = 1 << 16

_OPENING = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*")
_MEMBER = re.compile(
    rb'"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*'
    rb'("[^"\\\x00-\x1f]*"|-?(?:0|[1-9][0-9]*)(?![0-9.eE])|true|false|null)'
    rb"[ \t\r\n]*(,?)[ \t\r\n]*"
)
_CLOSING = re.compile(rb"\}[ \t\r\n]*")


class _Marks(NamedTuple):
    """Where keys of the rows end, and how many odd bytes they hold."""

    key_ends: np.ndarray  # positions of all `":`
    first: np.ndarray  # int64 per row: index into `key_ends` of its first
    counts: np.ndarray  # of key ends, per row
    controls: np.ndarray  # control characters per row
    backslashes: np.ndarray  # per row

    @classmethod
    def of(cls, text: Bytes) -> "_Marks":
        key_ends, controls, backslashes = _found(text.data)
        bounds = np.searchsorted(key_ends, text.offsets)
        return cls(
            key_ends,
            bounds[:-1],
            np.diff(bounds),
            text.counted(controls),
            text.counted(backslashes),
        )


def _found(data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find every quote with a colon behind it, control character and backslash.

    In pieces that stay in the cache: memory is the limit here.
    """
    key_ends, controls, backslashes = [], [], []
    flags, colons = np.empty(_PIECE_BYTES, bool), np.empty(_PIECE_BYTES, bool)
    for start in range(0, len(data), _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES]
        behind = data[start + 1 : start + 1 + _PIECE_BYTES]
        size = len(behind)
        found = np.equal(piece[:size], ord('"'), out=flags[:size])
        found &= np.equal(behind, ord(":"), out=colons[:size])
        key_ends.append(np.flatnonzero(found) + start)
        if piece.min() < _SPACE:
            controls.append(np.flatnonzero(piece < _SPACE) + start)
        found = np.equal(piece, ord("\\"), out=flags[: len(piece)])
        if found.any():
            backslashes.append(np.flatnonzero(found) + start)
    nowhere = np.zeros(0, np.int64)
    return (
        np.concatenate([nowhere, *key_ends]),
        np.concatenate([nowhere, *controls]),
        np.concatenate([nowhere, *backslashes]),
    )


def _any_quoted(columns: list[pa.StringArray], rows: int) -> np.ndarray:
    """Tell in which rows a text holds a quote: such a row is no JSON, or another layout's."""
    quoted = np.zeros(rows, bool)
    for column in columns:
        text = Bytes.of(column)
        flags = text.data == ord('"')
        if flags.any():
            quoted |= text.per_row(flags) > 0
    return quoted


def _most_common(text: Bytes, rows: np.ndarray, reads: Mapping[str, str]) -> Layout | None:
    """Return the layout that most of a few rows have, None where they have none."""
    layouts: Counter[Layout] = Counter()
    for i in range(_SAMPLES):
        row = rows[len(rows) * (2 * i + 1) // (2 * _SAMPLES)]
        start, end = text.offsets[row], text.offsets[row + 1]
        layout = Layout.learn(text.data[start:end].tobytes(), reads)
        if layout is not None:
            layouts[layout] += 1
    return layouts.most_common(1)[0][0] if layouts else None


def _is(words: np.ndarray, literal: bytes, starts: np.ndarray, from_start: bool) -> np.ndarray:
    """Compare the bytes at each start with a literal.

    A literal shorter than a word is compared with the word that ends, or starts, where it
    does: rows are longer than a word. Places outside of the data give any answer, and are
    those of rows whose literals don't fit together.
    """
    same: np.ndarray
    last = len(words) - 1
    if len(literal) < _WORD:
        places = starts if from_start else starts + (len(literal) - _WORD)
        bits = 8 * (_WORD - len(literal))
        found = words[np.clip(places, 0, last)]
        expected = np.uint64(int.from_bytes(literal, "little"))
        if from_start:
            same = (found << np.uint64(bits)) == (expected << np.uint64(bits))
        else:
            same = (found >> np.uint64(bits)) == expected
        return same
    starts = np.clip(starts, 0, max(last - len(literal) + _WORD, 0))
    same = np.ones(len(starts), bool)
    ends = range(_WORD, len(literal) + _WORD, _WORD)
    for place in (min(end, len(literal)) - _WORD for end in ends):
        expected = np.uint64(int.from_bytes(literal[place : place + _WORD], "little"))
        same &= words[starts + min(place, last)] == expected
    return same


def _integers(
    data: np.ndarray, words: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read integers of up to 16 digits as JSON writes them.

    Returns:
      int64, and bool: whether there is such an integer.
    """
    first = data[np.clip(starts, 0, len(data) - 1)]
    negative = first == ord("-")
    digits = ends - starts - negative
    leading = data[np.clip(starts + negative, 0, len(data) - 1)]
    plain = (digits >= 1) & (digits <= _MOST_DIGITS)
    plain &= ends >= np.where(digits > _WORD, 2 * _WORD, _WORD)  # whole words lie before it
    plain &= (leading != ord("0")) | (digits == 1)
    values = np.zeros(len(starts), np.int64)
    for word, unit in ((1, 1), (2, 10**_WORD)):
        wanted = np.clip(digits - _WORD * (word - 1), 0, _WORD)
        found = words[np.clip(ends - _WORD * word, 0, len(words) - 1)] ^ _ZEROS
        # Bytes before the number are not its own: make them digits of zero.
        bits = (8 * (_WORD - wanted)).astype(np.uint64)
        found = np.where(wanted > 0, found >> (bits & _63) << (bits & _63), np.uint64(0))
        plain &= ((found | (found + _SIXES)) & _HIGH) == 0
        for step, base in ((8, 10), (16, 100), (32, 10_000)):
            found = (found * np.uint64(base) + (found >> np.uint64(step))) & _EVERY[step]
        values += found.astype(np.int64) * unit
    return np.where(negative, -values, values), plain


_63 = np.uint64(63)
_ZEROS = np.uint64(0x3030303030303030)
_SIXES = np.uint64(0x0606060606060606)
_HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
_EVERY = {
    8: np.uint64(0x00FF00FF00FF00FF),
    16: np.uint64(0x0000FFFF0000FFFF),
    32: np.uint64(0x00000000FFFFFFFF),
}
