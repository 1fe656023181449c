"""The Kafka sink against a broker."""

import gc
import itertools
import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from beam_pipelines.io.kafka import sink as kafka_sink
from beam_pipelines.io.kafka.client import (
    ANSWER_S,
    KafkaCluster,
    Topic,
    check_topics,
    largest_taken,
    topic_partitions,
)
from beam_pipelines.io.kafka.sink import (
    DeadLetterRecords,
    JsonRecords,
    Publisher,
    Records,
    WriteToKafka,
)
from beam_pipelines.model.batches import BatchOf, batch_of_rows, empty_batch
from beam_pipelines.model.records import DEAD_LETTERS
from tests.io.contract import Sink, TableContract, run, shortened_form
from tests.io.kafka.test_sink import ORDERS, letter, order

PARTITIONS = 3


class Topics:
    """Makes topics on a broker, and reads all that is in one."""

    numbers = itertools.count()

    def __init__(self, servers):
        self.cluster = KafkaCluster(servers)
        self._admin = AdminClient(self.cluster.settings())

    def new(self, **config):
        name = f"test_{next(self.numbers)}"
        config = {"message.timestamp.type": "LogAppendTime"} | config
        self._admin.create_topics([NewTopic(name, PARTITIONS, 1, config=config)])[name].result(30)
        while name not in self._admin.list_topics(timeout=10).topics:
            time.sleep(0.05)
        return name

    def delete(self, name):
        self._admin.delete_topics([name])[name].result(30)
        while name in self._admin.list_topics(timeout=10).topics:
            time.sleep(0.05)

    def records(self, name):
        """Return its records, each partition's in their order."""
        consumer = Consumer(
            self.cluster.settings(
                **{
                    "group.id": "test",
                    "enable.partition.eof": True,
                    "isolation.level": "read_uncommitted",
                }
            )
        )
        consumer.assign([TopicPartition(name, p, 0) for p in range(PARTITIONS)])
        records, ended = [], set()
        while len(ended) < PARTITIONS:
            for message in consumer.consume(500, 1.0):
                if message.error():
                    ended.add(message.partition())
                else:
                    records.append(message)
        consumer.close()
        return records


@pytest.fixture(scope="module")
def topics(kafka):
    return Topics(kafka)


def librdkafka_threads():
    gc.collect()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("rdk:broker") for name in names)


class KafkaSink(Sink):
    """Repeats reach the topic; its reader keeps one record per order."""

    def __init__(self, topics):
        self.topics = topics
        self.topic = topics.new()
        self.given = [order(f"c{i % 4}", f"o{i}", i) for i in range(9)]
        self.given.insert(4, self.given[3])
        self.threads = librdkafka_threads()

    def elements(self, batch_rows):
        return [
            batch_of_rows(self.given[i : i + batch_rows], ORDERS)
            for i in range(0, len(self.given), batch_rows)
        ]

    def nothing(self):
        return [empty_batch(ORDERS)] * 2

    def hint(self):
        return BatchOf(ORDERS)

    def write(self):
        return WriteToKafka(
            self.topic,
            self.topics.cluster,
            JsonRecords(
                "customer", ("event_time", "customer", "channel", "order_id"), "processing_time"
            ),
            "orders",
        )

    def stored(self):
        orders = {}
        for record in self.topics.records(self.topic):
            fields = json.loads(record.value())
            published = datetime.fromisoformat(fields.pop("processing_time"))
            assert published.tzinfo == UTC and published <= datetime.now(UTC)
            orders[fields.pop("order_id")] = (record.key().decode(), fields)
        return dict(sorted(orders.items()))

    def rows(self):
        return list(self.stored().items())

    def expected_rows(self):
        return [
            (
                f"o{i}",
                (
                    f"c{i % 4}",
                    {
                        "event_time": "2026-01-05T09:00:00.000000Z",
                        "customer": f"c{i % 4}",
                        "channel": "web",
                    },
                ),
            )
            for i in range(9)
        ]

    def with_keys(self, keys, batch_rows):
        self.given = [order(key, f"o{i}", i) for i, key in enumerate(keys)]
        return self.elements(batch_rows)

    def keys(self):
        assert all(key == fields["customer"] for key, fields in self.stored().values())
        return sorted(key for key, _ in self.stored().values())

    def obstruct(self):
        self.topics.delete(self.topic)

    def assert_closed(self):
        assert librdkafka_threads() == self.threads


class TestContract(TableContract):
    @pytest.fixture
    def sink(self, topics):
        return KafkaSink(topics)


