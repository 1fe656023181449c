"""The made-up activity, against a judge that reads its bytes one record at a time."""

import hashlib
import json
from collections import Counter
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from beam_pipelines.demo import CHUNK_RECORDS, FLAWS, TRUTH, DemoTraffic
from beam_pipelines.model.activity import EVENT_TYPES
from beam_pipelines.model.records import MAX_PAYLOAD_BYTES, PAYLOADS

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def micros(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1)


def event_time_us(token: object) -> int:
    if isinstance(token, int):
        return token * 1_000
    assert isinstance(token, str)
    head, dot, rest = token.partition(".")
    digits = rest[: next((i for i, c in enumerate(rest) if not c.isdigit()), len(rest))]
    text = f"{head}.{digits[:6]}{rest[len(digits) :]}" if dot else token
    return micros(datetime.fromisoformat(text))


def refuse(token: str) -> object:
    raise ValueError(token)


def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs), "duplicate key"
    return dict(pairs)


def decoded(payload: bytes | None) -> tuple[int, str, str, str, str | None] | None:
    """Return (event_time_us, user_id, page_url, event_type, event_id), or None: invalid."""
    try:
        assert payload and len(payload) <= MAX_PAYLOAD_BYTES
        record = json.loads(payload, parse_constant=refuse, object_pairs_hook=no_duplicates)
        assert isinstance(record, dict)
        texts = [record["user_id"], record["page_url"], record["event_type"]]
        assert all(isinstance(text, str) and "\0" not in text for text in texts)
        "".join(texts).encode()  # a lone surrogate has no encoding
        assert texts[2] in EVENT_TYPES
        time_us = event_time_us(record["event_time"])
        assert micros(datetime(1, 1, 1, tzinfo=UTC)) <= time_us < 253_402_300_800_000_000
        return time_us, *texts, record.get("event_id")
    except (AssertionError, ValueError, KeyError, RecursionError, OverflowError):
        return None


def verdict(event_us: int, append_us: int) -> str:
    behind_s = (append_us - event_us) / 1_000_000
    if behind_s < -300:
        return "future"
    if behind_s <= 120:
        return "on_time"
    return "late" if behind_s <= 240 else "too_late"


def records(traffic: DemoTraffic) -> list[dict]:
    chunks = [traffic.chunk(i) for i in range(traffic.chunks)]
    return [
        payload | truth
        for chunk in chunks
        for payload, truth in zip(
            chunk.payloads.cast(PAYLOADS.set(2, pa.field("append_time", pa.int64()))).to_pylist(),
            chunk.truth.cast(TRUTH.set(5, pa.field("event_time", pa.int64()))).to_pylist(),
            strict=True,
        )
    ]


@pytest.fixture(scope="module")
def stream() -> list[dict]:
    return records(DemoTraffic(events=75_000, seed=7))


def test_the_truth_agrees_with_a_judge_that_reads_each_record(stream):
    first_of: dict[object, int] = {}
    for record in stream:
        event = decoded(record["payload"])
        expected = {"verdict": "invalid", "event": None, "event_time": None, "user_id": None}
        if event:
            event_us, user, page, kind, event_id = event
            identity = (event_id, event_us) if event_id is not None else record["payload"]
            is_first = identity not in first_of
            expected = {
                "verdict": verdict(event_us, record["append_time"]),
                "event": first_of.setdefault(identity, record["offset"]),
                "is_resend": not is_first,
                "event_time": event_us,
                "user_id": user,
                "page_url": page,
                "event_type": kind,
                "flaw": None,
            }
        assert {name: record[name] for name in expected} == expected
        assert (record["flaw"] is None) == (event is not None)


def test_a_resend_has_the_bytes_of_the_first_record(stream):
    resends = [record for record in stream if record["is_resend"]]
    assert all(r["payload"] == stream[r["event"]]["payload"] for r in resends)
    assert all(not stream[r["event"]]["is_resend"] for r in resends)


def test_some_resends_are_late_though_the_event_was_not(stream):
    pairs = {(stream[r["event"]]["verdict"], r["verdict"]) for r in stream if r["is_resend"]}
    assert {("on_time", "on_time"), ("on_time", "late"), ("on_time", "too_late")} <= pairs


def test_offsets_count_the_records_and_append_times_never_fall(stream):
    appended = [record["append_time"] for record in stream]
    assert [record["offset"] for record in stream] == list(range(75_000))
    assert appended == sorted(appended)
    assert appended[-1] <= DemoTraffic(events=75_000).as_of_us < appended[-1] + 1_000_000
    assert appended[0] // 1_000_000 == micros(datetime(2026, 1, 5, 9, tzinfo=UTC)) // 1_000_000


