"""Columns of text, shortened for stores that take no long keys."""

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.model.batches import shortened_field, shortened_to

MAX_KEY_BYTES = 2_000
"""Of the texts of a key together: an index of Postgres takes rows of up to 2,704 bytes."""

MARK = "…sha256:"

_MARK_BYTES = MARK.encode()


def shortened(texts: pa.Array, limit_bytes: int) -> pa.Array:
    """Return texts of at most so many bytes of UTF-8; different ones stay different.

    One that is longer becomes its beginning, then `…sha256:` and the hash of the whole. So
    does one that contains that mark, however short: no text that stays as it is equals a
    shortened one. Nulls stay nulls.

    A shortened text contains the mark, so shortening it again gives another text: see
    `short_columns`.
    """
    if not _may_be_odd(texts, limit_bytes):
        return texts
    odd = pc.or_(
        pc.greater(pc.binary_length(texts), limit_bytes), pc.match_substring(texts, MARK)
    ).fill_null(False)
    replaced = [_short(text, limit_bytes) for text in texts.filter(odd).to_pylist()]
    return pc.replace_with_mask(texts, odd, pa.array(replaced, texts.type))


def short_columns(rows: pa.RecordBatch, names: Iterable[str], limit_bytes: int) -> pa.RecordBatch:
    """Shorten columns of strings, and mark their fields; columns of other types stay.

    A column that was marked with as many bytes or fewer stays too: what one stage
    shortened, all sinks store alike.
    """
    for name in dict.fromkeys(names):
        field = rows.schema.field(name)
        if pa.types.is_string(field.type) and not _is_short(field, limit_bytes):
            index = rows.schema.get_field_index(name)
            texts = shortened(rows[name], limit_bytes)
            rows = rows.set_column(index, shortened_field(field, limit_bytes), texts)
    return rows


def short_texts(texts: pa.Array, given: pa.Field) -> pa.Array:
    """Shorten texts to MAX_KEY_BYTES, unless the column that they came in was marked."""
    if pa.types.is_string(texts.type) and not _is_short(given, MAX_KEY_BYTES):
        return shortened(texts, MAX_KEY_BYTES)
    return texts


def short_field(field: pa.Field, given: pa.Field) -> pa.Field:
    """Mark the field of what `short_texts` returns."""
    if not pa.types.is_string(field.type):
        return field
    limit_bytes = shortened_to(given)
    return shortened_field(field, min(limit_bytes or MAX_KEY_BYTES, MAX_KEY_BYTES))


def key_limit(schema: pa.Schema, key: Iterable[str]) -> int:
    """Return the bytes that each text of a key may have: they share MAX_KEY_BYTES."""
    texts = sum(pa.types.is_string(schema.field(name).type) for name in dict.fromkeys(key))
    return MAX_KEY_BYTES // max(texts, 1)


def _is_short(field: pa.Field, limit_bytes: int) -> bool:
    limit = shortened_to(field)
    return limit is not None and limit <= limit_bytes


def _may_be_odd(texts: pa.Array, limit_bytes: int) -> bool:
    """Look at a column as a whole, which takes a fourth of a search in every text."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return False
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    if int(np.diff(ends).max()) > limit_bytes:
        return True
    start, end = int(ends[0]), int(ends[-1])
    return _MARK_BYTES in data.slice(start, end - start).to_pybytes()


def _short(text: str, limit_bytes: int) -> str:
    data = text.encode()
    mark = f"{MARK}{hashlib.sha256(data).hexdigest()}"
    return data[: limit_bytes - len(mark.encode())].decode(errors="ignore") + mark
