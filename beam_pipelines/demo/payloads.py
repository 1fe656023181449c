"""How the demo's records are written: most alike, some oddly, a few beyond reading."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.model.activity import EVENT_TYPES
from beam_pipelines.model.records import MAX_PAYLOAD_BYTES

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

_SECOND_US = 1_000_000


def _page_urls() -> list[str]:
    subjects = "arrow beam cache cloud delta event flink graph index join kafka latency".split()
    titles = "guide intro faq tips setup tuning testing upgrade limits pricing".split()
    sections = "blog docs help product".split()
    slugs = [f"/{s}/{title}-{x}" for title in titles for x in subjects for s in sections]
    return ["/", "/pricing", "/docs", "/blog", "/login", "/signup", "/about", "/café", *slugs]


PAGES = pa.array(_page_urls())
USERS = pa.array([f"u-{number:05d}" for number in range(20_000)])


def _fixed_width(text: npt.NDArray[np.uint8]) -> pa.BinaryArray:
    rows, width = text.shape
    offsets = pa.py_buffer(np.arange(0, (rows + 1) * width, width, dtype=np.int32))
    return pa.BinaryArray.from_buffers(pa.binary(), rows, [None, offsets, pa.py_buffer(text)])


_HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)
_UUID_DIGITS = np.array([i for i in range(36) if i not in (8, 13, 18, 23)])


def uuids(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Write random version 4 UUIDs, 36 characters a row."""
    drawn = bits.astype("<u8").view(np.uint8).reshape(-1, 16).copy()
    drawn[:, 6] = 0x40 | drawn[:, 6] & 0x0F
    drawn[:, 8] = 0x80 | drawn[:, 8] & 0x3F
    text = np.full((len(drawn), 36), ord("-"), np.uint8)
    text[:, _UUID_DIGITS] = _HEX[drawn].view(np.uint8)
    return text


_TIME_OF_DAY = (  # column of the digit, µs that it stands for, its base
    *((11, 36_000_000_000, 3), (12, 3_600_000_000, 10), (14, 600_000_000, 6), (15, 60_000_000, 10)),
    *((17, 10_000_000, 6), (18, 1_000_000, 10), *((20 + i, 10 ** (5 - i), 10) for i in range(6))),
)


def _rfc3339(event_us: Integers) -> npt.NDArray[np.uint8]:
    """Write times as 2026-01-05T09:00:03.123456Z, 27 characters a row."""
    text = np.empty((len(event_us), 27), np.uint8)
    text[:] = np.frombuffer(b"0000-00-00T00:00:00.000000Z", np.uint8)
    days, in_day_us = np.divmod(event_us, 86_400 * _SECOND_US)
    known_days, which = np.unique(days, return_inverse=True)
    dates = np.datetime_as_string(known_days.astype("datetime64[D]")).astype("S10")
    text[:, :10] = dates.view(np.uint8).reshape(-1, 10)[which]
    for column, unit_us, base in _TIME_OF_DAY:
        text[:, column] = in_day_us // unit_us % base + ord("0")
    return text


_PARTS = (
    pa.array([f'","user_id":"{user}","page_url":"'.encode() for user in USERS.to_pylist()]),
    pa.array([f'{url}","event_type":"'.encode() for url in PAGES.to_pylist()]),
    pa.array([f'{event_type}"}}'.encode() for event_type in EVENT_TYPES]),
)


def common_payloads(
    ids: Array, is_unnamed: Array, event_us: Integers, *happens: Array
) -> pa.BinaryArray:
    """Write records in the layout of most: one line of JSON, without an id where unnamed."""
    before, between = b'{"event_id":"', b'","event_time":"'
    head = np.empty((len(ids), len(before) + 36 + len(between) + 27), np.uint8)
    unnamed = len(before) + 36 + 1  # where `,"event_time"` begins
    head[:, : len(before)] = np.frombuffer(before, np.uint8)
    head[:, len(before) : len(before) + 36] = ids
    head[:, unnamed - 1 : -27] = np.frombuffer(between, np.uint8)
    head[:, -27:] = _rfc3339(event_us)
    without_id = head[:, unnamed:].copy()
    without_id[:, 0] = ord("{")
    return pc.binary_join_element_wise(
        pc.if_else(pa.array(is_unnamed), _fixed_width(without_id), _fixed_width(head)),
        *(part.take(pa.array(codes)) for part, codes in zip(_PARTS, happens, strict=True)),
        b"",
    )


Tokens = dict[str, str]  # a record's JSON text by field: strings with their quotes


