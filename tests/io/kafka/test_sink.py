import json
from datetime import UTC, datetime

import apache_beam as beam
import confluent_kafka
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from confluent_kafka import KafkaError
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.io.kafka import sink as kafka_sink
from beam_pipelines.io.kafka.client import KafkaCluster
from beam_pipelines.io.kafka.sink import (
    DELIVERY_S,
    DeadLetterRecords,
    JsonRecords,
    Publisher,
    Records,
    WriteToKafka,
    hex_digits,
)
from beam_pipelines.model.batches import BatchOf, batch_of_rows, empty_batch, one_of
from beam_pipelines.model.records import DEAD_LETTERS, IDENTITY, TIMESTAMP
from beam_pipelines.telemetry import counters
from tests.io.contract import LONG, shortened_form

ORDERS = pa.schema(
    [
        pa.field("event_time", TIMESTAMP, nullable=False),
        pa.field("customer", pa.string(), nullable=False),
        one_of("channel", ("web", "shop")),
        pa.field("order_id", pa.string()),
        IDENTITY,
    ]
)
NINE = datetime(2026, 1, 5, 9, tzinfo=UTC)
PUBLISHED = datetime(2026, 1, 5, 9, 0, 7, 1500, tzinfo=UTC)

AS_JSON = JsonRecords(
    key="customer",
    columns=("event_time", "customer", "channel", "order_id"),
    time_field="processing_time",
    fill={"order_id": "identity"},
    clock=lambda: PUBLISHED,
)


def order(customer="c1", order_id="o1", identity=1, channel="web"):
    return {
        "event_time": NINE,
        "customer": customer,
        "channel": channel,
        "order_id": order_id,
        "identity": identity,
    }


def orders(*rows):
    return batch_of_rows(rows, ORDERS)


def line(customer, order_id, channel="web"):
    return (
        f'{{"event_time":"2026-01-05T09:00:00.000000Z","customer":"{customer}",'
        f'"channel":"{channel}","order_id":"{order_id}",'
        '"processing_time":"2026-01-05T09:00:07.001500Z"}'
    ).encode()


# ── what records look like ──────────────────────────────────────────────────


def test_a_row_is_a_json_object_with_the_time_of_publishing():
    records = AS_JSON(orders(order("c1", "o1"), order("c2", "o2", channel="shop")))
    assert records == Records(["c1", "c2"], [line("c1", "o1"), line("c2", "o2", "shop")], None)


def test_a_missing_id_is_the_identity_in_16_hexadecimal_digits():
    rows = orders(order(order_id=None, identity=0xFEDC_BA98_7654_3210), order(), order("c", None))
    assert AS_JSON(rows).values == [
        line("c1", "fedcba9876543210"),
        line("c1", "o1"),
        line("c", "0000000000000001"),
    ]


def test_slices_of_a_batch_give_their_own_rows():
    rows = orders(order("a"), order("b", None, 2), order("c", None, 3), order("d"))
    assert AS_JSON(rows.slice(1, 2)) == Records(
        ["b", "c"], [line("b", "0000000000000002"), line("c", "0000000000000003")], None
    )


def test_what_json_escapes_stays_one_record_per_row():
    records = AS_JSON(orders(order('né\n"\\', "a\r\nb"), order("c2")))
    assert records.keys == ['né\n"\\', "c2"]
    assert [json.loads(value)["order_id"] for value in records.values] == ["a\r\nb", "o1"]


def test_no_rows_are_no_records():
    assert AS_JSON(empty_batch(ORDERS)) == Records([], [], None)


def test_hexadecimal_digits_of_a_hash():
    values = [0, 1, 0xFEDC_BA98_7654_3210, 2**64 - 1]
    column = hex_digits(pa.array(values, pa.uint64()).to_numpy())
    assert column.to_pylist() == [f"{value:016x}" for value in values]


def letter(**changed):
    return {
        "payload": b"{nonsense",
        "topic": "orders",
        "partition": 3,
        "offset": 12_345_678_901,
        "append_time": PUBLISHED,
        "stage": "parse",
        "reason": "not_json",
        "message": "no JSON object",
        "seconds_late": None,
    } | changed


def test_a_dead_letter_is_the_exact_bytes_with_headers_of_what_is_known():
    every_byte = bytes(range(256))
    rows = [
        letter(payload=every_byte, seconds_late=243.5),
        letter(payload=b"", append_time=None),
        letter(payload=None),
    ]
    records = DeadLetterRecords()(batch_of_rows(rows, DEAD_LETTERS))
    assert records.keys == ["orders-3-12345678901"] * 3
    assert records.values == [every_byte, b"", None]
    common = [
        ("topic", "orders"),
        ("partition", "3"),
        ("offset", "12345678901"),
        ("append_time", "2026-01-05T09:00:07.001500Z"),
        ("stage", "parse"),
        ("reason", "not_json"),
        ("message", "no JSON object"),
    ]
    without_time = [header for header in common if header[0] != "append_time"]
    assert records.headers == [[*common, ("seconds_late", "243.5")], without_time, common]


