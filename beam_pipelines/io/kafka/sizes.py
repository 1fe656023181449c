"""How large the records of a topic may be, and what becomes of one that is larger.

A topic's `max.message.bytes` bounds a batch of records as the broker gets it, which is a record
at least. Sizes here are those before compression, so that a record that fits always fits.
"""

from beam_pipelines.kernels.texts import MAX_KEY_BYTES

DEFAULT_MAX_BYTES = 1_048_588
"""Of `max.message.bytes`, where a topic and its brokers say nothing else."""

MOST_BYTES = 64 << 20
"""Of a record, whatever its topic takes: it must fit into the producer's buffer."""

LEAST_BYTES = 32_768
"""What a topic of dead letters must take: coordinates, a reason, and some of the bytes."""

HEADER_BYTES = 1_000
"""Of the text of a header that says what was wrong."""

JSON_TEXT_BYTES = 6 * MAX_KEY_BYTES + 2
r"""Of a shortened text within JSON, quoted: `\u0001` stands for one byte."""

FRAME_BYTES = 200  # of a batch and of a record in it, without key, value and headers
_HEADER_FRAME_BYTES = 10  # the lengths of its name and value

Headers = list[tuple[str, str]]


def fitting(
    key: str, value: bytes | None, headers: Headers, limit_bytes: int
) -> tuple[bytes | None, Headers]:
    """Cut the value of a record that is larger than its topic takes.

    Returns:
      The value and headers; of a record that was cut the value's beginning, and the headers
      `cut` = `true` and `bytes`, the size that it had.
    """
    room = limit_bytes - _bytes_around(key, headers)
    if value is None or len(value) <= room:
        return value, headers
    marked = _marked(headers, len(value))
    return value[: max(limit_bytes - _bytes_around(key, marked), 0)], marked


def halved(value: bytes, headers: Headers) -> tuple[bytes, Headers]:
    """Cut a value that the broker refused in half; the headers tell the first size."""
    is_cut = any(name == "cut" for name, _ in headers)
    return value[: len(value) // 2], headers if is_cut else _marked(headers, len(value))


def _marked(headers: Headers, size: int) -> Headers:
    return [*headers, ("cut", "true"), ("bytes", str(size))]


def _bytes_around(key: str, headers: Headers) -> int:
    texts = sum(len(text.encode()) for header in headers for text in header)
    key_bytes = len(key.encode())
    return FRAME_BYTES + _HEADER_FRAME_BYTES * len(headers) + key_bytes + texts
