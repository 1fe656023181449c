"""What a stranger sends: records made to end the job, or to change what is said of others.

A list that grows: whoever finds a new one adds it here, and `tests/integration/test_hostile.py`
sends it through files and through the endless graph on Flink.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.murmur import hash_of, texts_of, twin_of

VICTIM = "victim"
"""An honest user, whose events and sessions strangers aim at."""

_MINUTE_US = 60_000_000
_GOLDEN = 0x9E3779B97F4A7C15  # what a minute was mixed with where names were thinned out
_MASK = (1 << 64) - 1

Record = bytes | None


def honest(now_us: int) -> list[Record]:
    """Return the victim's own events: a session of four views, around all that is hostile."""
    return [
        _event(now_us + second * 1_000_000, VICTIM, "/honest", event_id=f"honest-{second}")
        for second in (0, 1, 2, 3)
    ]


def _event(
    us: int, user: str, url: str = "/hostile", kind: str = "page_view", **more: Any
) -> bytes:
    known = {"event_time": us // 1000, "user_id": user, "page_url": url, "event_type": kind}
    return json.dumps(known | more, ensure_ascii=False).encode()


def _twin_of_the_victim(now_us: int) -> Iterator[Record]:
    """A user whose hash is the victim's, and who ends the session."""
    twin = twin_of(VICTIM)
    yield _event(now_us + 1_500_000, twin, event_id="twin-1")
    yield _event(now_us + 1_600_000, twin, kind="session_end", event_id="twin-2")


def _hashes_that_hide_a_name(now_us: int) -> Iterator[Record]:
    """Two users whose hashes differ by the mixes of their events' minutes."""
    first, second = now_us // _MINUTE_US, now_us // _MINUTE_US - 1
    user = "hides"
    mixed = hash_of(user) ^ (first * _GOLDEN & _MASK) ^ (second * _GOLDEN & _MASK)
    (other,) = texts_of([mixed], seed=2)
    yield _event(now_us, user, event_id="hides-1")
    yield _event(now_us - _MINUTE_US, other, event_id="hides-2")


def _all_registers_full(now_us: int) -> Iterator[Record]:
    """A user for each register of the sketch, of the greatest rank."""
    targets = np.arange(4096, dtype=np.uint64) << np.uint64(52)
    for number, user in enumerate(texts_of(targets, seed=3)):
        yield _event(now_us, user, kind="click", event_id=f"register-{number}")


def _one_home(now_us: int) -> Iterator[Record]:
    """Users and ids whose hashes share their high bits, so that tables crowd."""
    low = np.random.default_rng(4).integers(1, 1 << 40, 2_000, dtype=np.uint64)
    for text in texts_of(low | np.uint64(0xABCDEF << 40), seed=5):
        yield _event(now_us, text, kind="click", event_id=text)


def _names_that_shorten_alike(now_us: int) -> Iterator[Record]:
    """Long texts, and the texts of what they were shortened to."""
    for length in (1_999, 2_000, 2_001, 2_500, 100_000):
        text = "/" + "ä" * (length // 2) + "b" * (length % 2)
        yield _event(now_us, "long", text, event_id=f"long-{length}")
        mark = f"…sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        cut = text.encode()[: 2_000 - len(mark.encode())].decode(errors="ignore") + mark
        yield _event(now_us, "long", cut, event_id=f"cut-{length}")
        yield _event(now_us, cut, "/short", event_id=f"user-{length}")
    yield _event(now_us, "…sha256:", "…sha256:", event_id="mark")


def _as_large_as_the_topic_takes(now_us: int) -> Iterator[Record]:
    """Texts of 900 kB in each field, and a megabyte of garbage."""
    made = random.Random(6)
    for field in ("user_id", "page_url", "event_id"):
        text = "".join(made.choices('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijkl\\"\x01ä€', k=200_000))
        fields = {"user_id": "large", "page_url": "/large", "event_id": f"large-{field}"}
        more = fields | {field: text}
        yield _event(now_us, more["user_id"], more["page_url"], event_id=more["event_id"])
    yield made.randbytes(1_048_000)
    yield b'{"event_time":' + b"1" * 1_000_000 + b"}"


def _beyond_json(now_us: int) -> Iterator[Record]:
    """Everything that parsers choke on."""
    event = _event(now_us, "odd", event_id="odd").decode()
    time = f'"event_time": {now_us // 1000}'
    yield from (None, b"", b" ", b"\x00", b"\xff\xfe", b"null", b"[]", b'"', b"{}", b"1e400")
    yield b"[" * 100_000
    yield b'{"a":' * 100_000
    for value in ("NaN", "Infinity", "1e400", "-0", "1" * 30, "1.5", "true", "[]", '"1e3"', "{}"):
        yield event.replace(time, f'"event_time": {value}').encode()
    yield event.replace(time, f'"event_time": {now_us // 1_000_000}').encode()  # seconds
    yield event.replace(time, f'"event_time": {now_us}').encode()
    yield event.replace('"odd"', r'"\ud800"').encode()
    yield event.replace('"odd"', r'"\u0000"').encode()
    yield event.replace("{", '{"user_id": "twice", ').encode()
    yield event.replace("page_view", "no such type").encode()
    yield (event + event).encode()


def _times_at_the_limits(now_us: int) -> Iterator[Record]:
    """The first and last years, and those beyond."""
    for text in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "0000-01-01T00:00:00Z"):
        record = json.loads(_event(now_us, "times", event_id=f"times-{text}"))
        yield json.dumps(record | {"event_time": text}).encode()


HOSTILE: dict[str, Callable[[int], Iterator[Record]]] = {
    "a twin of the victim's hash": _twin_of_the_victim,
    "hashes that hide a name": _hashes_that_hide_a_name,
    "all registers full": _all_registers_full,
    "one home": _one_home,
    "names that shorten alike": _names_that_shorten_alike,
    "as large as the topic takes": _as_large_as_the_topic_takes,
    "beyond JSON": _beyond_json,
    "times at the limits": _times_at_the_limits,
}
"""What it is → records around a time (µs since 1970)."""