def tokens_of(
    ids: Array, event_us: Integers, users: Array, pages: Array, types: Array
) -> list[Tokens]:
    """Return the JSON texts of records, field by field, for those written one by one."""
    columns = (
        [row.tobytes().decode() for row in ids],
        [row.tobytes().decode() for row in _rfc3339(event_us)],
        USERS.take(pa.array(users)).to_pylist(),
        PAGES.take(pa.array(pages)).to_pylist(),
        [EVENT_TYPES[code] for code in types],
    )
    fields = ("event_id", "event_time", "user_id", "page_url", "event_type")
    quoted = ([f'"{value}"' for value in row] for row in zip(*columns, strict=True))
    return [dict(zip(fields, row, strict=True)) for row in quoted]


def _json(tokens: Tokens, comma: str = ",", colon: str = ":", **changed: str) -> bytes:
    fields = (tokens | changed).items()
    return ("{" + comma.join(f'"{name}"{colon}{token}' for name, token in fields) + "}").encode()


def _time(tokens: Tokens, digits: int, end: str) -> str:
    return tokens["event_time"][: 21 + digits] + end + '"'


class _OddFormat(NamedTuple):
    unit_us: int  # what the time is a multiple of
    offset_minutes: int  # of the local time that the writer is given
    write: Callable[[Tokens, int], bytes]


_MILLISECONDS = _OddFormat(1_000, 0, lambda t, us: _json(t, event_time=str(us // 1_000)))
ODD_FORMATS = (  # each in turn, so that half of them have epoch milliseconds
    _MILLISECONDS,
    _OddFormat(1, 120, lambda t, _: _json(t, event_id="null", event_time=_time(t, 6, "+02:00"))),
    _MILLISECONDS,
    _OddFormat(1_000, -570, lambda t, _: _json(t, ", ", ": ", event_time=_time(t, 3, "-09:30"))),
    _MILLISECONDS,
    _OddFormat(_SECOND_US, 0, lambda t, _: _json(t, event_time=_time(t, -1, "Z"))),
    _OddFormat(1_000, 0, lambda t, us: _json(t, ", ", ": ", event_time=str(us // 1_000))),
    _OddFormat(1, 0, lambda t, _: _json(t, event_time=_time(t, 6, "789Z"))),
    _MILLISECONDS,
    _OddFormat(1, 0, lambda t, _: _json({"screen": "[1920,1080]", **dict(reversed(t.items()))})),
    _MILLISECONDS,
    _OddFormat(1, 0, lambda t, _: _json(t, page_url=t["page_url"].replace("/", "\\/"))),
)

_FLAW_TABLE: dict[str, Callable[[Tokens], bytes | None]] = {
    "nan": lambda t: _json(t, event_time="NaN"),
    "infinity": lambda t: _json(t, score="-Infinity"),
    "number_overflow": lambda t: _json(t, event_time="1e400"),
    "long_integer": lambda t: _json(t, event_time="176760360312345678901234567890"),
    "lone_surrogate": lambda t: _json(t, user_id='"u-\\ud83d"'),
    "nul_character": lambda t: _json(t, page_url='"/\\u0000"'),
    "duplicate_key": lambda t: _json(t)[:-1] + b',"user_id":"u-00000"}',
    "time_out_of_range": lambda t: _json(t, event_time='"9999-12-31T23:59:59-01:00"'),
    "milliseconds_out_of_range": lambda t: _json(t, event_time="253402300800000"),
    "not_a_time": lambda t: _json(t, event_time='"2026-02-30T09:00:00Z"'),
    "wrong_type": lambda t: _json(t, user_id="42"),
    "null_field": lambda t: _json(t, page_url="null"),
    "missing_field": lambda t: _json({k: v for k, v in t.items() if k != "user_id"}),
    "unknown_event_type": lambda t: _json(t, event_type='"purchase"'),
    "not_an_object": lambda t: b"[" + _json(t) + b"]",
    "empty": lambda t: b"",
    "tombstone": lambda t: None,
    "truncated": lambda t: _json(t)[:-9],
    "not_utf8": lambda t: _json(t).replace(b'"u-', b'"\xff-'),
    "garbage": lambda t: b"\x00\x8f\xfe" + t["event_id"].encode(),
    # The last two are large, so there is one of each per 500,000 records.
    "oversized": lambda t: _json(t, note=f'"{"x" * MAX_PAYLOAD_BYTES}"'),
    "deep": lambda t: _json(t, more="[" * 100_000 + "]" * 100_000),
}
FLAWS = tuple(_FLAW_TABLE)
"""What may be wrong with a record, by the names of the truth's column `flaw`."""

FLAW_OF = tuple(_FLAW_TABLE.values())


def flaws_of_chunk(i: int, count: int) -> Integers:
    """Return the flaws of the flawed records of chunk i: each in turn, the large ones rarely."""
    small = len(FLAWS) - 2
    flaws = np.arange(count) % small
    if i % 10 == 1:
        flaws[1:3] = small, small + 1
    return flaws
