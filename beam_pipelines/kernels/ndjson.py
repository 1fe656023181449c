"""JSON records, one per payload.

`read_one` defines which records are valid and what their values are. It is slow, so a batch
is read by the fastest means that agree with it: records that are all written alike are cut
by their layout (`ndjson_layout`), others are parsed by msgspec, and what neither is sure of
is left to `read_one`, which alone rejects.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from functools import cached_property, partial
from operator import attrgetter
from typing import Annotated, Any, NoReturn, TypeAlias

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.kernels import decode, rfc3339
from beam_pipelines.kernels.columns import timestamps
from beam_pipelines.kernels.decode import Decoded, Field, Kind, Part, RejectedError
from beam_pipelines.kernels.ndjson_layout import Bytes, cut_alike
from beam_pipelines.model.batches import encoded
from beam_pipelines.model.records import MAX_PAYLOAD_BYTES, TIMESTAMP

MAX_DEPTH = 100
"""How deep arrays and objects may be nested, the record itself included."""


def read_one(payload: bytes | None, fields: Sequence[Field]) -> tuple[Any, ...]:
    """Read one record: this defines what is valid.

    The record must be one JSON object (RFC 8259) in UTF-8 without a byte order mark, and no
    key that is read may occur twice in it. Other keys may hold any JSON.

    Returns:
      A value per field, as `decode.value_of` converts it.

    Raises:
      RejectedError: the record is not valid.
    """
    try:
        text = decode.present_line(payload).decode()
    except UnicodeDecodeError as error:
        raise RejectedError(decode.BAD_TEXT, f"not UTF-8 at byte {error.start}") from None
    if _is_too_deep(text):
        raise RejectedError(decode.TOO_DEEP, f"nested deeper than {MAX_DEPTH} levels")
    try:
        record = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise RejectedError(decode.NOT_JSON, f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise RejectedError(decode.TOO_DEEP, "nested too deep to be read") from None
    if not isinstance(record, _Members):
        raise RejectedError(decode.NOT_AN_OBJECT, "the record is JSON, but not an object")
    names = [name for name, _ in record]
    for field in fields:
        if names.count(field.name) > 1:
            raise RejectedError(decode.DUPLICATE_KEY, f"{field.name} occurs more than once")
    members = dict(record)
    return tuple(decode.value_of(field, members.get(field.name)) for field in fields)


@dataclass(frozen=True)
class NdjsonDecoder:
    """Decodes JSON objects, one per payload, into rows of a schema.

    Columns may be timestamp[us, UTC] (RFC 3339 texts or integers of epoch milliseconds),
    string, `one_of`, int64, float64 and bool. Fields of columns that are not nullable are
    required; an empty text counts as missing. An integer column takes no 1.0 and no true.
    Fields that no column reads are ignored.

    Args:
      schema: The columns.
      fields: Column → its field in the records, where their names differ.
      values: `one_of` column → text in the records → value of the column.

    Raises:
      ValueError: the arguments name columns or values that are not in the schema, or the
        type of a column is not supported.
    """

    schema: pa.Schema
    fields: Mapping[str, str] = default(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = default(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self._fields

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.schema, self.fields, self.values)

    def __call__(self, payloads: pa.BinaryArray, topic: str) -> Decoded:
        """Decode records; the topic plays no part."""
        text = Bytes.of(payloads)
        usable = _is_text(payloads, text) & (np.diff(text.offsets) <= MAX_PAYLOAD_BYTES)
        parts: list[Part] = []
        pending = np.ones(len(payloads), bool)
        for cut in cut_alike(text, usable, self._reads):
            columns = [cut.values.get(field.name) for field in self._fields]
            parts.append(self._typed(cut.rows, columns))
            pending[parts[-1].rows] = False
        if pending.any():
            parts.append(self._parsed(payloads, usable, np.flatnonzero(pending)))
        return decode.completed(
            self.schema, self._fields, payloads, parts, partial(read_one, fields=self._fields)
        )

    @cached_property
    def _fields(self) -> tuple[Field, ...]:
        return decode.fields_of(self.schema, self.fields, self.values)

    @cached_property
    def _reads(self) -> dict[str, str]:
        forms = {Kind.TIME: '"0', Kind.TEXT: '"', Kind.ONE_OF: '"', Kind.INTEGER: "0"}
        return {field.name: forms.get(field.kind, "") for field in self._fields}

    @cached_property
    def _parser(self) -> msgspec.json.Decoder[Any]:
        members: list[Any] = []
        for field in self._fields:
            member = _PARSED[field.kind]
            members.append(
                (_attribute(field), member)
                if field.required
                else (_attribute(field), member | None, None)
            )
        names = {_attribute(field): field.name for field in self._fields}
        return msgspec.json.Decoder(
            msgspec.defstruct("Record", members, rename=names, kw_only=True, gc=False)
        )

    def _parsed(self, payloads: pa.BinaryArray, usable: np.ndarray, rows: np.ndarray) -> Part:
        """Parse rows with msgspec; leave out those it refuses, or might not refuse rightly."""
        if len(rows) < len(payloads):
            payloads = payloads.take(pa.array(rows))
        names = [field.name for field in self._fields]
        sure = usable[rows] & ~_may_differ(payloads, Bytes.of(payloads), names)
        if not sure.all():
            rows, payloads = rows[sure], payloads.filter(pa.array(sure))
        parse = self._parser.decode
        records, kept = [], []
        for row, payload in enumerate(payloads.to_pylist()):
            try:
                records.append(parse(payload))
                kept.append(row)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue  # left to `read_one`
        columns = [
            _listed(field, list(map(attrgetter(_attribute(field)), records)))
            for field in self._fields
        ]
        return self._typed(rows[np.array(kept, np.int64)], columns)

    def _typed(self, rows: np.ndarray, columns: Sequence["_Raw"]) -> Part:
        """Convert values as they stand in records; leave out rows where one doesn't fit."""
        good = np.ones(len(rows), bool)
        typed = []
        for field, values in zip(self._fields, columns, strict=True):
            column, fits = _column(field, values, len(rows))
            typed.append(column)
            good &= fits
        batch = pa.RecordBatch.from_arrays(typed, schema=self.schema)
        if good.all():
            return Part(rows, batch)
        return Part(rows[good], batch.filter(pa.array(good)))


