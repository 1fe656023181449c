"""Batches as the records of a Kafka topic."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
import confluent_kafka
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import KafkaError

from beam_pipelines.io.kafka.client import KafkaCluster, largest_taken
from beam_pipelines.io.kafka.sizes import (
    DEFAULT_MAX_BYTES,
    FRAME_BYTES,
    HEADER_BYTES,
    JSON_TEXT_BYTES,
    LEAST_BYTES,
    MOST_BYTES,
    Headers,
    fitting,
    halved,
)
from beam_pipelines.io.ndjson import ndjson, require_json
from beam_pipelines.kernels.columns import hashes
from beam_pipelines.kernels.texts import MAX_KEY_BYTES, short_columns, shortened
from beam_pipelines.model.batches import (
    Rows,
    declared,
    require_columns,
    schema_of,
    values_of,
)
from beam_pipelines.model.records import DEAD_LETTERS
from beam_pipelines.telemetry import Counter

DELIVERY_S = 90
"""Seconds that a record may wait for the brokers; a restart of one takes 20 to 60."""

CHUNK_RECORDS = 10_000
"""Records handed to the producer at once."""

DEFAULTS = {
    "compression.type": "lz4",
    "partitioner": "murmur2_random",  # a key's partition is then the one Java clients choose
    "queue.buffering.max.messages": 100_000,
    "queue.buffering.max.kbytes": 128 << 10,
    "batch.size": 1_000_000,  # at most what the topic takes
}
"""Settings that the cluster's config file may override."""

REQUIRED = {
    "enable.idempotence": True,  # with acks from all replicas, and without gaps per partition
    "acks": "all",
    "delivery.timeout.ms": DELIVERY_S * 1000,
    "delivery.report.only.error": True,
    # The topic decides what is too large, and its broker looks at the compressed size.
    "message.max.bytes": 1_000_000_000,
}

_POLL_S = 0.1  # from 0.2 on, the client polls on even when there is room again


class Records(NamedTuple):
    """What a batch looks like in a topic, one entry per row.

    A record with headers that is larger than its topic takes is cut; its headers say so.
    """

    keys: list[str]
    values: list[bytes | None]
    headers: list[Headers] | None = None


class Serializer(Protocol):
    """Makes the records of a batch."""

    def require(self, schema: pa.Schema) -> None:
        """Raise ValueError where it can't make records of batches of this schema."""

    def least_bytes(self, schema: pa.Schema) -> int:
        """Return what a topic must take: no record is larger that can't be cut."""

    def __call__(self, rows: pa.RecordBatch) -> Records:
        """Return a record per row."""


def new_producer(settings: dict[str, Any]) -> Any:
    """Return a producer; a function, as the class itself can't be pickled."""
    return confluent_kafka.Producer(settings)


@dataclass
class WriteToKafka(beam.PTransform):
    """Publish each row of batches as a record of a topic.

    Input: batches that `records` takes. Output: nothing.

    Guarantee: at least once. A bundle ends when all replicas in sync have its records;
    a repeated bundle publishes them again, so a reader that needs each once tells them
    apart by an id in them. Within one bundle the producer neither repeats a record nor
    loses one while brokers restart; what isn't delivered within `DELIVERY_S` fails the
    bundle. Records of one key go to one partition.

    No record fails for its size: the topic must take the largest that `records` makes, which
    is looked up; those with headers are cut where they are larger (`sizes.fitting`).

    Args:
      topic: The topic; it must exist.
      cluster: How to reach it.
      records: Makes the records of a batch.
      sink: Name in the counter `rows_written.SINK`.
      producer: Makes a producer of its settings.
      check: Returns how many bytes a record of the topic may have, None where that isn't
        known; fails where it can't be written to or takes less than the least that is asked.

    Raises:
      ValueError: the batches lack a column, or (at run time) the topic doesn't exist, or
        takes only records that are too small.
      ConnectionError: (at run time) no broker answers, or records were not delivered.
    """

    topic: str
    cluster: KafkaCluster
    records: Serializer
    sink: str
    producer: Callable[[dict[str, Any]], Any] = new_producer
    check: Callable[[KafkaCluster, str, int], int | None] = largest_taken

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        schema = schema_of(batches)
        self.records.require(schema)
        return batches | "Publish" >> beam.ParDo(_PublishFn(self, schema))


