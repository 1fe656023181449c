"""Publishes made-up user activity to a Kafka topic, as it would happen now.

    python scripts/producer.py                                  # 2 events/s, until Ctrl-C
    python scripts/producer.py --rate=100000 --duration_s=60

Visitors open a session, look at pages, click, and most of them close it. Some records are
late, sent twice or beyond reading. The loop is open: what is due is decided by the clock
alone, however slow the brokers are, and it says when it falls behind. Reports go to stderr
every few seconds, a summary to stdout as a line of JSON. Exit codes: 0; 1 records were not
delivered; 2 misuse, or no such topic.
"""

import argparse
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import confluent_kafka
import numpy as np
from confluent_kafka import KafkaError

from beam_pipelines.demo.payloads import (
    FLAW_OF,
    FLAWS,
    PAGES,
    USERS,
    common_payloads,
    tokens_of,
    uuids,
)
from beam_pipelines.io.kafka.client import KafkaCluster, check_topics
from beam_pipelines.io.kafka.sink import DEFAULTS, DELIVERY_S, REQUIRED
from beam_pipelines.model.activity import CLICK, EVENT_TYPES, PAGE_VIEW, SESSION_END, SESSION_START
from beam_pipelines.terminal import printable, run_command, say

BLOCK_RECORDS = 10_000
"""Records generated at once."""

REPORT_S = 5.0
"""Seconds between two reports."""

BEHIND_S = 1.0
"""Seconds behind the clock that are worth a warning."""

_LOGGER = logging.getLogger("producer")

_EVERY_S = 5  # a visitor does something, on average
_LANES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # each divides a block into rounds
_VISIT_STEPS = 8  # on average
_CLOSED = 0.8  # share of the sessions that their visitors close
_CLICKS = 0.25  # of what they do in between
_MAX_DELAY_US = 500_000  # from an event to its sending
_RESEND_S = 10  # by which a record is sent again
_TICK_S = 0.02  # at high rates, what is due is sent this often
_SECOND_US = 1_000_000
_SMALL_FLAWS = len(FLAWS) - 2  # the last two are larger than brokers allow by default

GOOD, LATE, BAD, RESENT = range(4)
"""Kinds of records."""

_VIEW, _CLICK, _START, _END = map(EVENT_TYPES.index, (PAGE_VIEW, CLICK, SESSION_START, SESSION_END))


class Block(NamedTuple):
    """Records in the order of sending."""

    keys: list[str]
    values: list[bytes | None]
    kinds: np.ndarray


