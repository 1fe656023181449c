import pytest
from confluent_kafka import (
    TIMESTAMP_CREATE_TIME,
    TIMESTAMP_LOG_APPEND_TIME,
    KafkaError,
    KafkaException,
)
from confluent_kafka.admin import OffsetSpec

from beam_pipelines.io.kafka import fetch
from beam_pipelines.io.kafka.client import KafkaCluster
from beam_pipelines.io.kafka.fetch import Fetcher, SourceError
from beam_pipelines.model.records import PAYLOADS
from tests.io.kafka.broker import P0, P1


class Message:
    def __init__(
        self,
        partition,
        offset,
        value=b"v",
        time_ms=1000,
        kind=None,
        error=None,
        topic="views",
        epoch=None,
    ):
        self._topic, self._partition, self._offset, self._value = topic, partition, offset, value
        self._timestamp = kind or TIMESTAMP_LOG_APPEND_TIME, time_ms
        self._error = error and KafkaError(error)
        self._epoch = epoch

    def topic(self):
        return self._topic

    def partition(self):
        return self._partition

    def offset(self):
        return self._offset

    def value(self):
        return self._value

    def timestamp(self):
        return self._timestamp

    def error(self):
        return self._error

    def leader_epoch(self):
        return self._epoch

    def __len__(self):
        return len(self._value or b"")


class Consumer:
    """Hands out chunks; then time passes without any."""

    def __init__(self, settings):
        self.settings = settings
        self.chunks, self.assigned, self.asked, self.closed = [], [], [], False

    def assign(self, partitions):
        self.assigned.append([(each.topic, each.partition, each.offset) for each in partitions])
        self.epochs = [each.leader_epoch for each in partitions]

    def consume(self, most, timeout_s):
        self.asked.append((most, round(timeout_s, 3)))
        if self.chunks:
            self.clock.now_s += 0.01
            return self.chunks.pop(0)
        self.clock.now_s += timeout_s
        return []

    def commit(self, offsets, asynchronous):
        raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    def close(self):
        self.closed = True


class Clock:
    now_s = 50.0

    def monotonic(self):
        return self.now_s

    def time(self):
        return self.now_s


class Admin:
    offsets = {-2: 40, -1: 90, -3: 89}  # noqa: RUF012
    newest_ms = {0: 7000, 1: -1}  # noqa: RUF012 - the second is empty

    def __init__(self, settings):
        self.reachable = True

    def list_offsets(self, asked, request_timeout):
        return {tp: _Answer(self, spec, tp.partition) for tp, spec in asked.items()}


class _Answer:
    def __init__(self, admin, spec, partition):
        self.admin, self.spec, self.partition = admin, spec, partition

    def result(self):
        if not self.admin.reachable:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        self.offset = self.admin.offsets[self.spec._value]
        self.timestamp = self.admin.newest_ms[self.partition]
        if self.timestamp is None:
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
        return self