class _PublishFn(beam.DoFn):
    def __init__(self, write: WriteToKafka, schema: pa.Schema) -> None:
        self.schema = schema
        self.topic = write.topic
        self.cluster = write.cluster
        self.records = write.records
        self.producer = write.producer
        self.check = write.check
        self.written = Counter(f"rows_written.{write.sink}")

    def setup(self) -> None:
        # A producer would look for a missing topic until its records time out.
        least_bytes = self.records.least_bytes(self.schema)
        limit_bytes = self.check(self.cluster, self.topic, least_bytes)
        settings = {**DEFAULTS, **self.cluster.settings(**REQUIRED)}
        # The broker refuses all records of a batch that is too large.
        batch_bytes = (limit_bytes or least_bytes) - FRAME_BYTES
        settings["batch.size"] = min(int(settings["batch.size"]), batch_bytes)
        record_bytes = min(limit_bytes or DEFAULT_MAX_BYTES, MOST_BYTES)
        self._publisher = Publisher(self.topic, settings, self.producer, limit_bytes=record_bytes)

    def process(self, batch: Rows) -> None:
        self._publisher.publish(self.records(declared(batch, self.schema)))

    def finish_bundle(self) -> None:
        self.written.inc(self._publisher.flush())

    def teardown(self) -> None:
        self._publisher.close()