def test_keys_and_texts_are_shortened_as_in_tables():
    short = shortened_form(LONG[0])
    records = AS_JSON(orders(order(LONG[0], LONG[1]), order(short)))
    assert records.keys == [short, shortened_form(short)]
    fields = [json.loads(value) for value in records.values]
    assert [field["customer"] for field in fields] == records.keys
    assert fields[0]["order_id"] == shortened_form(LONG[1])


@given(st.lists(st.sampled_from(["\0", "\x1f", "é", '"', "\\", "…sha256:"]), min_size=1))
def test_no_record_is_larger_than_what_the_topic_is_asked_to_take(texts):
    text = "".join(texts) * (3_000 // len(texts))
    [key], [value], _ = AS_JSON(orders(order(text, text)))
    assert len(key.encode()) + len(value) <= AS_JSON.least_bytes(ORDERS)
    assert AS_JSON.least_bytes(ORDERS) < 30_000


def test_the_text_of_a_header_is_bounded():
    rows = batch_of_rows([letter(message="no JSON: " + "é" * 100_000)], DEAD_LETTERS)
    [headers] = DeadLetterRecords()(rows).headers
    message = dict(headers)["message"]
    assert message.startswith("no JSON: ééé")
    assert len(message.encode()) <= 1_000


# ── what is refused at construction ─────────────────────────────────────────


def publish_orders(records, schema=ORDERS):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        _ = (
            pipeline
            | beam.Create([]).with_output_types(BatchOf(schema))
            | WriteToKafka("t", KafkaCluster("b:1"), records, "x", check=lambda *_: None)
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": "nobody"}, "no column 'nobody'"),
        ({"columns": ("event_time", "nothing")}, "no column 'nothing'"),
        ({"key": "identity"}, "column 'identity' is uint64, not string"),
        ({"fill": {"order_id": "customer"}}, "column 'customer' is string, not uint64"),
        ({"columns": ("order_id",), "fill": {}}, "'order_id', is nullable"),
        ({"time_field": "order_id"}, "'order_id' is a column already"),
    ],
)
def test_columns_that_do_not_fit_are_refused_at_construction(changed, message):
    arguments = vars(AS_JSON) | changed
    with pytest.raises(ValueError, match=message):
        publish_orders(JsonRecords(**arguments))


def test_batches_that_are_no_dead_letters_are_refused_at_construction():
    with pytest.raises(ValueError, match="these are no dead letters: event_time, customer"):
        publish_orders(DeadLetterRecords())


# ── publishing, to brokers that are made up ─────────────────────────────────


class Broker:
    """Takes what producers deliver to it; `fails` says why it doesn't take a value."""

    def __init__(self, fails=lambda value: None, room=1_000_000):
        self.fails = fails
        self.room = room  # of a producer's buffer, in records
        self.stored = []
        self.producers = []

    def __call__(self, settings):
        self.producers.append(FakeProducer(self, settings))
        return self.producers[-1]

    def __reduce__(self):  # workers have the broker of the test in mind, not a copy
        return _broker, ()


class FakeProducer:
    def __init__(self, broker, settings):
        self.broker = broker
        self.settings = settings
        self.queued = []
        self.is_reachable = True

    def __len__(self):
        return len(self.queued)

    def produce_batch(self, topic, messages):
        taken = 0
        for message in messages:
            assert message.keys() == {"key", "value"}
            if len(self.queued) < self.broker.room:
                report = self.settings["on_delivery"]
                self.queued.append((topic, message["key"], message["value"], None, report))
                taken += 1
            else:
                message["_error"] = KafkaError(KafkaError._QUEUE_FULL)
        return taken

    def produce(self, topic, value, key, headers, on_delivery):
        if len(self.queued) >= self.broker.room:
            raise BufferError("queue full")
        self.queued.append((topic, key, value, headers, on_delivery))

    def poll(self, timeout_s):
        if timeout_s:
            self._deliver(1)

    def flush(self, timeout_s):
        self._deliver(len(self.queued))
        return len(self.queued)

    def purge(self):
        self.queued.clear()

    def _deliver(self, count):
        while self.is_reachable and count and self.queued:
            topic, key, value, headers, report = self.queued.pop(0)
            count -= 1
            if error := self.broker.fails(value):
                report(KafkaError(error), FakeMessage(key, value))
            else:
                self.broker.stored.append((topic, key, value, headers))


