"""From binary payloads to rows, with every bad record rejected by itself.

The decoders of all formats share what is here: what they return, why they reject, and how
one value of a record becomes one value of a column.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from beam_pipelines.kernels import rfc3339
from beam_pipelines.model.batches import concatenated, empty_batch, encoded, values_of
from beam_pipelines.model.records import MAX_KEPT_BYTES, MAX_PAYLOAD_BYTES, TIMESTAMP

EMPTY_PAYLOAD = "empty_payload"
"""There are no bytes but whitespace, or no payload at all (a tombstone)."""

TOO_LARGE = "too_large"
"""The payload exceeds MAX_PAYLOAD_BYTES."""

BAD_TEXT = "bad_text"
"""The bytes are not UTF-8, or a text holds half of a surrogate pair."""

NUL_CHARACTER = "nul_character"
"""A text holds U+0000, which databases don't take."""

NOT_JSON = "not_json"
"""The payload is not one JSON value."""

TOO_DEEP = "too_deep"
"""Arrays and objects are nested deeper than anybody's events."""

NOT_AN_OBJECT = "not_an_object"
"""The record is not an object or record with named fields."""

DUPLICATE_KEY = "duplicate_key"
"""A field that is read occurs more than once, so its value is anybody's guess."""

MISSING_FIELD = "missing_field"
"""A required field is absent, null or an empty text."""

WRONG_TYPE = "wrong_type"
"""A field holds a value of another type than its column."""

BAD_NUMBER = "bad_number"
"""A number is not finite, or too large for its column."""

UNKNOWN_VALUE = "unknown_value"
"""A text is none of the values its column may hold."""

BAD_TIME = "bad_time"
"""A text is no RFC 3339 time, or names a day or time that never was."""

EPOCH_SECONDS = "epoch_seconds"
"""A number that should be milliseconds since 1970 must be seconds: see `rfc3339.SECONDS_FROM`."""

TIME_OUT_OF_RANGE = "time_out_of_range"
"""A time lies outside the years 1 to 9999, UTC."""

NOT_ACCESS_LOG = "not_access_log"
"""The line is not in the common or combined log format."""

NO_TARGET = "no_target"
"""The logged request names no target."""

BAD_AVRO = "bad_avro"
"""The bytes don't follow the Avro schema they were written with."""


class Rejection(NamedTuple):
    """Why a payload is not a row."""

    row: int  # index into the payloads
    reason: str  # one of the codes above
    message: str  # what was wrong; short, never the payload itself


class Decoded(NamedTuple):
    """Every payload is either a row or a rejection."""

    rows: pa.RecordBatch  # the declared schema; one row per valid payload, in payload order
    valid: np.ndarray  # bool, one per payload
    rejections: list[Rejection]  # ascending by row; one per False in `valid`


class Decoder(Protocol):
    """Turns payloads into rows of a schema. Never raises for what a payload holds."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of the rows; those that are not nullable are required."""

    def __call__(self, payloads: pa.BinaryArray, topic: str) -> Decoded:
        """Decode payloads (nulls allowed) that were read from a topic or file."""