class Publisher:
    """Publishes to one topic; whoever calls `flush` knows that all has arrived.

    Its producer is its own, so `flush` waits for nobody else's records. After a failure
    the producer is replaced: what it still held belongs to a bundle that is repeated, and
    a fatal error would stay with it.

    Args:
      topic: The topic.
      settings: Of the producer.
      producer: Makes a producer of its settings.
      clock: Seconds that only grow.
      limit_bytes: Of a record, before compression: one with headers is cut to it, and
        further where the broker refuses it nevertheless.
    """

    def __init__(
        self,
        topic: str,
        settings: Mapping[str, Any],
        producer: Callable[[dict[str, Any]], Any] = new_producer,
        clock: Callable[[], float] = time.monotonic,
        limit_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self._topic = topic
        self._settings = {**settings, "on_delivery": self._failed}
        self._new_producer = producer
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._producer: Any = None
        self._published = 0
        self._failures: list[tuple[KafkaError, int]] = []
        self._refused: list[tuple[bytes, bytes, Headers]] = []

    def publish(self, records: Records) -> None:
        """Hand over records; waits while the producer's buffer is full."""
        if not records.keys:
            return
        if self._producer is None:
            self._producer = self._new_producer(self._settings)
        if records.headers is None:
            for start in range(0, len(records.keys), CHUNK_RECORDS):
                end = start + CHUNK_RECORDS
                pairs = zip(records.keys[start:end], records.values[start:end], strict=True)
                self._publish_batch([{"key": key, "value": value} for key, value in pairs])
        else:
            rows = zip(records.keys, records.values, records.headers, strict=True)
            for key, value, headers in rows:
                self._publish_one(key, *fitting(key, value, headers, self._limit_bytes))
        self._published += len(records.keys)

    def flush(self) -> int:
        """Wait until all records were delivered; returns how many since the last time."""
        if self._producer is not None:
            # The producer itself gives up on each record after DELIVERY_S.
            deadline = self._clock() + 2 * DELIVERY_S
            while self._producer.flush(1.0) or self._publish_smaller():
                self._raise_failures()
                if self._clock() > deadline:
                    self._raise_undelivered(f"{len(self._producer):,} records are still waiting")
            self._raise_failures()
        published, self._published = self._published, 0
        return published

    def close(self) -> None:
        """Forget what was not flushed, and disconnect."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(1.0)  # takes the reports of what was purged
            self._producer = None
        self._published = 0
        self._failures = []
        self._refused = []

    def _publish_batch(self, messages: list[dict[str, Any]]) -> None:
        while self._producer.produce_batch(self._topic, messages) < len(messages):
            messages = [message for message in messages if "_error" in message]
            for message in messages:
                error = message.pop("_error")
                if error.code() != KafkaError._QUEUE_FULL:
                    self._failures.append((error, len(message["value"] or b"")))
            self._wait()

    def _publish_smaller(self) -> bool:
        """Publish what was refused for its size again, cut in half; tells if there was any."""
        refused, self._refused = self._refused, []
        for key, value, headers in refused:
            self._publish_one(key, *halved(value, headers))
        return bool(refused)

    def _publish_one(self, key: str | bytes, value: bytes | None, headers: Headers) -> None:
        report = partial(self._failed, headers=headers)  # the client's own has no headers
        while True:
            try:
                self._producer.produce(self._topic, value, key, headers=headers, on_delivery=report)
                return
            except BufferError:
                self._wait()
            except confluent_kafka.KafkaException as error:
                self._failures.append((error.args[0], len(value or b"")))
                self._raise_failures()

    def _wait(self) -> None:
        """Let the producer send something; where it can't, it fails what is too old."""
        self._producer.poll(_POLL_S)
        self._raise_failures()

    def _failed(self, error: KafkaError, message: Any, headers: Headers | None = None) -> None:
        value = message.value() or b""
        is_large = error.code() == KafkaError.MSG_SIZE_TOO_LARGE and len(value) > LEAST_BYTES // 4
        if is_large and headers is not None:
            self._refused.append((message.key(), value, headers))
        else:
            self._failures.append((error, len(value)))

    def _raise_failures(self) -> None:
        if self._failures:
            error, size = self._failures[0]
            more = f" (and {len(self._failures) - 1:,} more)" if len(self._failures) > 1 else ""
            self._raise_undelivered(f"a record of {size:,} bytes{more}: {_meaning(error)}")

    def _raise_undelivered(self, what: str) -> None:
        self.close()
        raise ConnectionError(f"Kafka's topic {self._topic!r} did not take {what}")


def _meaning(error: KafkaError) -> str:
    if error.code() == KafkaError._MSG_TIMED_OUT:
        return f"no broker took it within {DELIVERY_S} s"
    if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
        return f"{error.str()}; raise max.message.bytes of the topic (kafka-configs.sh --alter)"
    return str(error.str())


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class JsonRecords:
    """Rows as JSON objects, the lines of `ndjson`, and when they were published.

    Keys and texts over MAX_KEY_BYTES are shortened (`kernels.texts`), as in tables.

    Args:
      key: Column that holds the records' keys, strings.
      columns: Columns of the objects, in this order.
      time_field: Name of a further field: when the batch was published (RFC 3339, UTC).
      fill: Column → the hash column (uint64) that stands in where it is null, as 16
        hexadecimal digits.
      clock: What time it is.
    """

    key: str
    columns: tuple[str, ...]
    time_field: str
    fill: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], datetime] = _now

    def require(self, schema: pa.Schema) -> None:
        require_columns(schema, self.key, *self.columns, *self.fill, *self.fill.values())
        require_json(pa.schema([schema.field(name) for name in self.columns]))
        strings = ((name, pa.string()) for name in (self.key, *self.fill))
        hashed = ((name, pa.uint64()) for name in self.fill.values())
        for name, type_ in (*strings, *hashed):
            if schema.field(name).type != type_:
                raise ValueError(f"column {name!r} is {schema.field(name).type}, not {type_}")
        if self.time_field in self.columns:
            raise ValueError(f"{self.time_field!r} is a column already")

    def least_bytes(self, schema: pa.Schema) -> int:
        names = (*self.columns, self.time_field)
        labels = sum(len(f"{json.dumps(name)}:,".encode()) for name in names)
        values = sum(_widest(schema.field(name)) for name in self.columns)
        return FRAME_BYTES + MAX_KEY_BYTES + labels + values + _TIME_BYTES

    def __call__(self, rows: pa.RecordBatch) -> Records:
        rows = short_columns(rows, (self.key, *self.columns), MAX_KEY_BYTES)
        names = [*self.columns, self.time_field]
        columns = [self._filled(name, rows) for name in self.columns]
        columns.append(_constant(_rfc3339(self.clock()), len(rows)))
        lines = ndjson(pa.RecordBatch.from_arrays(columns, names))
        # Newlines within strings are escaped, so each one left ends an object.
        values: list[bytes | None] = [*lines.to_pybytes().split(b"\n")[:-1]]
        return Records(_texts(rows[self.key]), values)

    def _filled(self, name: str, rows: pa.RecordBatch) -> pa.Array:
        column = rows[name]
        if name not in self.fill or not column.null_count:
            return column
        return pc.coalesce(column, hex_digits(hashes(rows[self.fill[name]])))