def test_every_flaw_occurs_and_the_large_ones_once(stream):
    flaws = Counter(record["flaw"] for record in stream if record["flaw"])
    assert set(flaws) == set(FLAWS)
    assert flaws["oversized"] == flaws["deep"] == 1


def test_shares_are_as_promised(stream):
    share = {k: n / len(stream) for k, n in Counter(r["verdict"] for r in stream).items()}
    assert share["invalid"] == pytest.approx(0.003, abs=0.001)
    assert share["future"] == pytest.approx(0.003, abs=0.001)
    assert share["late"] == pytest.approx(0.005, abs=0.002)
    assert share["too_late"] == pytest.approx(0.005, abs=0.002)
    assert sum(r["is_resend"] for r in stream) / len(stream) == pytest.approx(0.15, abs=0.01)
    events = [r for r in stream if r["verdict"] == "on_time" and not r["is_resend"]]
    unordered = [r for r in events if r["append_time"] - r["event_time"] > 2_000_000]
    assert len(unordered) / len(events) == pytest.approx(0.06, abs=0.01)
    unnamed = [r for r in events if b'"event_id":"' not in r["payload"].replace(b" ", b"")]
    assert len(unnamed) / len(events) == pytest.approx(0.10, abs=0.015)
    in_milliseconds = [r for r in events if b"-05T" not in r["payload"]]
    assert len(in_milliseconds) / len(events) == pytest.approx(0.02, abs=0.005)


def test_some_events_lie_exactly_on_the_borders_of_the_time_rule(stream):
    behind_us = {r["append_time"] - r["event_time"] for r in stream if r["event_time"]}
    assert {120_000_000, 240_000_000, -300_000_000} <= behind_us


def test_popular_pages_and_users_are_far_ahead_of_the_rest(stream):
    views = Counter(r["page_url"] for r in stream if r["event_type"] == "page_view")
    assert len(views) > 450
    assert views.most_common(1)[0][0] == "/"
    assert 0.08 < views["/"] / views.total() < 0.25
    users = Counter(r["user_id"] for r in stream if r["user_id"])
    assert len(users) > 5_000


def test_visits_go_from_a_start_to_an_end_across_chunks(stream):
    events = sorted(
        (r for r in stream if r["verdict"] == "on_time" and not r["is_resend"]),
        key=lambda r: r["event_time"],
    )
    last_type: dict[str, str] = {}
    gaps: list[int] = []
    last_us: dict[str, int] = {}
    orderly = 0
    for r in events:
        user = r["user_id"]
        inside = last_type.get(user) not in (None, "session_end")
        orderly += inside == (r["event_type"] != "session_start")
        if inside and r["event_type"] != "session_start":
            gaps.append(r["event_time"] - last_us[user])
        last_type[user], last_us[user] = r["event_type"], r["event_time"]
    assert orderly / len(events) > 0.75
    assert 10_000_000 < sorted(gaps)[len(gaps) // 2] < 90_000_000


def test_a_chunk_is_the_same_in_any_order_and_process_history():
    traffic = DemoTraffic(events=6 * CHUNK_RECORDS, seed=3)
    forwards = [traffic.chunk(i) for i in range(6)]
    for i in (5, 0, 3, 3, 1, 4, 2):
        again = traffic.chunk(i)
        assert again.payloads.equals(forwards[i].payloads)
        assert again.truth.equals(forwards[i].truth)


def test_a_shorter_stream_begins_like_a_longer_one():
    short, long = DemoTraffic(events=123), DemoTraffic(events=CHUNK_RECORDS + 1)
    assert (short.chunks, long.chunks) == (1, 2)
    assert short.payloads(0).equals(long.payloads(0).slice(0, 123))
    assert len(long.payloads(1)) == len(long.truth(1)) == 1


def test_seeds_differ():
    one, two = DemoTraffic(events=100, seed=1), DemoTraffic(events=100, seed=2)
    assert not one.payloads(0).equals(two.payloads(0))


def test_the_bytes_are_the_same_on_every_machine():
    payloads = DemoTraffic().payloads(3)["payload"].to_pylist()
    digest = hashlib.sha256(b"\n".join(payload or b"" for payload in payloads)).hexdigest()
    assert digest[:16] == "c41b18b36314abce"


def test_chunks_have_the_declared_schemas():
    chunk = DemoTraffic(events=50).chunk(0)
    assert chunk.payloads.schema.equals(PAYLOADS) and chunk.truth.schema.equals(TRUTH)
    chunk.payloads.validate(full=True)
    chunk.truth.validate(full=True)


def test_an_empty_stream_has_no_chunks():
    assert DemoTraffic(events=0).chunks == 0
    with pytest.raises(IndexError, match="no chunk 0"):
        DemoTraffic(events=0).payloads(0)


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match="must not be negative: -1, 1"):
        DemoTraffic(events=-1)