def in_bytes(text):
    return text.encode() if isinstance(text, str) else text


class FakeMessage:
    """As the client reports it: without headers."""

    def __init__(self, key, value):
        self._key, self._value = in_bytes(key), value

    def key(self):
        return self._key

    def value(self):
        return self._value


_current = []


def _broker():
    return _current[-1]


@pytest.fixture
def broker():
    _current.append(Broker())
    yield _current[-1]
    _current.pop()


def publish(broker, *batches, records=AS_JSON, schema=ORDERS, check=lambda *_: 1_000_000):
    pipeline = beam.Pipeline(runner=FnApiRunner())
    cluster = KafkaCluster("b:1")
    _ = (
        pipeline
        | beam.Impulse()
        | beam.FlatMap(lambda _: batches).with_output_types(BatchOf(schema))
        | WriteToKafka("out", cluster, records, "orders", producer=broker, check=check)
    )
    result = pipeline.run()
    result.wait_until_finish()
    return counters(result)


def test_rows_are_delivered_when_the_bundle_ends_and_then_counted(broker):
    counted = publish(broker, orders(order("a"), order("b")), empty_batch(ORDERS), orders(order()))
    assert broker.stored == [("out", key, line(key, "o1"), None) for key in ("a", "b", "c1")]
    assert counted == {"rows_written.orders": 3}
    assert len(broker.producers) == 1


def test_dead_letters_are_delivered_with_headers(broker):
    batch = batch_of_rows([letter(), letter(payload=None, offset=5)], DEAD_LETTERS)
    records = DeadLetterRecords()
    counted = publish(broker, batch, records=records, schema=DEAD_LETTERS)
    headers = records(batch).headers
    assert broker.stored == [
        ("out", "orders-3-12345678901", b"{nonsense", headers[0]),
        ("out", "orders-3-5", None, headers[1]),
    ]
    assert counted == {"rows_written.orders": 2}


def test_the_producer_is_idempotent_and_reports_what_fails(broker):
    publish(broker, orders(order()))
    [producer] = broker.producers
    assert producer.settings["enable.idempotence"] is True
    assert producer.settings["acks"] == "all"
    assert producer.settings["delivery.timeout.ms"] == DELIVERY_S * 1000
    assert callable(producer.settings["on_delivery"])


def test_the_client_takes_these_settings():
    settings = KafkaCluster("127.0.0.1:1").settings(**kafka_sink.REQUIRED)
    confluent_kafka.Producer({**kafka_sink.DEFAULTS, **settings})  # raises where it doesn't


def test_a_record_that_is_not_delivered_fails_the_bundle_and_is_not_counted(broker):
    broker.fails = lambda value: b"bad" in value and KafkaError.MSG_SIZE_TOO_LARGE
    with pytest.raises(Exception, match=r"'out' did not take a record of 142 bytes: .*max\.mess"):
        publish(broker, orders(order("a"), order("bad1"), order("b")))
    assert [key for _, key, _, _ in broker.stored] == ["a", "b"]


def test_a_missing_topic_fails_before_anything_is_published(broker):
    def check(cluster, topic, least_bytes):
        raise ValueError(f"no topic {topic} at {cluster.bootstrap_servers}")

    with pytest.raises(Exception, match="no topic out at b:1"):
        publish(broker, orders(order()), check=check)
    assert broker.producers == []


def publisher(broker, clock=lambda: 0.0):
    return Publisher("out", {}, broker, clock)


def test_a_full_buffer_makes_publishing_wait_and_nothing_is_lost_or_repeated(broker):
    broker.room = 3
    publishing = publisher(broker)
    values = [b"%d" % i for i in range(10)]
    publishing.publish(Records(list("abcdefghij"), values))
    publishing.publish(Records(list("abcdefghij"), values, [[("h", "1")]] * 10))
    assert publishing.flush() == 20
    assert [value for _, _, value, _ in broker.stored] == values * 2


def test_records_are_handed_over_in_chunks(broker, monkeypatch):
    monkeypatch.setattr(kafka_sink, "CHUNK_RECORDS", 2)
    publishing = publisher(broker)
    publishing.publish(Records(list("abcde"), [b"%d" % i for i in range(5)]))
    assert publishing.flush() == 5
    assert [key for _, key, _, _ in broker.stored] == list("abcde")