def test_a_topic_is_described_as_it_is(topics):
    name = topics.new(**{"retention.ms": "86400000"})
    found = topic_partitions(topics.cluster, [name])
    assert found == {name: Topic(name, found[name].topic_id, (0, 1, 2), "LogAppendTime", 86400000)}
    assert len(found[name].topic_id) == 22
    topics.delete(name)
    with pytest.raises(
        ValueError, match=rf"'{name}' does not exist at .*; to create it: kafka-topics.sh .*{name} "
    ):
        check_topics(topics.cluster, [name])


def test_a_client_that_the_broker_refuses_is_told_so_at_once(topics, tmp_path):
    config = tmp_path / "client.properties"
    config.write_text(
        "security.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN\n"
        "sasl.username=joe\nsasl.password=hunter2\n"
    )
    cluster = KafkaCluster(topics.cluster.bootstrap_servers, str(config))
    started = time.monotonic()
    with pytest.raises(PermissionError, match=r"refuses this client.*are the user, pass") as raised:
        check_topics(cluster, ["any"])
    assert time.monotonic() - started < ANSWER_S / 2
    assert "hunter2" not in str(raised.value)


def test_every_row_is_counted_and_a_key_stays_in_its_partition(topics):
    sink = KafkaSink(topics)
    assert run(sink, sink.elements(3)) == {"rows_written.orders": 10}
    records = topics.records(sink.topic)
    assert len(records) == 10
    partitions = {(record.key(), record.partition()) for record in records}
    assert len(partitions) == 4  # as many as there are keys


def test_dead_letters_keep_every_byte_and_tell_nothing_from_an_empty_record(topics):
    payloads = [bytes(range(256)), b"", None]
    rows = [letter(payload=payload, offset=i) for i, payload in enumerate(payloads)]
    sink = KafkaSink(topics)
    sink.hint = lambda: BatchOf(DEAD_LETTERS)
    sink.write = lambda: WriteToKafka(
        sink.topic, topics.cluster, DeadLetterRecords(), "dead_letters"
    )
    assert run(sink, [batch_of_rows(rows, DEAD_LETTERS)]) == {"rows_written.dead_letters": 3}
    records = {record.key(): record for record in topics.records(sink.topic)}
    assert {key: record.value() for key, record in records.items()} == {
        b"orders-3-0": payloads[0],
        b"orders-3-1": payloads[1],
        b"orders-3-2": payloads[2],
    }
    assert records[b"orders-3-1"].headers() == [
        ("topic", b"orders"),
        ("partition", b"3"),
        ("offset", b"1"),
        ("append_time", b"2026-01-05T09:00:07.001500Z"),
        ("stage", b"parse"),
        ("reason", b"not_json"),
        ("message", b"no JSON object"),
    ]


def publisher(topics, topic, **settings):
    required = topics.cluster.settings(**kafka_sink.REQUIRED)
    return Publisher(topic, {**kafka_sink.DEFAULTS, **required, **settings})


def test_a_record_that_the_topic_refuses_fails_the_bundle_at_once(topics):
    publishing = publisher(topics, topics.new(**{"max.message.bytes": "2000"}))
    publishing.publish(Records(["a"], [bytes(1_000)]))
    assert publishing.flush() == 1
    noise = b"".join(i.to_bytes(2) for i in range(0, 60_000, 7))
    with pytest.raises(ConnectionError, match=r"did not take .*; raise max\.message\.bytes"):
        publishing.publish(Records(["a"], [noise]))
        publishing.flush()


def noise(size):
    return np.random.default_rng(size).bytes(size)


def publish(topics, topic, records, *batches):
    pipeline = beam.Pipeline(runner=FnApiRunner())
    _ = (
        pipeline
        | beam.Create(batches).with_output_types(BatchOf(batches[0].schema))
        | WriteToKafka(topic, topics.cluster, records, "it")
    )
    pipeline.run().wait_until_finish()