@dataclass(frozen=True)
class Traffic:
    """Made-up activity: record i is due `i / rate` seconds after the start.

    All but its times is a function of the other arguments. Its event time is that due
    time less a moment; the late ones' is `late_s` earlier.

    Args:
      start_us: When the first record is due, in µs since 1970.
      rate: Records per second.
      users: Number of users, at most 20,000.
      seed: Another seed, other records.
      resends: Share of records that repeat one of the last seconds, byte for byte.
      late: Share of records that are late, evenly spaced: 0.02 is each 50th.
      bad: Share of records that can't be read.
      late_s: How late they are.

    Raises:
      ValueError: a number is out of range.
    """

    start_us: int
    rate: float = 2.0
    users: int = 1_000
    seed: int = 1
    resends: float = 0.05
    late: float = 0.02
    bad: float = 0.01
    late_s: float = 180.0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1_000_000:
            raise ValueError(f"--rate is above 0 and at most 1,000,000, got {self.rate}")
        if not 1 <= self.users <= len(USERS):
            raise ValueError(f"--users is from 1 to {len(USERS):,}, got {self.users}")
        if self.seed < 0 or self.late_s < 0:
            raise ValueError(
                f"--seed and --late_s must not be negative, got {self.seed} and {self.late_s}"
            )
        shares = {"resends": self.resends, "late": self.late, "bad": self.bad}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"--{name} is a share from 0 to 1, got {share}")
        if sum(shares.values()) > 1:
            raise ValueError(f"--resends, --late and --bad are more than 1 together: {shares}")

    @property
    def lanes(self) -> int:
        """How many visitors are there at a time."""
        return max(n for n in _LANES if n == 1 or n <= min(self.users, self.rate * _EVERY_S))

    def due_us(self, i: int) -> int:
        """Return when record i is due, in µs since 1970."""
        return self.start_us + int(i / self.rate * _SECOND_US)

    def block(self, k: int) -> Block:
        """Return records `k * BLOCK_RECORDS` and following."""
        n = BLOCK_RECORDS
        numbers = np.arange(k * n, (k + 1) * n)
        random = np.random.default_rng([self.seed, k])
        users, pages, types = self._visits(random)

        kinds = self._kinds(numbers, random)
        types[kinds == LATE] = _VIEW  # a session's borders stay where they are
        due_us = self.start_us + (numbers / self.rate * _SECOND_US).astype(np.int64)
        # A user's events take the same time, so they stay in their order.
        event_us = due_us - users * 7_919 % _MAX_DELAY_US
        event_us[kinds == LATE] -= int(self.late_s * _SECOND_US)

        ids = uuids(random.integers(0, 2**64, 2 * n, np.uint64))
        named = np.zeros(n, bool)
        written = common_payloads(ids, named, event_us, users, pages, types)
        values: list[bytes | None] = written.to_pylist()
        bad = np.flatnonzero(kinds == BAD)
        tokens = tokens_of(ids[bad], event_us[bad], users[bad], pages[bad], types[bad])
        for row, flaw, of_row in zip(bad, numbers[bad] % _SMALL_FLAWS, tokens, strict=True):
            values[row] = FLAW_OF[flaw](of_row)

        keys: list[str] = USERS.take(users).to_pylist()
        for row, source in self._resends(kinds, random):
            keys[row], values[row] = keys[source], values[source]
        return Block(keys, values, kinds)

    def _visits(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw what happens: in each round, each lane's visitor does one thing."""
        lanes, rounds = self.lanes, BLOCK_RECORDS // self.lanes
        shape = (rounds, lanes)
        starts = random.random(shape) < 1 / _VISIT_STEPS
        starts[0] = True
        ends = np.vstack([starts[1:], np.ones((1, lanes), bool)])
        began = np.maximum.accumulate(np.arange(rounds)[:, None] * starts, axis=0)

        # The users of two lanes are different ones, so none is in two visits at a time.
        of_lane = np.arange(lanes)
        choices = (self.users - of_lane + lanes - 1) // lanes
        users = of_lane + lanes * (random.random(shape) * choices).astype(np.int64)
        users = np.take_along_axis(users, began, axis=0)

        types = np.where(random.random(shape) < _CLICKS, _CLICK, _VIEW)
        types[ends & (random.random(shape) < _CLOSED)] = _END
        types[starts] = _START
        pages = (len(PAGES) * random.random(shape) ** 3).astype(np.int64)  # some are popular

        order = random.random(shape).argsort(axis=1)
        return tuple(np.take_along_axis(c, order, axis=1).ravel() for c in (users, pages, types))

    def _kinds(self, numbers: np.ndarray, random: np.random.Generator) -> np.ndarray:
        late = np.floor((numbers + 1) * self.late) > np.floor(numbers * self.late)
        # Late ones take their part of what is drawn.
        drawn = random.random(len(numbers)) * max(1 - self.late, 1e-9)
        kinds = np.full(len(numbers), GOOD)
        kinds[drawn < self.bad + self.resends] = RESENT
        kinds[drawn < self.bad] = BAD
        kinds[late] = LATE
        return kinds

    def _resends(self, kinds: np.ndarray, random: np.random.Generator) -> Any:
        """Choose which record each re-send repeats; where there is none, it is a new one."""
        rows = np.arange(len(kinds))
        can_repeat = (kinds == GOOD) | (kinds == LATE)
        newest = np.maximum.accumulate(np.where(can_repeat, rows, -1))
        resent = np.flatnonzero(kinds == RESENT)
        reach = np.minimum(resent, max(1, int(self.rate * _RESEND_S)))
        back = 1 + (random.random(len(resent)) * reach).astype(np.int64)
        sources = np.where(resent > 0, newest[np.maximum(resent - back, 0)], -1)
        kinds[resent[sources < 0]] = GOOD
        known = sources >= 0
        return zip(resent[known].tolist(), sources[known].tolist(), strict=True)


class Sender:
    """Sends records when they are due.

    Args:
      traffic: The records.
      topic: Where they go.
      producer: Makes a producer, given the callback for records that fail.
      total: How many to send; None: until `stop` is set.
      clock: µs since 1970.
    """

    def __init__(
        self,
        traffic: Traffic,
        topic: str,
        producer: Callable[[Callable[[KafkaError, Any], None]], Any],
        total: int | None = None,
        clock: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.stop = threading.Event()
        self.sent = 0
        self.failed = 0
        self.most_behind_s = 0.0
        self._kinds: Counter[int] = Counter()
        self._traffic = traffic
        self._topic = topic
        self._producer = producer(self._on_failure)
        self._total = total
        self._clock = clock
        self._block = traffic.block(0)

    def run(self) -> None:
        """Send until all is sent or `stop` is set."""
        reported_us, reported = self._traffic.start_us, 0
        while not self.stop.is_set() and self.sent != self._total:
            now_us = self._clock()
            behind_s = max(0, now_us - self._traffic.due_us(self.sent)) / _SECOND_US
            self.most_behind_s = max(self.most_behind_s, behind_s)
            self._send_due(now_us)
            if now_us - reported_us >= REPORT_S * _SECOND_US:
                per_s = (self.sent - reported) * _SECOND_US / (now_us - reported_us)
                self._report(per_s, behind_s)
                reported_us, reported = now_us, self.sent
            self._producer.poll(0)
            wait_s = (self._traffic.due_us(self.sent) - self._clock()) / _SECOND_US
            self.stop.wait(min(max(wait_s, _TICK_S), REPORT_S) if wait_s > 0 else 0)

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """Wait for what is on its way; returns what was done."""
        waiting = self._producer.flush(timeout_s)
        if waiting:
            self._producer.purge()
            self._producer.flush(1.0)  # reports what was purged as failed
        return {
            "sent": self.sent,
            "acked": self.sent - self.failed - len(self._producer),
            "failed": self.failed,
            "late": self._kinds[LATE],
            "bad": self._kinds[BAD],
            "resent": self._kinds[RESENT],
            "most_behind_s": round(self.most_behind_s, 3),
        }

    def _send_due(self, now_us: int) -> None:
        due = int((now_us - self._traffic.start_us) * self._traffic.rate / _SECOND_US) + 1
        end = due if self._total is None else min(due, self._total)
        k, first = divmod(self.sent, BLOCK_RECORDS)
        last = min(end - k * BLOCK_RECORDS, BLOCK_RECORDS)
        if last <= first:
            return
        rows = zip(self._block.keys[first:last], self._block.values[first:last], strict=True)
        self._send([{"key": key, "value": value} for key, value in rows])
        self._kinds.update(self._block.kinds[first:last].tolist())
        self.sent += last - first
        if last == BLOCK_RECORDS:
            self._block = self._traffic.block(k + 1)

    def _send(self, messages: list[dict[str, Any]]) -> None:
        while self._producer.produce_batch(self._topic, messages) < len(messages):
            rejected = [message for message in messages if "_error" in message]
            messages = []
            for message in rejected:
                error = message.pop("_error")
                if error.code() == KafkaError._QUEUE_FULL and not self.stop.is_set():
                    messages.append(message)
                else:
                    self._on_failure(error, message)
            self._producer.poll(0.1)

    def _on_failure(self, error: KafkaError, _: Any) -> None:
        if not self.failed:
            _LOGGER.error("a record was not delivered: %s", error.str())
        self.failed += 1

    def _report(self, per_s: float, behind_s: float) -> None:
        waiting = len(self._producer)  # counts other events of the client, too
        acked = max(0, self.sent - self.failed - waiting)
        _LOGGER.info(
            f"sent {self.sent:,} ({per_s:,.1f}/s) · acked {acked:,} · "
            f"failed {self.failed:,} · late {self._kinds[LATE]:,} · bad {self._kinds[BAD]:,} · "
            f"resent {self._kinds[RESENT]:,}"
        )
        if behind_s > BEHIND_S:
            _LOGGER.warning(
                f"{behind_s:.1f} s behind the clock, {waiting:,} records wait for brokers"
            )


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def _producer(cluster: KafkaCluster, on_failure: Callable[[KafkaError, Any], None]) -> Any:
    room = {"queue.buffering.max.messages": 1_000_000, "queue.buffering.max.kbytes": 512 << 10}
    return cluster.client(
        lambda settings: confluent_kafka.Producer({**DEFAULTS, **settings}),
        **REQUIRED,
        **room,
        on_delivery=on_failure,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Send; returns the exit code."""
    # By force: Beam has configured logging when it was imported.
    lines = logging.StreamHandler()
    lines.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, force=True, handlers=[lines])
    flags = _parser().parse_args(argv)
    seed = secrets.randbits(32) if flags.seed is None else flags.seed
    try:
        cluster = KafkaCluster(flags.kafka_bootstrap_servers, flags.kafka_config_file)
        names = ("rate", "users", "resends", "late", "bad", "late_s")
        shape = {name: getattr(flags, name) for name in names}
        Traffic(0, seed=seed, **shape).block(0)  # checks what was asked for, and warms up
        check_topics(cluster, [flags.topic])
        traffic = Traffic(time.time_ns() // 1000, seed=seed, **shape)
        total = None if flags.duration_s is None else round(flags.rate * flags.duration_s)
        sender = Sender(traffic, flags.topic, partial(_producer, cluster), total)
    except (OSError, ValueError) as error:
        say(error)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sender.stop.set())
    _LOGGER.info(f"{flags.rate:g} events/s to {flags.topic}, --seed={seed}")
    sender.run()
    summary = sender.finish(10 if sender.stop.is_set() else DELIVERY_S)
    print(json.dumps(summary), flush=True)
    return 1 if summary["acked"] < summary["sent"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Publish made-up user activity to a Kafka topic.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--kafka_bootstrap_servers",
        "--bootstrap_servers",
        default=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:29092"),
        metavar="HOST:PORT,...",
        help="Brokers (default: $KAFKA_BOOTSTRAP_SERVERS, else 127.0.0.1:29092).",
    )
    add("--kafka_config_file", metavar="FILE", help="librdkafka properties, such as TLS and SASL.")
    add("--topic", default="user_activity", help="Topic (default: user_activity).")
    for flag, type_, default, meaning in (
        ("--rate", float, Traffic.rate, "Records per second"),
        ("--users", int, Traffic.users, "Number of users"),
        ("--resends", float, Traffic.resends, "Share of records that repeat an earlier one"),
        ("--late", float, Traffic.late, "Share of late records, evenly spaced: 0.02 is each 50th"),
        ("--bad", float, Traffic.bad, "Share of records that can't be read"),
        ("--late_s", float, Traffic.late_s, "Seconds by which late records are late"),
    ):
        add(flag, type=type_, default=default, metavar="N", help=f"{meaning} (default: {default}).")
    add("--duration_s", type=float, metavar="N", help="Seconds to run (default: until Ctrl-C).")
    add("--seed", type=int, metavar="N", help="Seed of the records (default: another each time).")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