def test_flush_counts_from_the_last_one(broker):
    publishing = publisher(broker)
    assert publishing.flush() == 0
    publishing.publish(Records(["a"], [b"1"]))
    assert publishing.flush() == 1
    assert publishing.flush() == 0


def test_after_a_failure_another_producer_begins_with_nothing(broker):
    broker.fails = lambda value: value == b"bad" and KafkaError._MSG_TIMED_OUT
    publishing = publisher(broker)
    publishing.publish(Records(list("abc"), [b"bad", b"bad", b"good"]))
    with pytest.raises(
        ConnectionError,
        match=r"'out' did not take a record of 3 bytes \(and 1 more\): "
        f"no broker took it within {DELIVERY_S} s",
    ):
        publishing.flush()
    assert publishing.flush() == 0
    publishing.publish(Records(["d"], [b"better"]))
    assert publishing.flush() == 1
    assert len(broker.producers) == 2


def test_a_producer_that_is_stuck_is_given_up(broker):
    now = [0.0]

    def clock():
        now[0] += DELIVERY_S
        return now[0]

    publishing = publisher(broker, clock)
    publishing.publish(Records(["a", "b"], [b"1", b"2"]))
    broker.producers[0].is_reachable = False
    with pytest.raises(ConnectionError, match="did not take 2 records are still waiting"):
        publishing.flush()


def test_a_failure_while_the_buffer_is_full_ends_the_waiting(broker):
    broker.room = 1
    broker.fails = lambda value: KafkaError._MSG_TIMED_OUT
    with pytest.raises(ConnectionError, match="did not take a record of 1 bytes"):
        publisher(broker).publish(Records(["a", "b"], [b"1", b"2"]))


# ── records that are larger than the topic takes ────────────────────────────


def test_a_dead_letter_larger_than_its_topic_takes_is_cut_and_says_so(broker):
    payloads = [bytes(range(256)) * 250, bytes(39_000), b"{", None]
    rows = [letter(payload=payload, offset=i) for i, payload in enumerate(payloads)]
    batch = batch_of_rows(rows, DEAD_LETTERS)

    def check(cluster, topic, least_bytes):
        assert (topic, least_bytes) == ("out", 32_768)
        return 40_000

    counted = publish(broker, batch, records=DeadLetterRecords(), schema=DEAD_LETTERS, check=check)
    assert counted == {"rows_written.orders": 4}
    (_, key, value, headers), *others = broker.stored
    assert key == "orders-3-0"
    assert payloads[0].startswith(value)
    size = len(value) + len(key) + sum(len(name) + len(text) for name, text in headers)
    assert 39_600 < size < 39_800  # the rest is for the protocol
    whole = DeadLetterRecords()(batch).headers
    assert headers == [*whole[0], ("cut", "true"), ("bytes", "64000")]
    assert [(value, headers) for _, _, value, headers in others] == [
        *zip(payloads[1:], whole[1:], strict=True)
    ]


def test_a_dead_letter_that_the_broker_refuses_nevertheless_is_cut_further(broker):
    broker.fails = lambda value: len(value) > 30_000 and KafkaError.MSG_SIZE_TOO_LARGE
    publishing = publisher(broker)
    payload = bytes(range(256)) * 600
    publishing.publish(Records(["a", "b"], [payload, b"small"], [[("stage", "parse")]] * 2))
    assert publishing.flush() == 2
    [small, (_, key, value, headers)] = broker.stored
    assert small[1:] == ("b", b"small", [("stage", "parse")])
    assert (key, value) == (b"a", payload[: len(payload) // 8])
    assert headers == [("stage", "parse"), ("cut", "true"), ("bytes", "153600")]


def test_what_can_not_be_made_smaller_fails(broker):
    broker.fails = lambda value: KafkaError.MSG_SIZE_TOO_LARGE
    publishing = publisher(broker)
    publishing.publish(Records(["a"], [bytes(100_000)], [[("stage", "parse")]]))
    with pytest.raises(ConnectionError, match=r"a record of 6,250 bytes: .*max\.message\.bytes"):
        publishing.flush()


@pytest.mark.parametrize(("limit_bytes", "batch_bytes"), [(50_000, 49_800), (None, 26_136)])
def test_batches_are_no_larger_than_the_topic_takes(broker, limit_bytes, batch_bytes):
    publish(broker, orders(order()), check=lambda *_: limit_bytes)
    assert broker.producers[0].settings["batch.size"] == batch_bytes


def test_closing_forgets_what_was_not_flushed(broker):
    publishing = publisher(broker)
    publishing.publish(Records(["a"], [b"1"]))
    publishing.close()
    publishing.close()
    assert publishing.flush() == 0
    assert broker.stored == []
