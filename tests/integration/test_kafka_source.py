"""Readers of topics against a broker."""

import time

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import NewPartitions

from beam_pipelines.io.kafka import reading
from beam_pipelines.io.kafka.client import KafkaCluster
from beam_pipelines.io.kafka.fetch import SourceError
from beam_pipelines.io.kafka.positions import Position, Positions
from beam_pipelines.io.kafka.reading import Reading, Subscription
from beam_pipelines.model.watermark import CLOCK_SKEW_US
from tests.integration.job import Topics

DISORDER_S = 120


@pytest.fixture(scope="module")
def topics(kafka):
    return Topics(kafka)


@pytest.fixture
def topic(topics):
    return topics.make(partitions=2)


@pytest.fixture
def reader(kafka, monkeypatch):
    """Makes readers of topics, and closes them."""
    monkeypatch.setattr(reading, "METADATA_PERIOD_S", 0)
    made = []

    def make(*names, start="earliest", until_end=False, append_time="broker"):
        subscription = Subscription(
            KafkaCluster(kafka), names, DISORDER_S, start, until_end, append_time, None
        )
        made.append(Reading(subscription, "0/1/0"))
        return made[-1]

    yield make
    for each in made:
        each.fetcher.close()


def send(topics, topic, *values, partition=0):
    producer = Producer({"bootstrap.servers": topics.servers})
    for value in values:
        producer.produce(topic, value=value, partition=partition)
    assert producer.flush(30) == 0


def read_on(reader, positions, calls=3):
    """Return the positions after some calls, and (partition, start, end, values) of each batch."""
    found = []
    for _ in range(calls):
        positions = reader.looked_up(positions)
        fetched = reader.fetched(positions, 1.0)
        positions, elements = reader.taken(positions, fetched)
        positions = reader.idle(positions, fetched)
        for element in elements:
            span, batch = getattr(element, "value", element)
            found.append((span.partition, span.start, span.end, batch["payload"].to_pylist()))
    return positions, found