@pytest.mark.parametrize("limit", [1_048_588, 4 << 20])
def test_a_dead_letter_of_a_record_as_large_as_its_topic_takes_is_cut(topics, limit):
    given, letters = (topics.new(**{"max.message.bytes": str(limit)}) for _ in range(2))
    garbage = noise(limit - 130)
    producer = Producer(topics.cluster.settings(**{"message.max.bytes": 10_000_000}))
    producer.produce(given, garbage)
    producer.flush(30)
    [taken] = topics.records(given)
    where = {"topic": given, "partition": taken.partition(), "offset": taken.offset()}
    rows = [letter(payload=taken.value(), **where), letter(payload=b"{", offset=2)]
    publish(topics, letters, DeadLetterRecords(), batch_of_rows(rows, DEAD_LETTERS))
    found = {len(record.value()): record for record in topics.records(letters)}
    assert found.pop(1).headers()[-1] == ("message", b"no JSON object")
    [(size, cut)] = found.items()
    assert limit - 1_000 < size < limit
    assert garbage.startswith(cut.value())
    headers = dict(cut.headers())
    assert (headers["cut"], int(headers["bytes"])) == (b"true", len(garbage))
    assert cut.key().decode() == f"{given}-{taken.partition()}-{taken.offset()}"
    assert [headers[name].decode() for name in where] == [*map(str, where.values())]


def test_an_event_with_a_text_of_900_kb_is_published_shortened(topics):
    topic, text = topics.new(), noise(450_000).hex()
    records = JsonRecords("customer", ("customer", "order_id"), "processing_time")
    publish(topics, topic, records, batch_of_rows([order(text, text)], ORDERS))
    [record] = topics.records(topic)
    fields = json.loads(record.value())
    short = shortened_form(text)
    assert (record.key().decode(), fields["customer"], fields["order_id"]) == (short,) * 3


def test_many_records_for_a_topic_of_small_batches_arrive(topics):
    topic = topics.new(**{"max.message.bytes": "50000"})
    rows = [order(noise(900 + i % 7).hex()[:1_900], f"o{i}", i) for i in range(3_000)]
    records = JsonRecords("customer", ("customer", "order_id"), "processing_time")
    publish(topics, topic, records, batch_of_rows(rows, ORDERS))
    assert len(topics.records(topic)) == len(rows)


def test_a_topic_says_how_large_a_record_may_be(topics):
    assert largest_taken(topics.cluster, topics.new(), 40_000) == 1_048_588
    small = topics.new(**{"max.message.bytes": "40000"})
    assert largest_taken(topics.cluster, small, 40_000) == 40_000


def test_a_topic_that_takes_too_little_is_refused_at_the_start(topics):
    topic = topics.new(**{"max.message.bytes": "10000"})
    remedy = f"kafka-configs.sh .* --entity-name {topic} --add-config max.message.bytes=1048588"
    with pytest.raises(Exception, match=f"takes records of 10,000 bytes, .* 32,768; .*{remedy}"):
        publish(topics, topic, DeadLetterRecords(), empty_batch(DEAD_LETTERS))


def test_a_dead_letter_is_cut_further_where_the_topic_takes_less_than_was_thought(topics):
    topic = topics.new(**{"max.message.bytes": "200000"})
    publishing = publisher(topics, topic)
    payload = noise(3_000_000)
    publishing.publish(Records(["a", "b"], [payload, b"small"], [[("stage", "parse")]] * 2))
    assert publishing.flush() == 2
    publishing.close()
    cut, small = sorted(topics.records(topic), key=lambda record: record.key())
    assert (small.value(), small.headers()) == (b"small", [("stage", b"parse")])
    assert 100_000 < len(cut.value()) < 200_000
    assert payload.startswith(cut.value())
    assert cut.headers() == [("stage", b"parse"), ("cut", b"true"), ("bytes", b"3000000")]


def test_a_buffer_of_a_few_records_is_no_loss(topics):
    topic = topics.new()
    publishing = publisher(topics, topic, **{"queue.buffering.max.messages": 10})
    values = [b"%d" % i for i in range(500)]
    publishing.publish(Records([f"k{i % 7}" for i in range(500)], values))
    assert publishing.flush() == 500
    assert sorted(record.value() for record in topics.records(topic)) == sorted(values)
    publishing.close()


def test_a_crash_of_the_broker_in_the_middle_neither_loses_nor_repeats_a_record(stack, topics):
    topic = topics.new()
    publishing = publisher(topics, topic)
    values = [b"%d" % i for i in range(60_000)]
    publishing.publish(Records([f"k{i}" for i in range(30_000)], values[:30_000]))
    stack.kill("kafka")
    publishing.publish(Records([f"k{i}" for i in range(30_000)], values[30_000:]))
    restart = threading.Thread(target=stack.up, args=("kafka",))
    restart.start()
    try:
        assert publishing.flush() == 60_000
    finally:
        restart.join()
    assert sorted(record.value() for record in topics.records(topic)) == sorted(values)
    publishing.close()