@pytest.fixture
def fetcher(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(fetch, "time", clock)
    fetcher = Fetcher(KafkaCluster("b:9092"), None, Consumer, Admin)
    fetcher._consumer.clock = clock
    fetcher.assign({P0: 5, P1: 7}, {})
    return fetcher


def test_records_come_by_partition_in_columns(fetcher):
    fetcher._consumer.chunks = [
        [Message(0, 5, b"a", 1000)],
        [Message(1, 7, None, 1001), Message(0, 6, b"b", 1002)],
    ]
    found = fetcher.fetch(1.0)
    assert {p: (of.values.to_pylist(), of.next, of.log_append_time) for p, of in found.items()} == {
        P0: ([b"a", b"b"], 7, True),
        P1: ([None], 8, True),
    }
    assert found[P0].offsets.tolist() == [5, 6]
    assert found[P0].times_ms.tolist() == [1000, 1002]
    assert fetcher.offsets == {P0: 7, P1: 8}


def test_partitions_of_one_number_are_told_apart_by_their_topics(fetcher):
    fetcher._consumer.chunks = [
        [Message(0, 5), Message(0, 6)],
        [Message(0, 1, topic="clicks"), Message(0, 2, topic="clicks"), Message(0, 7)],
        [Message(1, 3, topic="clicks"), Message(1, 7)],
    ]
    found = fetcher.fetch(1.0)
    assert {partition: of.offsets.tolist() for partition, of in found.items()} == {
        P0: [5, 6, 7],
        ("clicks", 0): [1, 2],
        ("clicks", 1): [3],
        P1: [7],
    }


@pytest.mark.parametrize(("partitions", "slice_s"), [(2, 0.11), (16, 0.18)])
def test_it_waits_for_the_first_record_and_gathers_a_slice_from_then_on(
    fetcher, partitions, slice_s
):
    fetcher.assign({("activity", number): 5 for number in range(partitions)}, {})
    fetcher._consumer.chunks = [[Message(0, 5, time_ms=49_000)]]
    fetcher.fetch(1.0)
    assert fetcher._consumer.asked == [(1, 1.0), (500, pytest.approx(slice_s))]


def test_a_slice_of_old_records_is_longer(fetcher):
    fetcher._consumer.chunks = [[Message(0, 5, time_ms=47_000)]]
    fetcher.fetch(1.0)
    assert fetcher._consumer.asked == [(1, 1.0), (500, fetch.BEHIND_SLICE_S)]


def test_a_full_slice_is_enough(fetcher, monkeypatch):
    monkeypatch.setattr(fetch, "SLICE_ROWS", 2)
    fetcher._consumer.chunks = [[Message(0, 5), Message(0, 6)], [Message(0, 7)]]
    assert fetcher.fetch(1.0)[P0].next == 7
    assert len(fetcher._consumer.chunks) == 1


def test_a_slice_with_many_bytes_is_enough(fetcher, monkeypatch):
    monkeypatch.setattr(fetch, "SLICE_BYTES", 3)
    fetcher._consumer.chunks = [[Message(0, 5, b"long")], [Message(0, 6)]]
    assert fetcher.fetch(1.0)[P0].next == 6


def test_nothing_comes_of_nothing(fetcher):
    assert fetcher.fetch(1.0) == {}
    assert fetcher.offsets == {P0: 5, P1: 7}


def test_the_end_of_a_partition_passes_what_holds_no_records(fetcher):
    # A transaction leaves a marker behind, which takes an offset.
    eof = KafkaError._PARTITION_EOF
    fetcher._consumer.chunks = [[Message(0, 5), Message(0, 8, error=eof), Message(1, 9, error=eof)]]
    found = fetcher.fetch(1.0)
    assert {p: (of.offsets.tolist(), of.next) for p, of in found.items()} == {
        P0: ([5], 8),
        P1: ([], 9),
    }
    assert found[P1].payloads(None).schema == PAYLOADS


def test_an_end_before_further_records_of_a_slice_takes_nothing_back(fetcher):
    eof = KafkaError._PARTITION_EOF
    fetcher._consumer.chunks = [[Message(0, 5), Message(0, 6, error=eof), Message(0, 6)]]
    found = fetcher.fetch(1.0)
    assert (found[P0].offsets.tolist(), found[P0].next) == ([5, 6], 7)
    assert fetcher.offsets == {P0: 7, P1: 7}


def test_one_record_with_a_producers_time_is_told(fetcher):
    fetcher._consumer.chunks = [[Message(0, 5), Message(0, 6, kind=TIMESTAMP_CREATE_TIME)]]
    assert not fetcher.fetch(1.0)[P0].log_append_time


def test_partitions_are_assigned_anew_only_when_positions_differ(fetcher):
    fetcher._consumer.chunks = [[Message(0, 5)]]
    fetcher.fetch(1.0)
    fetcher.assign({P0: 6, P1: 7}, {})  # where it is: the client's buffer is kept
    fetcher.assign({P0: 5, P1: 7}, {})
    assert fetcher._consumer.assigned == [[(*P0, 5), (*P1, 7)], [(*P0, 5), (*P1, 7)]]


def test_the_client_is_told_which_leader_the_record_before_came_from(fetcher):
    # So that it notices when a new leader's log was cut before it, and has grown since.
    fetcher._consumer.chunks = [[Message(0, 5, epoch=3), Message(0, 6, epoch=4)], [Message(1, 7)]]
    found = fetcher.fetch(1.0)
    assert {p: of.leader_epoch for p, of in found.items()} == {P0: 4, P1: None}
    fetcher.assign({P0: 5, P1: 7}, {P0: 4, P1: None})
    assert fetcher._consumer.epochs == [4, None]


@pytest.mark.parametrize("code", [KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION])
def test_an_offset_that_is_gone_stops_it(code, fetcher):
    fetcher._consumer.chunks = [[Message(0, 5, error=code)]]
    with pytest.raises(SourceError) as raised:
        fetcher.fetch(1.0)
    assert str(raised.value) == (
        "offset 5 of views, partition 0, is not there; the broker has 40 to 90. Retention "
        "removed records before they were read, the topic was made anew, or a new leader lacks "
        "records (an unclean election). To go on without them, start a new job, not from a "
        "savepoint, and choose where by --kafka_start"
    )


def test_an_offset_that_is_gone_is_told_though_the_broker_is_too(fetcher):
    fetcher._admin.reachable = False
    fetcher._consumer.chunks = [[Message(0, 5, error=KafkaError._AUTO_OFFSET_RESET)]]
    with pytest.raises(SourceError, match="the broker doesn't say what it has"):
        fetcher.fetch(1.0)


@pytest.mark.parametrize(
    "code", [KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError._AUTHENTICATION]
)
def test_being_refused_stops_it(code, fetcher):
    fetcher._consumer.chunks = [[Message(0, 5, error=code)]]
    with pytest.raises(KafkaException):
        fetcher.fetch(1.0)


def test_what_may_pass_is_waited_for(fetcher, caplog):
    fetcher._consumer.chunks = [[Message(0, 5, error=KafkaError._TRANSPORT)], [Message(0, 5)]]
    assert fetcher.fetch(1.0)[P0].next == 6
    assert "views, partition 0" in caplog.text


def test_ends_are_unknown_without_an_answer(fetcher, caplog):
    assert fetcher.ends([P0, P1]) == {P0: 90, P1: 90}
    fetcher._admin.reachable = False
    assert fetcher.ends([P0, P1]) == {P0: None, P1: None}
    assert "no end offsets" in caplog.text
    with pytest.raises(KafkaException):
        fetcher.list_offsets([P0], OffsetSpec.earliest())


def test_the_newest_record_is_the_newest_of_those_that_are_known(fetcher):
    assert fetcher.newest_us([P0, P1]) == 7_000_000
    assert fetcher.newest_us([P1]) is None
    assert fetcher.newest_us([]) is None
    fetcher._admin.newest_ms = {0: None, 1: 8000}  # a partition without a leader
    assert fetcher.newest_us([P0, P1]) == 8_000_000
    fetcher._admin.reachable = False
    assert fetcher.newest_us([P0, P1]) is None


def test_nothing_depends_on_a_commit(fetcher, caplog):
    fetcher.commit({P0: 5})
    assert "are not committed" in caplog.text


def test_no_offset_is_ever_chosen_by_the_client(fetcher):
    settings = fetcher._consumer.settings
    assert settings["auto.offset.reset"] == "error"
    assert settings["enable.auto.commit"] is False
    fetcher.close()
    assert fetcher._consumer.closed
