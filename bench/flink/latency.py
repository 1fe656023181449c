"""How long it takes from Kafka to Kafka, and to a row, at an offered rate.

Nothing is measured while the job runs but the state of a table, twice a second. The topics
tell the rest afterwards: each record has the time at which the broker stored it, and the
enriched one of the same event has another.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import confluent_kafka
import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.activity import broken_laws
from beam_pipelines.kernels.columns import micros
from beam_pipelines.kernels.hashing import hash_strings, hash_with
from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.model.activity import ACTIVITY, PAGE_VIEW
from bench.flink import job
from bench.flink.backlog import producer_command
from bench.flink.platform import Platform

WINDOW_MS = 60_000
OUT_OF_ORDERNESS_MS = 120_000
WARM_UP_S = 60
POLL_S = 0.5

_VIEWS = (
    "SELECT (extract(epoch FROM window_start) * 1000)::bigint, sum(views)::bigint "
    "FROM page_view_counts GROUP BY 1"
)


class Events(NamedTuple):
    """Events of a topic, each once: where it was stored first.

    Args:
      identity: uint64, ascending.
      append_ms: When the broker stored it, ms since 1970.
      event_ms: Its own time, ms since 1970.
      is_view: Whether it is a page view.
    """

    identity: np.ndarray
    append_ms: np.ndarray
    event_ms: np.ndarray
    is_view: np.ndarray


class Look(NamedTuple):
    """What the table of page views said at a moment."""

    at_ms: float
    views: Mapping[int, int]  # by the start of the window, ms since 1970


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the append of an event.

    Args:
      kind: Of the job.
      partitions: Of the topic.
      per_s: Events per second that were offered.
      enriched_ms: To the append of the enriched event, one per event.
      early_ms: To the row of its window that counts it, while the window is open.
      final_ms: From the watermark's passing of a window's end to the row that counts all of
        the events before it; one per window.
    """

    kind: str
    partitions: int
    per_s: int
    enriched_ms: np.ndarray
    early_ms: np.ndarray
    final_ms: np.ndarray


def measure(
    platform: Platform,
    kind: str,
    partitions: int,
    per_s: int,
    duration_s: int,
    say: Callable[[str], None],
) -> Latency:
    """Offer events to a job with sinks, and look at when they came out."""
    topic = f"offered-{partitions}"
    enriched, _ = job.sinks_of(topic)
    with platform.fresh(*job.SERVICES[kind]):
        platform.make_topic(topic, partitions)
        with job.started(platform, kind, topic) as (running, _):
            running.await_checkpoint()
            say(f"{kind}: {per_s:,} events/s over {partitions} partitions for {duration_s} s")
            with (
                _looks(platform.database_url) as looks,
                platform.started("offer", producer_command(topic, per_s, duration_s)) as producer,
            ):
                if producer.wait():
                    raise RuntimeError(f"the producer failed:\n{platform.tail('offer')}")
                _await_end(running, platform.records(topic))
            came, went = (events_of(platform.brokers, each) for each in (topic, enriched))
    platform.remove_topics(topic)
    begin_ms = float(came.append_ms.min()) + WARM_UP_S * 1000
    return Latency(
        kind,
        partitions,
        per_s,
        enriched_latency_ms(came, went, begin_ms),
        early_latency_ms(came, went, looks, begin_ms),
        final_latency_ms(came, went, looks, begin_ms),
    )


def enriched_latency_ms(came: Events, went: Events, begin_ms: float) -> np.ndarray:
    """Return ms from topic to topic, of the events that came after a moment."""
    _, first, second = np.intersect1d(
        came.identity, went.identity, assume_unique=True, return_indices=True
    )
    latency_ms = went.append_ms[second] - came.append_ms[first]
    return latency_ms[came.append_ms[first] >= begin_ms]


def early_latency_ms(came: Events, went: Events, looks: list[Look], begin_ms: float) -> np.ndarray:
    """Return ms from the append of a page view to the first look that found it counted.

    The nth view of a window counts as found when the row says n or more. Of the windows
    that no watermark has closed yet.
    """
    found = []
    for start_ms, append_ms in _views_by_window(came, went):
        open_ = append_ms < start_ms + WINDOW_MS + OUT_OF_ORDERNESS_MS - POLL_S * 1000
        seen_ms = _seen_ms(looks, start_ms, np.arange(1, len(append_ms) + 1))
        chosen = open_ & (append_ms >= begin_ms) & np.isfinite(seen_ms)
        found.append(seen_ms[chosen] - append_ms[chosen])
    return np.concatenate(found) if found else np.empty(0)


