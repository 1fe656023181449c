import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import KafkaError

from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.model.activity import ACTIVITY
from scripts import producer
from scripts.producer import BAD, BLOCK_RECORDS, GOOD, LATE, RESENT, Sender, Traffic

START_US = 1_780_000_000_000_000
TRAFFIC = Traffic(START_US, seed=7)
PLAIN = replace(TRAFFIC, resends=0, late=0, bad=0)


def events(block, kinds=(GOOD, LATE, RESENT)):
    """Return (number, fields) of the records that can be read."""
    chosen = np.flatnonzero(np.isin(block.kinds, kinds)).tolist()
    return [(i, json.loads(block.values[i])) for i in chosen]


def seconds_behind(traffic, number, fields):
    due = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=traffic.due_us(number))
    return (due - datetime.fromisoformat(fields["event_time"])).total_seconds()


# ── the records ─────────────────────────────────────────────────────────────


def test_the_same_seed_makes_the_same_records_and_another_one_others():
    def made(traffic, k):
        block = traffic.block(k)
        return block.keys, block.values, block.kinds.tolist()

    assert made(TRAFFIC, 3) == made(replace(TRAFFIC), 3)
    assert made(TRAFFIC, 3) != made(TRAFFIC, 4)
    assert made(TRAFFIC, 3) != made(replace(TRAFFIC, seed=8), 3)


def test_a_block_is_full_of_records_with_the_users_as_keys():
    block = TRAFFIC.block(0)
    assert len(block.keys) == len(block.values) == len(block.kinds) == BLOCK_RECORDS
    assert all(fields["user_id"] == block.keys[i] for i, fields in events(block))


@pytest.mark.parametrize("rate", [2.0, 100_000.0])
def test_events_happen_just_before_they_are_due(rate):
    traffic = replace(TRAFFIC, rate=rate)
    for k in (0, 5):
        for i, fields in events(traffic.block(k), kinds=[GOOD]):
            assert 0 <= seconds_behind(traffic, k * BLOCK_RECORDS + i, fields) <= 0.5


def test_each_50th_event_is_late():
    block = TRAFFIC.block(0)
    assert np.flatnonzero(block.kinds == LATE).tolist() == list(range(49, BLOCK_RECORDS, 50))
    for i, fields in events(block, kinds=[LATE]):
        assert 180 <= seconds_behind(TRAFFIC, i, fields) <= 180.5
        assert fields["event_type"] == "page_view"
    earlier = replace(TRAFFIC, late_s=600.0)
    i, fields = events(earlier.block(0), kinds=[LATE])[0]
    assert 600 <= seconds_behind(earlier, i, fields) <= 600.5


def test_the_shares_are_those_asked_for():
    traffic = replace(TRAFFIC, resends=0.1, late=0.3, bad=0.05, rate=1000.0)
    kinds = Counter(np.concatenate([traffic.block(k).kinds for k in range(10)]).tolist())
    assert kinds[LATE] == 30_000
    assert kinds[BAD] == pytest.approx(5_000, rel=0.1)
    assert kinds[RESENT] == pytest.approx(10_000, rel=0.1)
    assert set(PLAIN.block(0).kinds.tolist()) == {GOOD}
    assert set(replace(PLAIN, bad=1.0).block(0).kinds.tolist()) == {BAD}


@pytest.mark.parametrize("rate", [2.0, 100_000.0])
def test_resent_records_repeat_a_recent_one_byte_for_byte(rate):
    block = replace(TRAFFIC, rate=rate).block(1)
    resent = np.flatnonzero(block.kinds == RESENT).tolist()
    assert len(resent) > 300
    first_at = {}
    for i, value in enumerate(block.values):
        first_at.setdefault(value, i)
    distances = [i - first_at[block.values[i]] for i in resent]
    assert all(0 < distance <= max(20, rate * 10) + 50 for distance in distances)
    assert len({block.values[i] for i in resent}) > 0.8 * len(resent)  # not always the same one
    others = [value for value, kind in zip(block.values, block.kinds, strict=True) if kind == GOOD]
    assert len(set(others)) == len(others)


def test_the_pipeline_rejects_the_bad_records_and_no_other():
    block = replace(TRAFFIC, bad=0.2).block(0)
    payloads = pa.array(block.values, pa.binary())
    decoded = NdjsonDecoder(ACTIVITY)(payloads, "t")
    assert (decoded.valid == (block.kinds != BAD)).all()
    assert len({rejection.reason for rejection in decoded.rejections}) > 5
    bad = payloads.filter(block.kinds == BAD).to_pylist()
    assert None in bad and b"" in bad
    assert max(len(value or b"") for value in block.values) < 1_000


def test_every_user_is_used_and_no_other():
    users = {key for k in range(3) for key in replace(PLAIN, users=20).block(k).keys}
    assert users == {f"u-{i:05}" for i in range(20)}
    assert set(replace(PLAIN, users=1).block(0).keys) == {"u-00000"}


