"""Columns of text."""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc


def shortened(texts: pa.Array, limit_bytes: int) -> pa.Array:
    """Return texts of at most so many bytes of UTF-8, for keys of a store that has a limit.

    One that is longer becomes its beginning, then `…sha256:` and the hash of the whole, so
    that different texts stay different. Nulls stay nulls.
    """
    too_long = pc.greater(pc.binary_length(texts), limit_bytes)
    if not pc.any(too_long).as_py():
        return texts
    return pa.array([_short(text, limit_bytes) for text in texts.to_pylist()], texts.type)


def _short(text: str | None, limit_bytes: int) -> str | None:
    if text is None or len(data := text.encode()) <= limit_bytes:
        return text
    mark = f"…sha256:{hashlib.sha256(data).hexdigest()}"
    return data[: limit_bytes - len(mark.encode())].decode(errors="ignore") + mark