class RejectedError(Exception):
    """A record can't become a row."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def at(self, row: int) -> Rejection:
        """Return the rejection of the payload at this index."""
        return Rejection(row, self.reason, self.message)


class Kind(Enum):
    """What a column holds; the value says what a record may hold for it."""

    TIME = "an RFC 3339 text or an integer of milliseconds since 1970"
    TEXT = "a text"
    ONE_OF = "one of the texts"
    INTEGER = "an integer of 64 bits"
    REAL = "a number"
    BOOLEAN = "true or false"


class Field(NamedTuple):
    """How one column is read from a record."""

    column: pa.Field
    name: str  # the field of the record
    kind: Kind
    codes: Mapping[str, int]  # of ONE_OF: text in the record → code of the column

    @property
    def required(self) -> bool:
        """Whether a record must have a value."""
        return not self.column.nullable

    @property
    def is_text(self) -> bool:
        """Whether the record holds a text and an empty one counts as missing."""
        return self.kind in (Kind.TEXT, Kind.ONE_OF)


_KINDS = {
    TIMESTAMP: Kind.TIME,
    pa.string(): Kind.TEXT,
    pa.dictionary(pa.int8(), pa.string()): Kind.ONE_OF,
    pa.int64(): Kind.INTEGER,
    pa.float64(): Kind.REAL,
    pa.bool_(): Kind.BOOLEAN,
}


def fields_of(
    schema: pa.Schema, names: Mapping[str, str], values: Mapping[str, Mapping[str, str]]
) -> tuple[Field, ...]:
    """Describe how records are read into the columns of a schema.

    Args:
      schema: The columns; those not nullable are required.
      names: Column → name of its field in the records, where they differ.
      values: `one_of` column → text in the records → value of the column. The column's own
        values stand for themselves unless they are mapped too.

    Raises:
      ValueError: a column or value is not in the schema, its type is not supported, or two
        columns read the same field.
    """
    for column in (*names, *values):
        if column not in schema.names:
            raise ValueError(f"no column {column!r}; the rows have {', '.join(schema.names)}")
    fields = []
    for column in schema:
        kind = _KINDS.get(column.type)
        if kind is None:
            raise ValueError(f"column {column.name!r} has type {column.type}, which none decodes")
        if kind is not Kind.ONE_OF and column.name in values:
            raise ValueError(f"column {column.name!r} takes any value, so none can be mapped")
        codes = {}
        if kind is Kind.ONE_OF:
            own = {value: code for code, value in enumerate(values_of(column))}
            mapped = values.get(column.name, {})
            for value in mapped.values():
                if value not in own:
                    raise ValueError(f"{column.name!r} is one of {', '.join(own)}, not {value!r}")
            codes = own | {text: own[value] for text, value in mapped.items()}
        fields.append(Field(column, names.get(column.name, column.name), kind, codes))
    read = [field.name for field in fields]
    for name in read:
        if read.count(name) > 1:
            raise ValueError(f"two columns are read from the field {name!r}")
    return tuple(fields)


def value_of(field: Field, value: Any) -> Any:
    """Convert one value of a record into a value of its column.

    An empty text counts as missing: it names no user, no page and no event, and rows that
    share one would be taken for the same.

    Args:
      field: How the column is read.
      value: As Python's json or fastavro yield it; None: absent or null.

    Returns:
      µs since 1970 for a time, the code for a `one_of` column, else the value; None only
      where the column is nullable.

    Raises:
      RejectedError: the value doesn't fit.
    """
    if value is None or (value == "" and field.is_text):
        if field.required:
            lacks = "is empty" if value == "" else "is missing"
            raise RejectedError(MISSING_FIELD, f"{field.name} {lacks}; it must be {_right(field)}")
        return None
    match field.kind, value:
        case Kind.TIME, str():
            return _time(field, *rfc3339.parse_one(value), value)
        case Kind.TIME, datetime() if value.tzinfo is not None:
            return _stamped(field, (value - _EPOCH) // _MICROSECOND)
        case Kind.TIME, int() if not isinstance(value, bool):
            return _time(field, *rfc3339.from_epoch_ms_one(value), value)
        case Kind.TEXT, str():
            return _checked_text(field, value)
        case Kind.ONE_OF, str():
            code = field.codes.get(value)
            if code is None:
                raise RejectedError(
                    UNKNOWN_VALUE, f"{field.name} is {shown(value)}, not {_right(field)}"
                )
            return code
        case Kind.BOOLEAN, bool():
            return value
        case Kind.INTEGER, int() if not isinstance(value, bool):
            if not -(1 << 63) <= value < 1 << 63:
                raise RejectedError(BAD_NUMBER, f"{field.name} does not fit into 64 bits")
            return value
        case Kind.REAL, int() | float() if not isinstance(value, bool):
            return _finite(field, value)
        case _, float() if not math.isfinite(value):
            raise RejectedError(BAD_NUMBER, f"{field.name} is not finite")
        case _:
            raise RejectedError(
                WRONG_TYPE, f"{field.name} is {_seen(value)}; it must be {_right(field)}"
            )


def batch_of(
    schema: pa.Schema, fields: Sequence[Field], records: Sequence[tuple[Any, ...]]
) -> pa.RecordBatch:
    """Make a batch from values as `value_of` returns them, one tuple per row."""
    if not records:
        return empty_batch(schema)
    columns = [
        _array(field, values)
        for field, values in zip(fields, zip(*records, strict=True), strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


class Part(NamedTuple):
    """Some of the payloads, decoded."""

    rows: np.ndarray  # ascending indices into the payloads
    batch: pa.RecordBatch  # one row each


def completed(
    schema: pa.Schema,
    fields: Sequence[Field],
    payloads: pa.BinaryArray,
    parts: Sequence[Part],
    read_one: Callable[[bytes | None], tuple[Any, ...]],
) -> Decoded:
    """Read the payloads that are in no part one by one, and join everything in order.

    Args:
      schema: The declared columns.
      fields: How they are read.
      payloads: All payloads.
      parts: Those already decoded, none twice.
      read_one: Returns a value per field, or raises RejectedError.
    """
    pending = np.ones(len(payloads), bool)
    for part in parts:
        pending[part.rows] = False
    rows, records, rejections = [], [], []
    for row in np.flatnonzero(pending).tolist():
        try:
            records.append(read_one(payloads[row].as_py()))
            rows.append(row)
        except RejectedError as error:
            rejections.append(error.at(row))
    one_by_one = Part(np.array(rows, np.int64), batch_of(schema, fields, records))
    filled = [part for part in (*parts, one_by_one) if len(part.rows)]
    batch = concatenated([part.batch for part in filled], schema)
    if len(filled) > 1:
        order = np.argsort(np.concatenate([part.rows for part in filled]))
        batch = batch.take(pa.array(order))
    valid = np.ones(len(payloads), bool)
    valid[[rejection.row for rejection in rejections]] = False
    return Decoded(batch, valid, rejections)


def present(payload: bytes | None) -> bytes:
    """Return a payload that is there and not too large.

    Raises:
      RejectedError: it isn't.
    """
    if not payload:
        raise RejectedError(EMPTY_PAYLOAD, "there is nothing in the payload")
    if len(payload) > MAX_PAYLOAD_BYTES:
        least = "at least " if len(payload) >= MAX_KEPT_BYTES else ""
        raise RejectedError(
            TOO_LARGE, f"{least}{len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} fit"
        )
    return payload


def present_line(payload: bytes | None) -> bytes:
    """Return a payload like `present`, if it holds more than whitespace."""
    payload = present(payload)
    if not payload.strip(b" \t\r\n"):
        raise RejectedError(EMPTY_PAYLOAD, "there is only whitespace in the payload")
    return payload


def shown(text: str) -> str:
    """Quote the beginning of a text for a message, in ASCII."""
    quoted = ascii(text[: _SHOWN + 1])[1:-1]
    return f"'{quoted}'" if len(quoted) <= _SHOWN else f"'{quoted[:_SHOWN]}...'"


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SHOWN = 40  # characters of a value that a message may quote


def _array(field: Field, values: Sequence[Any]) -> pa.Array:
    if field.kind is Kind.TIME:
        return pa.array(values, pa.int64()).view(TIMESTAMP)
    if field.kind is Kind.ONE_OF:
        return encoded(field.column, values)
    return pa.array(values, field.column.type)


def _time(field: Field, micros: int, status: int, seen: str | int) -> int:
    if status == rfc3339.OK:
        return micros
    if status == rfc3339.EPOCH_SECONDS:
        raise RejectedError(
            EPOCH_SECONDS,
            f"{field.name} is {seen}, which must be seconds; send milliseconds since 1970 "
            f"({seen}000) or an RFC 3339 text",
        )
    what = shown(seen) if isinstance(seen, str) else "a number"
    if status == rfc3339.OUT_OF_RANGE:
        raise RejectedError(
            TIME_OUT_OF_RANGE, f"{field.name} is {what}, outside the years 1 to 9999"
        )
    raise RejectedError(
        BAD_TIME, f"{field.name} is {what}, not a time like 2026-01-05T09:00:03.123Z"
    )


def _stamped(field: Field, micros: int) -> int:
    """Return an Avro timestamp, unless it must hold numbers of a coarser unit than its own.

    Seconds in a timestamp-millis lie where they do in an integer; seconds in a
    timestamp-micros before it, and milliseconds in a timestamp-micros there again.
    """
    if rfc3339.SECONDS_FROM <= micros < rfc3339.SECONDS_TO * 1000:
        raise RejectedError(
            EPOCH_SECONDS,
            f"{field.name} is {_EPOCH + micros * _MICROSECOND}, so its number must be of a coarser "
            "unit than its Avro type says; write milliseconds as timestamp-millis or microseconds "
            "as timestamp-micros",
        )
    return micros


def _checked_text(field: Field, text: str) -> str:
    if "\0" in text:
        raise RejectedError(NUL_CHARACTER, f"{field.name} contains U+0000")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RejectedError(
                BAD_TEXT, f"{field.name} contains half of a surrogate pair"
            ) from None
    return text


def _finite(field: Field, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RejectedError(BAD_NUMBER, f"{field.name} is not finite in 64 bits")
    return number


def _right(field: Field) -> str:
    if field.kind is Kind.ONE_OF:
        return f"one of {', '.join(field.codes)}"
    return str(field.kind.value)


def _seen(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return "an integer"
        case float():
            return "a number with a fraction or exponent"
        case str():
            return "a text"
        case bytes():
            return "bytes"
        case dict():
            return "an object"
        case list() | tuple():
            return "an array"
        case datetime():
            return "a time with no zone" if value.tzinfo is None else "a time"
        case _:
            return type(value).__name__