def test_records_come_in_order_with_the_brokers_time(topics, topic, reader):
    before_us = time.time_ns() // 1000
    send(topics, topic, b"a", None, b"")
    send(topics, topic, b"b", partition=1)
    read = reader(topic)
    positions = read.looked_up(Positions())
    values, times = {0: [], 1: []}, []
    while sum(map(len, values.values())) < 4:
        positions, elements = read.taken(positions, read.fetched(positions, 1.0))
        for element in elements:
            span, batch = element.value
            values[span.partition] += batch["payload"].to_pylist()
            times += [t.timestamp() * 1_000_000 for t in batch["append_time"].to_pylist()]
    assert values == {0: [b"a", None, b""], 1: [b"b"]}
    assert all(before_us - 1000 <= t <= time.time_ns() // 1000 for t in times)


def test_what_transactions_leave_behind_is_passed(topics, topic, reader, kafka):
    producer = Producer({"bootstrap.servers": kafka, "transactional.id": "test"})
    producer.init_transactions(30)
    for value, end in ((b"aborted", "abort"), (b"committed", "commit"), (b"gone", "abort")):
        producer.begin_transaction()
        producer.produce(topic, value=value, partition=0)
        producer.flush(30)
        getattr(producer, f"{end}_transaction")(30)
    read = reader(topic, until_end=True)
    positions, found = read_on(read, Positions())
    assert positions.done
    assert positions.partitions[topic, 0].next == 6  # three records and three markers
    assert [v for _, _, _, values in found for v in values] == [b"committed"]
    assert [start for _, start, _, _ in found] == [0, *[end for _, _, end, _ in found][:-1]]


def test_a_partition_without_records_follows_the_clock(topics, topic, reader):
    send(topics, topic, b"a")
    positions, _ = read_on(reader(topic), Positions(), calls=1)
    now_us = time.time_ns() // 1000
    time.sleep(1)
    positions, _ = read_on(reader(topic), positions)
    behind_us = CLOCK_SKEW_US + DISORDER_S * 1_000_000
    # The record was stored a little before it was seen.
    assert now_us - behind_us <= positions.watermark_us() <= time.time_ns() // 1000 - behind_us


def test_the_newest_record_of_another_readers_partition_tells_how_late_it_is(topics, topic, kafka):
    send(topics, topic, b"a", b"b")
    subscription = Subscription(
        KafkaCluster(kafka), (topic,), DISORDER_S, "earliest", False, "broker", None
    )
    readers = [Reading(subscription, f"{index}/2/0") for index in range(2)]
    positions = [each.looked_up(Positions()) for each in readers]
    ((read, mine),) = (
        pair
        for pair in zip(readers, positions, strict=True)
        if (topic, 0) not in pair[1].partitions
    )
    now_us = time.time_ns() // 1000
    followed = read.idle(mine, {})
    behind_us = CLOCK_SKEW_US + DISORDER_S * 1_000_000
    assert now_us - 30_000_000 < followed.watermark_us() + behind_us <= now_us
    for each in readers:
        each.fetcher.close()


def test_reading_goes_on_behind_the_leader_of_the_record_before(topics, topic, reader):
    send(topics, topic, b"a")
    positions, _ = read_on(reader(topic), Positions())
    assert positions.partitions[topic, 0].leader_epoch == 0
    send(topics, topic, b"b")
    _, found = read_on(reader(topic), positions)
    assert found == [(0, 1, 2, [b"b"])]


def test_a_new_partition_is_found_and_read_from_its_beginning(topics, topic, reader):
    read = reader(topic, start=time.time_ns() // 1000)
    positions, found = read_on(read, Positions(), calls=1)
    assert found == []
    topics.admin.create_partitions([NewPartitions(topic, 3)])[topic].result(30)
    send(topics, topic, b"new", partition=2)
    deadline = time.monotonic() + 60
    while (topic, 2) not in positions.partitions:
        assert time.monotonic() < deadline
        positions, found = read_on(read, positions, calls=1)
    positions, more = read_on(read, positions, calls=2)
    assert [*found, *more] == [(2, 0, 1, [b"new"])]


def test_reading_begins_where_it_is_told(topics, topic, reader):
    send(topics, topic, b"before")
    time.sleep(0.01)  # the broker's times are in ms
    start_us = time.time_ns() // 1000
    send(topics, topic, b"after")
    _, found = read_on(reader(topic, start=start_us), Positions())
    assert found == [(0, 1, 2, [b"after"])]
    now_us = time.time_ns() // 1000 + 1_000
    positions, found = read_on(reader(topic, start=now_us), Positions(), calls=1)
    assert found == []
    assert [at.next for at in positions.partitions.values()] == [2, 0]


def test_an_offset_that_is_gone_stops_the_reader(topics, topic, reader):
    send(topics, topic, b"a")
    positions, _ = read_on(reader(topic), Positions())
    send(topics, topic, *[b"b"] * 9)
    topics.trim(topic, 0, 7)
    with pytest.raises(SourceError) as raised:
        read_on(reader(topic), positions, calls=10)
    assert f"offset 1 of {topic}, partition 0, is not there; the broker has 7 to 10." in str(
        raised.value
    )


@pytest.mark.parametrize("leader_epoch", [None, 0])
def test_an_offset_beyond_the_end_stops_the_reader(topics, topic, reader, leader_epoch):
    # As a new leader has it, whose log was cut; with the epoch, the client asks where it was.
    send(topics, topic, b"a")
    positions, _ = read_on(reader(topic), Positions())
    lost = positions.moved({(topic, 0): Position(0, 5, leader_epoch=leader_epoch)})
    with pytest.raises(SourceError, match=r"offset 5 of .* the broker has 0 to 1"):
        read_on(reader(topic), lost, calls=10)


def test_a_topic_that_was_made_anew_stops_the_reader(topics, topic, reader):
    send(topics, topic, b"a")
    read = reader(topic)
    positions, _ = read_on(read, Positions())
    topics.remove(topic)
    topics.make(topic, partitions=2)
    send(topics, topic, b"other", b"records")
    for each in (read, reader(topic)):  # one that runs, one that was started again
        with pytest.raises(SourceError, match="was deleted and made anew"):
            read_on(each, positions, calls=10)


def test_offsets_committed_for_lag_tools_are_where_reading_is(topics, topic, kafka, reader):
    from confluent_kafka import Consumer

    send(topics, topic, b"a", b"b")
    subscription = Subscription(
        KafkaCluster(kafka), (topic,), DISORDER_S, "earliest", False, "broker", "lag"
    )
    read = Reading(subscription, "0/1/0")
    positions, _ = read_on(read, Positions())
    read.commit(positions)
    read.fetcher.close()  # waits for what is on its way
    lag = Consumer({"bootstrap.servers": kafka, "group.id": "lag"})
    committed = lag.committed([TopicPartition(topic, 0), TopicPartition(topic, 1)], 30)
    lag.close()
    assert [each.offset for each in committed] == [2, 0]