_Raw: TypeAlias = pa.Array | np.ndarray | None
"""A column as it stands in records: an Arrow array, epoch milliseconds or integers as int64,
or None where every value is missing."""


class _Members(list[tuple[str, Any]]):
    """The members of a JSON object as they are written, repeated ones included."""


def _integer(token: str) -> int | float:
    try:
        return int(token)
    except ValueError:  # longer than Python reads
        return math.inf


def _constant(token: str) -> NoReturn:
    raise RejectedError(decode.BAD_NUMBER, f"{token} is no number in JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_Members, parse_int=_integer, parse_constant=_constant)
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def _is_too_deep(text: str) -> bool:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _is_text(payloads: pa.BinaryArray, text: Bytes) -> np.ndarray:
    """Tell which rows are UTF-8 and not null."""
    there: np.ndarray = payloads.is_valid().to_numpy(zero_copy_only=False)
    try:
        payloads.cast(pa.string())
    except pa.ArrowInvalid:
        foreign = np.flatnonzero(text.per_row(text.data >= 0x80))
        for row, payload in zip(
            foreign.tolist(), payloads.take(pa.array(foreign)).to_pylist(), strict=True
        ):
            there[row] = payload is not None and _is_utf8(payload)
    return there


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _may_differ(payloads: pa.BinaryArray, text: Bytes, names: Iterable[str]) -> np.ndarray:
    """Tell which rows msgspec might accept although `read_one` doesn't.

    It keeps the last of repeated keys and has no fixed limit of depth. To find keys that
    are repeated, every quote with a colon behind it is taken for the end of a key. So a row
    is doubtful where a key stands twice, where one might but isn't plain to see (escaped,
    or with space before its colon), and where there are many brackets.
    """
    data = text.data
    doubtful = text.offsets[:-1] < _WORD  # where no whole word stands before a first key
    if np.diff(text.offsets).max(initial=0) > 2 * MAX_DEPTH:
        doubtful |= text.per_row((data | 0x20) == ord("{")) > MAX_DEPTH  # "[" is 0x20 less
    colon, before = data[1:] == ord(":"), data[:-1]
    spaced = colon & (before <= ord(" "))
    if spaced.any():
        doubtful |= text.per_row(spaced) > 0
    if (data == ord("\\")).any():
        escaped = pc.match_substring_regex(payloads, _ESCAPED_KEY)
        doubtful |= escaped.fill_null(True).to_numpy(zero_copy_only=False)
    quotes = np.flatnonzero(colon & (before == ord('"')))
    endings = text.words[np.maximum(quotes - _WORD, 0)]
    row_of = np.repeat(np.arange(len(doubtful)), np.diff(np.searchsorted(quotes, text.offsets)))
    for name in names:
        key = f'"{name}'.encode()[-_WORD:]
        unused = np.uint64(8 * (_WORD - len(key)))
        same = endings >> unused == np.uint64(int.from_bytes(key, "little"))
        found = row_of[same]
        doubtful[found[1:][found[1:] == found[:-1]]] = True
    return doubtful


# A backslash, what it escapes, and the rest of a key. In valid JSON no other string is
# followed by a colon; in other text it doesn't matter.
_ESCAPED_KEY = r'(?s)\\.[^"\\]*"[ \t\r\n]*:'
_WORD = 8  # bytes
_INT64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_PARSED: dict[Kind, Any] = {
    Kind.TIME: str | int,
    Kind.TEXT: str,
    Kind.ONE_OF: str,
    Kind.INTEGER: _INT64,
    Kind.REAL: float,
    Kind.BOOLEAN: bool,
}


def _attribute(field: Field) -> str:
    return f"column_{field.name.encode().hex()}"


def _listed(field: Field, values: list[Any]) -> _Raw:
    """Make a raw column of parsed values."""
    if field.kind is not Kind.TIME:
        return pa.array(values, pa.string() if field.is_text else field.column.type)
    is_number = np.array([type(value) is int for value in values], bool)
    if not is_number.any():
        return pa.array(values, pa.string())
    texts = pa.array([None if type(value) is int else value for value in values], pa.string())
    micros, status = rfc3339.parse(texts)
    numbers = [value for value in values if type(value) is int]
    micros[is_number], status[is_number] = rfc3339.from_epoch_ms(
        np.array([value if abs(value) < 1 << 62 else 1 << 62 for value in numbers], np.int64)
    )
    return pa.array(micros, mask=status != rfc3339.OK).view(TIMESTAMP)


def _column(field: Field, values: _Raw, rows: int) -> tuple[pa.Array, np.ndarray]:
    """Convert a raw column.

    Returns:
      The column, and bool per row: whether the value fits. Where it doesn't, or there is
      none although one is required, `read_one` must say.
    """
    if values is None:
        empty = pa.nulls(rows, pa.int8() if field.kind is Kind.ONE_OF else field.column.type)
        if field.kind is Kind.ONE_OF:
            empty = encoded(field.column, empty)
        return empty, np.full(rows, not field.required)
    if field.kind is Kind.TIME:
        return _times(field, values)
    if isinstance(values, np.ndarray):
        return pa.array(values), np.ones(rows, bool)
    nul = np.zeros(rows, bool)
    if field.is_text:
        values = _without_empty(values)
        nul = _with_nul(values)
    missing = _missing(values)
    if field.kind is Kind.ONE_OF:
        texts = pa.array(field.codes, pa.string())
        found = pc.index_in(values, value_set=texts)
        codes = pa.array(list(field.codes.values()), pa.int8()).take(found)
        fits = ~_missing(found) | (missing if not field.required else False)
        return encoded(field.column, codes), fits
    return values, ~(missing | nul) if field.required else ~nul


def _times(field: Field, values: pa.Array | np.ndarray) -> tuple[pa.Array, np.ndarray]:
    if isinstance(values, np.ndarray):
        micros, status = rfc3339.from_epoch_ms(values)
        return timestamps(micros), status == rfc3339.OK
    if pa.types.is_timestamp(values.type):
        return values, ~_missing(values)
    micros, status = rfc3339.parse(values)
    fits = status == rfc3339.OK
    if field.required or not values.null_count:
        return timestamps(micros), fits
    missing = _missing(values)
    column = pa.array(micros, pa.int64(), mask=missing).view(field.column.type)
    return column, fits | missing


def _without_empty(texts: pa.StringArray) -> pa.StringArray:
    offsets = np.frombuffer(texts.buffers()[1], np.int32)
    lengths = np.diff(offsets[texts.offset : texts.offset + len(texts) + 1])
    if len(lengths) and lengths.min() > 0:
        return texts
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _with_nul(texts: pa.StringArray) -> np.ndarray:
    text = Bytes.of(texts)
    return text.per_row(text.data == 0) > 0 if text.data.min() == 0 else np.zeros(len(texts), bool)


def _missing(column: pa.Array) -> np.ndarray:
    if not column.null_count:
        return np.zeros(len(column), bool)
    missing: np.ndarray = column.is_null().to_numpy(zero_copy_only=False)
    return missing
