from types import SimpleNamespace

import apache_beam as beam
import pytest
from apache_beam.coders import StrUtf8Coder, TupleCoder
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.io.kafka import source
from beam_pipelines.io.kafka.fetch import SourceError
from beam_pipelines.io.kafka.positions import Positions
from beam_pipelines.io.kafka.reading import OpenReadings, Reading
from beam_pipelines.io.kafka.source import ReadKafka
from beam_pipelines.kernels.key_groups import MAX_PARALLELISM, key_group
from beam_pipelines.model.batches import BatchOf
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import spanned
from beam_pipelines.model.watermark import CLOCK_SKEW_US
from tests.io.kafka.broker import (
    CLUSTER,
    DISORDER,
    DISORDER_S,
    NOON,
    P0,
    P1,
    FakeFetcher,
    Reader,
    S,
    plain,
    records,
    span,
)


def views(**settings):
    return ReadKafka(CLUSTER, ("views",), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topics": ()}, "topics need names, got ()"),
        ({"topics": ("a", "")}, "topics need names, got ('a', '')"),
        ({"start": "first"}, "start is earliest, latest or a time in µs, not 'first'"),
        ({"append_time": "mine"}, "not 'mine'"),
        ({"append_time": "none"}, "none is for complete input"),
        ({"readers": 0}, "readers must be positive, got 0"),
    ],
)
def test_misuse_is_refused_when_it_is_made(settings, message):
    with pytest.raises(ValueError) as raised:
        ReadKafka(**{"cluster": CLUSTER, "topics": ("views",)} | settings)
    assert message in str(raised.value)


@pytest.mark.parametrize(("until_end", "bounded"), [(True, True), (False, False)])
def test_it_yields_payloads_with_their_spans(until_end, bounded):
    payloads = beam.Pipeline(FnApiRunner()) | views(until_end=until_end)
    assert payloads.element_type == spanned(BatchOf(PAYLOADS))
    assert payloads.is_bounded is bounded


# Up to the end


class Cluster:
    """Fetchers that find the given records, a slice of each partition at a time."""

    def __init__(self, broker, slices):
        self.broker, self.slices = broker, slices
        self.fetchers = []

    def reading(self, subscription, reader):
        fetcher = FakeFetcher(self.broker)
        self.fetchers.append(fetcher)
        slices = {p: iter(each) for p, each in self.slices.items()}

        def fetch(wait_s):
            found = {p: next(slices[p], None) for p in fetcher.assigned}
            return {p: each for p, each in found.items() if each is not None}

        fetcher.fetch = fetch
        return Reading(subscription, reader, lambda *_: fetcher, self.broker.worker_s)


@pytest.fixture
def cluster(broker, monkeypatch):
    cluster = Cluster(broker, {})
    monkeypatch.setattr(source, "Reading", cluster.reading)
    monkeypatch.setattr(source, "_OPEN", OpenReadings())
    return cluster


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_reading_to_the_end_yields_all_records_before_it(readers, cluster):
    cluster.broker.ends = {P0: 3, P1: 1}
    cluster.slices = {P0: [records(0, 1, 2), records(2, 3, 4)], P1: [records(0, 9)]}
    with beam.Pipeline(FnApiRunner()) as pipeline:
        found = pipeline | views(until_end=True, readers=readers)
        stamped = found | beam.Map(lambda e, at=beam.DoFn.TimestampParam: TimestampedValue(e, at))
        plainly = stamped | beam.ParDo(_PlainFn()).with_output_types(object)
        assert_that(
            plainly,
            equal_to(
                [
                    (span(0, 2), [0, 1], [1, 2]),
                    (span(2, 3, last=True)._replace(open=True), [2], [3]),
                    (span(0, 1, last=True, partition=1)._replace(open=True), [0], [9]),
                ]
            ),
        )
    assert len(cluster.fetchers) == readers
    assert all(fetcher.closed for fetcher in cluster.fetchers)


class _PlainFn(beam.DoFn):
    def process(self, element):
        yield plain([element])[0][:3]


def test_reading_to_the_end_of_an_empty_topic_ends(cluster):
    with beam.Pipeline(FnApiRunner()) as pipeline:
        assert_that(pipeline | views(until_end=True), equal_to([]))


def test_what_a_check_finds_stops_the_job_before_anything_is_read(cluster):
    def no_table():
        raise ValueError("the table is missing")

    pipeline = beam.Pipeline(FnApiRunner())
    pipeline | views(until_end=True, checks=(no_table,))
    with pytest.raises(Exception, match="the table is missing"):
        pipeline.run()
    assert cluster.fetchers == []