class DeadLetterRecords:
    """Dead letters: the exact bytes, and in headers what is known about them.

    The key is TOPIC-PARTITION-OFFSET of the rejected record. What is null has no header.
    One that is larger than its topic takes is cut, with headers `cut` and `bytes`: there the
    coordinates lead to the rest.
    """

    HEADERS = tuple(name for name in DEAD_LETTERS.names if name != "payload")

    def require(self, schema: pa.Schema) -> None:
        if not schema.equals(DEAD_LETTERS):
            raise ValueError(f"these are no dead letters: {', '.join(schema.names)}")

    def least_bytes(self, schema: pa.Schema) -> int:
        return LEAST_BYTES

    def __call__(self, rows: pa.RecordBatch) -> Records:
        texts = {name: _texts(rows[name]) for name in self.HEADERS}
        texts["message"] = _texts(shortened(rows["message"], HEADER_BYTES))
        headers: list[Headers] = [
            [(name, text) for name, text in zip(self.HEADERS, row, strict=True) if text is not None]
            for row in zip(*texts.values(), strict=True)
        ]
        coordinates = zip(texts["topic"], texts["partition"], texts["offset"], strict=True)
        return Records(["-".join(at) for at in coordinates], rows["payload"].to_pylist(), headers)


_HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)


def hex_digits(values: np.ndarray) -> pa.StringArray:
    """Write uint64 values as 16 hexadecimal digits each."""
    text = _HEX[values.astype(">u8").view(np.uint8)]
    ends = np.arange(len(values) + 1, dtype=np.int32) * np.int32(16)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(text))


_TIME_BYTES = len('"2026-01-05T09:00:03.123456Z"')
_NUMBER_BYTES = 32  # of the longest integer or float, with room


def _widest(field: pa.Field) -> int:
    """Return how many bytes a value may have in JSON, its text shortened."""
    if pa.types.is_dictionary(field.type):
        return max(len(json.dumps(value).encode()) for value in values_of(field))
    if pa.types.is_timestamp(field.type):
        return _TIME_BYTES
    return JSON_TEXT_BYTES if pa.types.is_string(field.type) else _NUMBER_BYTES


def _constant(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int8), pa.array([text]))


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _texts(column: pa.Array) -> list[Any]:
    """Return values as strings; times in RFC 3339."""
    if pa.types.is_timestamp(column.type):
        column = pc.replace_substring(column.cast(pa.string()), " ", "T")
    texts: list[Any] = column.cast(pa.string()).to_numpy(zero_copy_only=False).tolist()
    return texts
