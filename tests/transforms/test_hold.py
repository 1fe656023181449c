"""Rows held back, and let go together."""

from datetime import UTC, datetime

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.kernels.columns import shards_of
from beam_pipelines.kernels.hashing import hash_strings
from beam_pipelines.kernels.key_groups import shard_labels
from beam_pipelines.model.batches import BatchCoder, batch_of_rows
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.testing import BatchStream, rows_in_seconds, stream_pipeline
from beam_pipelines.transforms import hold
from beam_pipelines.transforms.batching import Batch
from beam_pipelines.transforms.hold import Hold

SCHEMA = pa.schema([(EVENT_TIME, TIMESTAMP), ("user", pa.string())])
ALL_S = 4_000_000_000  # beyond this machine's clock


def row(time_s, user):
    return {EVENT_TIME: time_s, "user": user}


def assert_let_go(expected, *parts, shards=1):
    """Assert which rows come out together, when time passes after each part."""
    stream = BatchStream(SCHEMA)
    for number, batches in enumerate(parts):
        for batch in batches:
            stream.add(*batch)
        stream.processing_time(ALL_S + number)
    with stream_pipeline() as pipeline:
        out = pipeline | stream.end() | Hold("user", 10, shards)
        assert_that(out | beam.Map(lambda rows: sorted(rows_in_seconds(rows))), equal_to(expected))


def test_rows_of_many_bundles_go_on_together():
    assert_let_go(
        [[(1.0, "ann"), (2.0, "bob"), (2.0, "cyd"), (3.0, "ann")]],
        [[row(1, "ann"), row(2, "bob")], [row(3, "ann")], [row(2, "cyd")]],
    )


def test_what_went_on_does_not_come_again():
    assert_let_go([[(1.0, "ann")], [(2.0, "ann")]], [[row(1, "ann")]], [[row(2, "ann")]])


def test_rows_of_one_value_go_on_together_whatever_the_places():
    users = [f"user-{number}" for number in range(40)]
    hashes = hash_strings(pa.array(users))
    places = [
        [user for user, place in zip(users, shards_of(hashes, 4), strict=True) if place == number]
        for number in range(4)
    ]
    assert all(places)
    assert_let_go(
        [[(float(t), user) for t in range(5) for user in sorted(each)] for each in places],
        [[row(t, user) for user in users] for t in range(5)],
        shards=4,
    )


def test_a_place_that_holds_much_is_emptied_early(monkeypatch):
    """Each row is a batch of some hundred bytes: the third goes over the limit."""
    size = len(BatchCoder(SCHEMA).encode(batch_of_rows([], SCHEMA)))
    monkeypatch.setattr(hold, "HELD_BYTES", 2 * size + 2 * 1_000 + 200)
    users = ["u" * 1_000, "v" * 1_000, "w" * 1_000, "x", "y"]
    stream = BatchStream(SCHEMA)
    for number, user in enumerate(users):
        stream.add(row(number, user))
    with stream_pipeline() as pipeline:
        out = pipeline | stream.processing_time(ALL_S).end() | Hold("user", 10, 1)
        sizes = out | beam.Map(lambda rows: sorted(user[0] for _, user in rows_in_seconds(rows)))
        assert_that(sizes, equal_to([["u", "v", "w"], ["x", "y"]]))


class Timer:
    def set(self, due, dynamic_timer_tag):
        self.due_s = due.micros / 1e6


@pytest.mark.parametrize("now_s", [1_000_000.0, 1_000_003.7, 1_000_009.999])
def test_places_take_turns_and_nobody_waits_longer_than_asked(monkeypatch, now_s):
    monkeypatch.setattr(hold.time, "time", lambda: now_s)
    together = hold._TogetherFn(SCHEMA, 10, 4)
    rows = batch_of_rows([row(datetime.fromtimestamp(1, UTC), "ann")], SCHEMA)
    due_s = []
    for place in shard_labels(4):
        timer, bags = Timer(), [[] for _ in range(4)]
        assert list(together.process((place, rows), timer, *(Bag(each) for each in bags))) == []
        assert sum(map(len, bags)) == 1
        due_s.append(timer.due_s)
    assert all(now_s < due <= now_s + 10 for due in due_s)
    assert sorted(due % 10 for due in due_s) == [0, 2.5, 5, 7.5]


class Bag:
    def __init__(self, pages):
        self.add = pages.append


def test_bounded_input_passes_as_it_comes():
    batches = beam.Pipeline() | beam.Create([row(1, "ann")]) | Batch(SCHEMA)
    assert batches | Hold("user", 10, 1) is batches


@pytest.mark.parametrize(("every_s", "shards"), [(0, 1), (-1, 1), (10, 0)])
def test_what_is_not_positive_is_refused(every_s, shards):
    with pytest.raises(ValueError, match="must be positive"):
        Hold("user", every_s, shards)


def test_a_missing_column_is_refused():
    with pytest.raises(ValueError, match="no column 'page'"), stream_pipeline() as pipeline:
        pipeline | BatchStream(SCHEMA).end() | Hold("page", 1, 1)