def final_latency_ms(came: Events, went: Events, looks: list[Look], begin_ms: float) -> np.ndarray:
    """Return, per window, ms from the watermark's passing to the row with all before it."""
    found = []
    last_ms = came.append_ms.max()
    for start_ms, append_ms in _views_by_window(came, went):
        passed_ms = start_ms + WINDOW_MS + OUT_OF_ORDERNESS_MS
        if start_ms < begin_ms or passed_ms > last_ms:
            continue
        counted = int(np.searchsorted(append_ms, passed_ms))
        found.append(_seen_ms(looks, start_ms, np.array([counted]))[0] - passed_ms)
    return np.array(found)


def _views_by_window(came: Events, went: Events) -> Iterator[tuple[int, np.ndarray]]:
    """Return (start of the window, ascending append times of its views), of accepted events."""
    _, accepted, _ = np.intersect1d(
        came.identity, went.identity, assume_unique=True, return_indices=True
    )
    accepted = accepted[came.is_view[accepted]]
    starts_ms = came.event_ms[accepted] // WINDOW_MS * WINDOW_MS
    append_ms = came.append_ms[accepted]
    for start_ms in np.unique(starts_ms):
        yield int(start_ms), np.sort(append_ms[starts_ms == start_ms])


def _seen_ms(looks: list[Look], start_ms: int, counts: np.ndarray) -> np.ndarray:
    """Return when the row of a window first said as much; infinity: never."""
    at_ms = np.array([*(look.at_ms for look in looks), np.inf])
    views = np.maximum.accumulate([look.views.get(start_ms, 0) for look in looks])
    return at_ms[np.searchsorted(views, counts)]


def events_of(brokers: str, topic: str) -> Events:
    """Read a topic from its beginning to its end."""
    decode = NdjsonDecoder(ACTIVITY)
    columns: list[tuple[np.ndarray, ...]] = []
    for values, append_ms in _messages(brokers, topic):
        decoded = decode(pa.array(values, pa.binary()), topic)
        rows = decoded.rows
        at = decoded.valid
        identity = hash_with(hash_strings(rows["event_id"]), micros(rows["event_time"]))
        is_view = pc.equal(rows["event_type"].cast(pa.string()), PAGE_VIEW)
        columns.append(
            (
                identity,
                append_ms[at],
                micros(rows["event_time"]) // 1000,
                is_view.to_numpy(zero_copy_only=False),
            )
        )
    identity, append, event, view = (np.concatenate(c) for c in zip(*columns, strict=True))
    order = np.lexsort((append, identity))
    first = np.append(True, np.diff(identity[order]) != 0)
    return Events(*(column[order][first] for column in (identity, append, event, view)))


def _messages(brokers: str, topic: str) -> Iterator[tuple[list[bytes | None], np.ndarray]]:
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": brokers, "group.id": "bench", "enable.partition.eof": True}
    )
    parts = consumer.list_topics(topic, timeout=30).topics[topic].partitions
    consumer.assign([confluent_kafka.TopicPartition(topic, number, 0) for number in parts])
    ended: set[int] = set()
    values: list[bytes | None] = []
    times_ms: list[int] = []
    try:
        while len(ended) < len(parts):
            for message in consumer.consume(500, timeout=1):
                if message.error() is None:
                    values.append(message.value())
                    times_ms.append(message.timestamp()[1])
                elif message.error().code() == confluent_kafka.KafkaError._PARTITION_EOF:
                    ended.add(message.partition())
            if len(values) > 50_000 or (values and len(ended) == len(parts)):
                yield values, np.array(times_ms)
                values, times_ms = [], []
    finally:
        consumer.close()


class _looks:  # noqa: N801 - reads as the context it is
    """Look at the table of page views while the block runs."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url
        self._looks: list[Look] = []
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> list[Look]:
        self._thread.start()
        return self._looks

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join(30)

    def _run(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._left.wait(POLL_S):
                rows = connection.execute(_VIEWS).fetchall()
                self._looks.append(Look(time.time() * 1000, dict(rows)))


def _await_end(running: job.Job, records: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        running.check()
        counts: dict[str, Any] = running.counters()
        if counts.get("read") == records and not broken_laws(counts):
            return
        time.sleep(1)
    raise TimeoutError("60 s after the last event, not all had passed the job: it can't keep up")