def test_latest_is_when_the_job_was_submitted_however_often_it_starts(cluster, monkeypatch):
    broker = cluster.broker
    monkeypatch.setattr(source, "time", SimpleNamespace(time_ns=lambda: NOON * 1000))
    broker.ends, broker.at_time = {P0: 3, P1: 1}, {P0: 2, P1: -1}  # -1: nothing since
    cluster.slices = {P0: [records(2, 4)], P1: []}
    pipeline = beam.Pipeline(FnApiRunner())
    found = pipeline | views(until_end=True, start="latest")
    offsets = found | beam.ParDo(_PlainFn()).with_output_types(object)
    assert_that(offsets, equal_to([(span(2, 3, last=True, range_start=2, open=True), [2], [4])]))
    for _ in range(2):
        pipeline.run().wait_until_finish()
        broker.go(60)
    assert [asked for asked in broker.asked if asked not in (-2, -1)] == [NOON // 1000] * 2


# Without end


def test_a_call_yields_a_slice_and_the_next_goes_on_with_the_same_consumer(cluster):
    cluster.broker.ends = {P0: 9, P1: 0}
    cluster.slices = {P0: [records(0, 1, 2), records(2, 5)]}
    cluster.slices[P1] = []
    reader = Reader()
    assert reader.call() == [(span(0, 2), [0, 1], [1, 2], 1 - DISORDER_S)]
    assert reader.positions.partitions[P0].next == 2
    assert reader.call() == [(span(2, 3), [2], [5], 5 - DISORDER_S)]
    assert reader.positions.partitions[P0].next == 3
    assert len(cluster.fetchers) == 1


def test_the_watermark_is_that_of_the_slowest_partition_and_never_falls(cluster):
    cluster.slices = {P0: [records(0, -30)], P1: []}
    cluster.broker.ends = {P0: 1, P1: 5}
    reader = Reader()
    reader.call()
    assert reader.watermark is None  # nothing is known of partition 1
    cluster.broker.ends = {P0: 1, P1: 0}
    cluster.broker.go(1)
    reader.call()
    followed = Timestamp(micros=NOON + 1 * S - CLOCK_SKEW_US - DISORDER)
    assert reader.watermark == followed
    cluster.broker.ends[P1] = 5  # a backlog: the watermark stands
    for _ in range(3):
        cluster.broker.go(10)
        reader.call()
    assert reader.watermark == followed


def test_a_new_partition_does_not_pull_the_watermark_back(cluster):
    cluster.slices = {P0: [], P1: [], ("views", 2): [records(0, -500)]}
    cluster.broker.ends = {P0: 0, P1: 0}
    reader = Reader()
    reader.call()
    before = reader.watermark
    cluster.broker.topics["views"] = ("id-1", 3, "LogAppendTime")
    cluster.broker.ends[("views", 2)] = 1
    cluster.broker.go(60)
    ((new, *_),) = reader.call()
    assert (new.partition, new.start, new.end) == (2, 0, 1)
    assert reader.watermark == before


def test_a_reader_that_failed_starts_afresh_with_another_consumer(cluster):
    cluster.slices = {P0: [records(0, 1, log_append_time=False)], P1: []}
    reader = Reader()
    with pytest.raises(SourceError, match="CreateTime"):
        reader.call()
    assert [fetcher.closed for fetcher in cluster.fetchers] == [True]
    assert reader.positions == Positions()
    cluster.slices = {P0: [records(0, 1)], P1: []}
    assert len(reader.call()) == 1
    assert len(cluster.fetchers) == 2


def test_a_copy_of_the_stage_takes_over_its_readings(cluster):
    cluster.slices = {P0: [records(0, 1), records(1, 2)], P1: []}
    reader = Reader()
    reader.call()
    taken_over = Reader()
    assert taken_over.fn.stage != reader.fn.stage
    taken_over.fn.stage, taken_over.positions = reader.fn.stage, reader.positions
    taken_over.call()
    assert len(cluster.fetchers) == 1


def test_a_drained_job_reads_no_further():
    provider = source._PositionsProvider(bounded=False)
    assert provider.truncate("0/1/0", Positions()) is None


# Where readers run


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 8, 32])
def test_each_reader_has_a_name_that_flink_puts_on_a_subtask_of_its_own(readers):
    names = source._labels(b"", readers)
    assert [name.rsplit("/", 1)[0] for name in names] == [f"{i}/{readers}" for i in range(readers)]
    keys = [NESTED.encode((name, "")) for name in names]
    assert [key_group(key) * readers // MAX_PARALLELISM for key in keys] == [*range(readers)]


NESTED = TupleCoder([StrUtf8Coder(), StrUtf8Coder()])
"""Encodes its first part as keys are: with its length."""