def test_sessions_open_and_most_are_closed_within_minutes():
    """Of the visits, in the order of a user's events."""
    by_user = defaultdict(list)
    for _, fields in events(replace(PLAIN, users=20).block(0)):
        by_user[fields["user_id"]].append((fields["event_time"], fields["event_type"]))
    opened = closed = 0
    lengths_s = []
    for happened in by_user.values():
        assert happened == sorted(happened)  # in the order of event time
        began = None
        for at, kind in happened:
            if kind == "session_start":
                opened += 1
                began = datetime.fromisoformat(at)
            elif kind == "session_end":
                assert began is not None  # no end without its start
                lengths_s.append((datetime.fromisoformat(at) - began).total_seconds())
                closed += 1
                began = None
            else:
                assert began is not None
    assert opened > 1_000
    assert 0.6 < closed / opened < 0.8
    assert sorted(lengths_s)[len(lengths_s) // 2] < 60
    types = Counter(kind for happened in by_user.values() for _, kind in happened)
    assert types["page_view"] > 2 * types["click"] > 1_000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rate": 0}, "--rate is above 0 and at most 1,000,000, got 0"),
        ({"users": 20_001}, "--users is from 1 to 20,000, got 20001"),
        ({"seed": -1}, "--seed and --late_s must not be negative, got -1"),
        ({"bad": 1.5}, "--bad is a share from 0 to 1, got 1.5"),
        ({"bad": 0.6, "late": 0.6}, "more than 1 together"),
    ],
)
def test_numbers_out_of_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TRAFFIC, **changed)


# ── sending ─────────────────────────────────────────────────────────────────


class Clock:
    """Moves while the sender waits; also stands for the event that stops it."""

    def __init__(self, stop_at_s=float("inf")):
        self.now_us = START_US
        self.stop_at_us = START_US + stop_at_s * 1e6
        self.waits_s = []

    def __call__(self):
        return self.now_us

    def is_set(self):
        return self.now_us >= self.stop_at_us

    def wait(self, seconds):
        self.waits_s.append(seconds)
        self.now_us += round(seconds * 1e6)


class FakeProducer:
    def __init__(self, on_failure, clock, room=10**9, slowness_us=0):
        self.on_failure = on_failure
        self.clock = clock
        self.room = room
        self.slowness_us = slowness_us
        self.sent = []  # (µs, key, value)
        self.queued = 0
        self.fails = lambda value: None

    def produce_batch(self, topic, messages):
        assert topic == "t"
        taken = 0
        for message in messages:
            if self.queued < self.room:
                self.sent.append((self.clock(), message["key"], message["value"]))
                self.queued += 1
                taken += 1
            else:
                message["_error"] = KafkaError(KafkaError._QUEUE_FULL)
        return taken

    def poll(self, timeout_s):
        self.clock.now_us += self.slowness_us
        self.flush(0)

    def flush(self, timeout_s):
        for _, _, value in self.sent[len(self.sent) - self.queued :]:
            if error := self.fails(value):
                self.on_failure(KafkaError(error), None)
        self.queued = 0
        return 0

    def __len__(self):
        return self.queued


def sender(traffic, total=None, stop_at_s=float("inf"), **producer_arguments):
    clock = Clock(stop_at_s)
    sending = Sender(
        traffic,
        "t",
        lambda on_failure: FakeProducer(on_failure, clock, **producer_arguments),
        total,
        clock,
    )
    sending.stop = clock
    return sending


def test_records_are_sent_when_they_are_due():
    sending = sender(PLAIN, total=7)
    sending.run()
    sent_at = [at for at, _, _ in sending._producer.sent]
    assert sent_at == [PLAIN.due_us(i) for i in range(7)]
    assert [value for _, _, value in sending._producer.sent] == PLAIN.block(0).values[:7]
    assert max(sending._producer.clock.waits_s) == 0.5


def test_blocks_follow_each_other_without_a_gap():
    traffic = replace(PLAIN, rate=50_000.0)
    sending = sender(traffic, total=2 * BLOCK_RECORDS + 500)
    sending.run()
    blocks = [traffic.block(k).values for k in range(3)]
    assert [value for _, _, value in sending._producer.sent] == [
        *blocks[0],
        *blocks[1],
        *blocks[2][:500],
    ]


def test_slow_brokers_do_not_slow_the_schedule_and_are_reported(caplog):
    caplog.set_level("INFO")
    sending = sender(replace(PLAIN, rate=400.0), stop_at_s=21, slowness_us=4_000_000)
    sending.run()
    assert sending.sent == 8_001  # what was due at its last turn, after 20 s
    assert [re.sub(r" ·.*|, .*", "", record.message) for record in caplog.records] == [
        "sent 3,201 (400.1/s)",
        "4.0 s behind the clock",
        "sent 6,401 (400.0/s)",
        "4.0 s behind the clock",
    ]
    assert sending.finish(1)["most_behind_s"] == pytest.approx(4.0, abs=0.01)


def test_a_full_buffer_loses_nothing():
    traffic = replace(PLAIN, rate=10_000.0)
    sending = sender(traffic, total=1_000, room=30)
    sending.run()
    values = [value for _, _, value in sending._producer.sent]
    assert values == traffic.block(0).values[:1_000]
    assert sending.finish(1)["acked"] == 1_000


def test_the_summary_adds_up():
    traffic = replace(TRAFFIC, rate=1_000.0)
    sending = sender(traffic, total=5_000)
    sending._producer.fails = lambda value: value is None and KafkaError._MSG_TIMED_OUT
    sending.run()
    block = traffic.block(0)
    kinds = Counter(block.kinds[:5_000].tolist())
    failed = block.values[:5_000].count(None)
    assert failed > 0
    assert sending.finish(1) == {
        "sent": 5_000,
        "acked": 5_000 - failed,
        "failed": failed,
        "late": 100,
        "bad": kinds[BAD],
        "resent": kinds[RESENT],
        "most_behind_s": 0.019,  # what is due within a tick goes together
    }


def test_stopping_ends_it_with_a_summary():
    sending = sender(PLAIN, stop_at_s=2.4)
    sending.run()
    summary = sending.finish(1)
    assert (summary["sent"], summary["acked"]) == (5, 5)


def test_misuse_is_explained(capsys):
    assert producer.main(["--rate=0"]) == 2
    assert capsys.readouterr().err == "--rate is above 0 and at most 1,000,000, got 0.0\n"
