"""Batches as newline-delimited JSON, built column by column."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.kernels.columns import micros
from beam_pipelines.model.records import TIMESTAMP

_MINUTE_US = 60_000_000
_ODD = r'["\\\x00-\x1f]'
"""What JSON doesn't allow within a string as it is."""

_TWO_DIGITS = np.array([f"{i:02}" for i in range(100)], "S2").view(np.uint8).reshape(-1, 2)
_THREE_DIGITS = np.array([f"{i:03}" for i in range(1000)], "S3").view(np.uint8).reshape(-1, 3)
_TIME_WIDTH = len("2026-01-05T09:00:03.123456Z")


def require_json(schema: pa.Schema) -> None:
    """Raise ValueError where batches of a schema can't be written as NDJSON."""
    if schema.field(0).nullable:
        raise ValueError(f"the first column of NDJSON, {schema.field(0).name!r}, is nullable")
    for field in schema:
        if not _is_supported(field.type):
            raise ValueError(f"column {field.name!r} of type {field.type} does not fit into JSON")


def ndjson(rows: pa.RecordBatch) -> pa.Buffer:
    r"""Encode rows as JSON objects, one per line, each line ended by `\n`.

    Times are RFC 3339 strings in UTC with six digits of a second; strings are UTF-8, with
    `"`, `\` and control characters escaped; a null, a NaN and an infinity are left out.
    The same rows give the same bytes.

    Args:
      rows: Columns of strings, also dictionary-encoded ones, timestamp[us, UTC] in years
        1 to 9999, integers, floats and booleans; the first one without nulls. All text
        together stays under 2 GiB.
    """
    if not len(rows):
        return pa.py_buffer(b"")
    pieces: list[pa.Array | str] = []
    for i, field in enumerate(rows.schema):
        label = f"{',' if i else '{'}{_quoted(field.name)}:"
        pieces += _field(label, rows.column(i))
    lines = pc.binary_join_element_wise(
        *_joined_literals([*pieces, "}\n"]), "", null_handling="replace", null_replacement=""
    )
    ends = np.frombuffer(lines.buffers()[1], np.int32)
    return lines.buffers()[2].slice(0, int(ends[len(lines)]))


def _is_supported(data_type: pa.DataType) -> bool:
    is_a = pa.types
    if is_a.is_timestamp(data_type):
        return data_type == TIMESTAMP
    if is_a.is_dictionary(data_type):
        data_type = data_type.value_type
        return is_a.is_string(data_type)
    kinds = (is_a.is_string, is_a.is_integer, is_a.is_floating, is_a.is_boolean)
    return any(kind(data_type) for kind in kinds)


def _field(label: str, column: pa.Array) -> list[pa.Array | str]:
    """Return what one column adds to every line; null where it adds nothing."""
    if pa.types.is_dictionary(column.type):
        texts = [f"{label}{_quoted(value)}" for value in column.dictionary.to_pylist()]
        if len(texts) == 1 and not column.null_count and label[0] == ",":
            return texts
        return [pa.array(texts, pa.string()).take(column.indices)]
    if pa.types.is_timestamp(column.type):
        return [_times(f'{label}"', column, '"')]
    if pa.types.is_string(column.type):
        return _wrapped(f'{label}"', _escaped(column), '"')
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, None)
    return _wrapped(label, column.cast(pa.string()), "")


def _wrapped(before: str, values: pa.Array, after: str) -> list[pa.Array | str]:
    if values.null_count:
        return [pc.binary_join_element_wise(before, values, after, "")]
    return [before, values, after]


def _joined_literals(pieces: Sequence[pa.Array | str]) -> list[pa.Array | str]:
    joined: list[pa.Array | str] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(column: pa.Array) -> pa.Array:
    """Escape a string column; nearly always there is nothing to do, so look first."""
    _, offsets, data = column.buffers()
    if data is None:
        return column
    ends = np.frombuffer(offsets, np.int32)
    text = np.frombuffer(data, np.uint8)[ends[column.offset] : ends[column.offset + len(column)]]
    if not ((text < 0x20).any() or (text == ord('"')).any() or (text == ord("\\")).any()):
        return column
    odd = pc.fill_null(pc.match_substring_regex(column, _ODD), False)
    escaped = [_quoted(value)[1:-1] for value in column.filter(odd).to_pylist()]
    return pc.replace_with_mask(column, odd, pa.array(escaped, pa.string()))


def _times(before: str, column: pa.Array, after: str) -> pa.Array:
    """Format times between two texts: lines of one width, written as a byte matrix.

    Dates and hours are formatted once per run of equal minutes, of which sorted rows
    have few.
    """
    start, end = len(before.encode()), len(after.encode())
    times = micros(column if not column.null_count else column.fill_null(0))
    minutes = times // _MINUTE_US
    within = times - minutes * _MINUTE_US
    seconds = within // 1_000_000
    millis = within // 1_000
    runs = np.flatnonzero(np.concatenate([[True], minutes[1:] != minutes[:-1]]))
    heads = np.datetime_as_string(minutes[runs].astype("datetime64[m]")).astype("S16")
    lengths = np.diff(np.append(runs, len(times)))

    text = np.empty((len(times), start + _TIME_WIDTH + end), np.uint8)
    text[:, :start] = np.frombuffer(before.encode(), np.uint8)
    middle = text[:, start:]
    middle[:, :16] = np.repeat(heads.view(np.uint8).reshape(-1, 16), lengths, axis=0)
    middle[:, 16] = ord(":")
    middle[:, 17:19] = _TWO_DIGITS[seconds]
    middle[:, 19] = ord(".")
    middle[:, 20:23] = _THREE_DIGITS[millis - seconds * 1_000]
    middle[:, 23:26] = _THREE_DIGITS[within - millis * 1_000]
    middle[:, 26] = ord("Z")
    middle[:, _TIME_WIDTH:] = np.frombuffer(after.encode(), np.uint8)
    ends = np.arange(len(times) + 1, dtype=np.int32) * np.int32(text.shape[1])
    formatted = pa.StringArray.from_buffers(len(times), pa.py_buffer(ends), pa.py_buffer(text))
    if column.null_count:
        return pc.if_else(column.is_valid(), formatted, None)
    return formatted
