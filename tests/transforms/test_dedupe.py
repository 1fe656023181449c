import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.model.batches import BatchOf, batch_of_rows
from beam_pipelines.model.hash_key import HashKey
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.testing import BatchStream, rows_in_seconds, stream_pipeline
from beam_pipelines.transforms.dedupe import BUCKET_S, Deduplicate, _ByIdentityFn
from tests.murmur import twin_of

ORDERS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("order", pa.string(), nullable=False),
        pa.field("copy", pa.int64(), nullable=False),
    ]
)


def order(time, name, copy=1):
    return {EVENT_TIME: time, "order": name, "copy": copy}


def assert_passed(stream, expected, transform=None):
    with stream_pipeline() as pipeline:
        rows = pipeline | stream.end() | (transform or Deduplicate("order"))
        assert_that(rows | beam.FlatMap(rows_in_seconds), equal_to(expected))


def test_the_first_of_a_batch_passes():
    stream = BatchStream(ORDERS).add(order(1, "a", 1), order(2, "b", 1), order(1, "a", 2))
    assert_passed(stream, [(1, "a", 1), (2, "b", 1)])


def test_duplicates_are_found_across_bundles():
    stream = (
        BatchStream(ORDERS)
        .add(order(1, "a", 1))
        .watermark(30)
        .add(order(1, "a", 2), order(40, "b", 1))
        .add(order(40, "b", 2))
    )
    assert_passed(stream, [(1, "a", 1), (40, "b", 1)])


def test_one_id_at_two_times_is_two_events():
    stream = BatchStream(ORDERS).add(order(1, "a"), order(1.000001, "a"))
    assert_passed(stream, [(1, "a", 1), (1.000001, "a", 1)])


def test_ids_are_kept_while_a_copy_could_still_count():
    last = BUCKET_S + 120 + SLACK_S - 1
    stream = BatchStream(ORDERS).add(order(1, "a", 1)).watermark(last).add(order(1, "a", 2))
    assert_passed(stream, [(1, "a", 1)])


def test_ids_are_forgotten_beyond_the_horizon():
    # Such a copy never comes: the time rule has made it a dead letter before.
    gone = BUCKET_S + 120 + SLACK_S + 1
    stream = BatchStream(ORDERS).add(order(1, "a", 1)).watermark(gone).add(order(1, "a", 2))
    assert_passed(stream, [(1, "a", 1), (1, "a", 2)])


def test_a_bucket_that_was_forgotten_can_be_kept_again():
    gone = BUCKET_S + 120 + SLACK_S + 1
    stream = (
        BatchStream(ORDERS)
        .add(order(1, "a", 1))
        .watermark(gone)
        .add(order(1, "b", 1), order(1, "b", 2))
    )
    assert_passed(stream, [(1, "a", 1), (1, "b", 1)])


def test_empty_batches_are_no_trouble():
    assert_passed(BatchStream(ORDERS).add().add(order(-1, "a")).add(), [(-1, "a", 1)])


def test_a_hash_column_is_taken_as_the_identity_whatever_the_time():
    schema = pa.schema([ORDERS.field(EVENT_TIME), pa.field("id", pa.uint64(), nullable=False)])
    stream = BatchStream(schema).add({EVENT_TIME: 1, "id": 0}, {EVENT_TIME: 2, "id": 0})
    assert_passed(stream, [(1, 0)], Deduplicate("id"))


@pytest.mark.parametrize(("kind", "known"), [(pa.string(), "a"), (pa.uint64(), 0)])
def test_rows_without_an_id_share_one_per_event_time(kind, known):
    schema = pa.schema([ORDERS.field(EVENT_TIME), pa.field("id", kind)])
    ids = [(1, None), (1, known), (1, None), (2, None), (2, None)]
    stream = BatchStream(schema).add(*({EVENT_TIME: time, "id": name} for time, name in ids))
    assert_passed(stream, [(1, None), (1, known), (2, None)], Deduplicate("id"))


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("batch_rows", [1, 7, 500])
def test_bounded_input_is_kept_until_its_end_however_it_is_divided(shards, batch_rows):
    year_s = 365 * 86_400
    rows = [order(i % 50 * year_s * 1_000_000, f"o{i % 50}", i) for i in range(200)]
    whole = batch_of_rows(rows, ORDERS)
    batches = [whole.slice(start, batch_rows) for start in range(0, 200, batch_rows)]
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        passed = (
            pipeline
            | beam.Create(batches, reshuffle=False).with_output_types(BatchOf(ORDERS))
            | Deduplicate("order", shards=shards)
        )
        assert_that(
            passed | beam.FlatMap(rows_in_seconds),
            equal_to([(i * year_s, f"o{i}", i) for i in range(50)]),
        )


def test_small_batches_of_a_bundle_meet_their_shard_as_one():
    batches = [batch_of_rows([order(1, f"o{i}", i)], ORDERS) for i in range(100)]
    keyed = _ByIdentityFn(ORDERS, "order", 4, False)
    keyed.setup()
    keyed.start_bundle()
    for i, batch in enumerate(batches):
        assert list(keyed.process(batch, Timestamp(i + 5))) == []
    elements = list(keyed.finish_bundle())
    assert len(elements) == 4
    assert {element.timestamp for element in elements} == {Timestamp(5)}
    assert sorted(n for e in elements for n in e.value[1]["order"].to_pylist()) == sorted(
        f"o{i}" for i in range(100)
    )


def test_with_a_key_rows_made_to_share_an_identity_both_pass(monkeypatch):
    stranger = twin_of("o-1")
    monkeypatch.setenv("HASH_KEY", "k" * 16)
    rows = [order(1, stranger), order(1, "o-1", 1), order(1, "o-1", 2), order(2, "o-1")]
    assert_passed(BatchStream(ORDERS).add(*rows), [(1, stranger, 1), (2, "o-1", 1)])
    assert_passed(
        BatchStream(ORDERS).add(*rows[:2]).watermark(30).add(*rows[2:]),
        [(1, stranger, 1), (1, "o-1", 1), (2, "o-1", 1)],
        Deduplicate("order", hash_key=HashKey.look_up("env:HASH_KEY")),
    )


def test_a_key_for_hashes_that_are_made_elsewhere_is_refused(monkeypatch):
    monkeypatch.setenv("HASH_KEY", "k" * 16)
    schema = pa.schema([ORDERS.field(EVENT_TIME), pa.field("identity", pa.uint64())])
    batches = beam.Pipeline() | beam.Create([]).with_output_types(BatchOf(schema))
    with pytest.raises(ValueError, match="identity holds hashes: give the hash_key to what makes"):
        batches | Deduplicate("identity", hash_key=HashKey.look_up("env:HASH_KEY"))


def test_a_missing_column_is_refused():
    batches = beam.Pipeline() | beam.Create([]).with_output_types(BatchOf(ORDERS))
    with pytest.raises(ValueError, match="no column 'event_id'"):
        batches | Deduplicate("event_id")
