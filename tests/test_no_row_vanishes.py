"""Rows of any lateness, through every public path: each comes out, or is set aside, or counted."""

from datetime import UTC, datetime, timedelta

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.coders import FastPrimitivesCoder
from apache_beam.testing import test_stream
from apache_beam.testing.util import BeamAssertException, assert_that, equal_to
from apache_beam.transforms.window import TimestampedValue

from beam_pipelines.model.batches import BatchOf, one_of
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.telemetry import tally
from beam_pipelines.testing import BatchStream, rows_in_seconds, stream_pipeline
from beam_pipelines.transforms import (
    AcceptAll,
    Batch,
    ClassifyLateness,
    CountDistinctPerWindow,
    CountPerWindow,
    Deduplicate,
    FilterRows,
    Sessionize,
    Unbatch,
    WindowPolicy,
)
from beam_pipelines.transforms.hold import Hold

ORDERS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("stored", TIMESTAMP, nullable=False),
        pa.field("id", pa.string(), nullable=False),
        one_of("kind", ("new", "old")),
    ]
)
RULE = TimeRule(out_of_orderness_s=200, allowed_lateness_s=400, future_tolerance_s=30)
BATCH = Batch(ORDERS, append_time="stored")
AT_MOST_S = 600  # behind the append time, which this stream's watermark follows
BEHIND_S = (0, 65, 200, 201, 430, 599, 600, 601, 5000, -30, -31)
STORED_S = (10_000, 12_000)


def at(second):
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=second)


def order(event_s, stored_s, name=None):
    return {
        EVENT_TIME: at(event_s), "stored": at(stored_s),
        "id": name or f"{event_s}@{stored_s}", "kind": "new",
    }  # fmt: skip


ROWS = [order(stored_s - behind_s, stored_s) for stored_s in STORED_S for behind_s in BEHIND_S]


class Stream:
    """Dicts, each stamped with its event time; the watermark is at the append time."""

    def __init__(self):
        self.stream = test_stream.TestStream(coder=FastPrimitivesCoder()).with_output_types(dict)

    def add(self, rows):
        self.stream.advance_watermark_to((rows[0]["stored"] - at(0)).total_seconds())
        for part in (rows[::2], rows[1::2]):
            self.stream.add_elements(
                [TimestampedValue(row, (row[EVENT_TIME] - at(0)).total_seconds()) for row in part]
            )
        self.stream.advance_processing_time(60)
        return self

    def end(self):
        return self.stream.advance_watermark_to(10**9).advance_watermark_to_infinity()


def orders(pipeline, label="orders"):
    stream = Stream()
    for stored_s in STORED_S:
        stream.add([row for row in ROWS if row["stored"] == at(stored_s)])
    return pipeline | label >> stream.end() | f"Batch {label}" >> BATCH


def ids(batches):
    return batches | beam.FlatMap(lambda batch: batch["id"].to_pylist())


def counted(batches, policy=None):
    return ids(batches | CountPerWindow("id", policy or WindowPolicy.fixed(60)))


def by_hand(batches):
    """Windows of somebody's own, over single elements."""
    return (
        batches
        | Unbatch()
        | beam.Map(lambda row: (row["id"], 1))
        | WindowPolicy.fixed(60).into(lateness_s=AT_MOST_S)
        | beam.CombinePerKey(sum)
        | beam.Keys()
    )


def row_by_row(batches):
    """What works on each row by itself hands the lateness on."""
    kept = batches | AcceptAll() | FilterRows("kind", "new", keep=(EVENT_TIME, "id"))
    mapped = kept | beam.Map(lambda batch: batch).with_output_types(kept.element_type)
    return mapped | beam.Reshuffle() | beam.Filter(len)


def flattened_with_less(batches):
    """Flatten with rows of another judge, who allows less."""
    empty = batches | beam.Filter(lambda _: False).with_output_types(BatchOf(BATCH.schema, 60))
    return (empty, batches) | beam.Flatten()


PATHS = {
    "fixed-windows": counted,
    "sliding-windows": lambda b: counted(b, WindowPolicy.sliding(120, 40)),
    "discarding-windows": lambda b: counted(b, WindowPolicy.fixed(60, accumulating=False)),
    "early-firings": lambda b: counted(b, WindowPolicy.fixed(60, early_s=10)),
    "sessions": lambda b: ids(b | Sessionize("id", gap_s=60)),
    "row-by-row": lambda b: counted(row_by_row(b)),
    "flattened": lambda b: counted(flattened_with_less(b) | Deduplicate("id")),
    "windows-by-hand": by_hand,
}


def all_of(expected):
    """Match what has just these values, however often."""

    def match(actual):
        if set(actual) != set(expected):
            raise BeamAssertException(f"{set(expected) ^ set(actual)} differ")

    return match


@pytest.mark.parametrize("path", PATHS)
def test_every_row_comes_out_or_is_set_aside(path):
    behind_s = {row["id"]: (row["stored"] - row[EVENT_TIME]).total_seconds() for row in ROWS}
    before = tally().get("older_than_folded", 0)
    with stream_pipeline() as pipeline:
        timed = orders(pipeline) | ClassifyLateness(RULE)
        for output, expected in (
            (PATHS[path](timed.usable), [i for i, s in behind_s.items() if -30 <= s <= AT_MOST_S]),
            (timed.too_late | "T" >> Ids(), [i for i, s in behind_s.items() if s > AT_MOST_S]),
            (timed.future | "F" >> Ids(), [i for i, s in behind_s.items() if s < -30]),
        ):
            assert_that(output, all_of(expected), label=str(len(expected)) + expected[0])
    assert tally().get("older_than_folded", 0) == before


class Ids(beam.PTransform):
    def expand(self, batches):
        return ids(batches)


def test_distinct_counts_count_every_row():
    with stream_pipeline() as pipeline:
        usable = (orders(pipeline) | ClassifyLateness(RULE)).usable
        counts = (
            usable
            | CountDistinctPerWindow("id", WindowPolicy.sliding(120, 60))
            | beam.FlatMap(rows_in_seconds)
            | beam.Map(lambda row: (row[0], row[2]))
        )
        expected = {}
        for row in ROWS:
            event_s = (row[EVENT_TIME] - at(0)).total_seconds()
            if -30 <= (row["stored"] - row[EVENT_TIME]).total_seconds() <= AT_MOST_S:
                for start in (event_s // 60 * 60, event_s // 60 * 60 - 60):
                    expected[start] = expected.get(start, 0) + 1

        def last_of_each(actual):
            last = {}
            for start, count in actual:
                last[start] = max(count, last.get(start, 0))
            assert last == expected

        assert_that(counts, last_of_each)


def test_a_late_copy_is_a_duplicate_as_long_as_it_could_count():
    first, copy = order(9_000, 9_000, "a"), order(9_000, 9_000 + AT_MOST_S, "a")
    before = tally().get("duplicate", 0)
    with stream_pipeline() as pipeline:
        stream = Stream().add([first]).add([copy]).end()
        batches = pipeline | stream | BATCH
        usable = (batches | ClassifyLateness(RULE)).usable
        assert_that(ids(usable | Deduplicate("id")), equal_to(["a"]))
    assert tally()["duplicate"] == before + 1


@pytest.mark.parametrize(
    "transform",
    [
        CountPerWindow("id"),
        CountDistinctPerWindow("id"),
        Deduplicate("id"),
        Sessionize("id"),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_unbounded_rows_that_nobody_judged_are_refused(transform):
    pipeline = beam.Pipeline()
    name = type(transform).__name__
    remedy = rf"{name} takes unbounded input only .* Batch\(…, append_time=COLUMN\), then"
    with pytest.raises(ValueError, match=remedy):
        orders(pipeline) | transform
    held = (orders(pipeline, "held") | ClassifyLateness(RULE)).usable | Hold("id", 10, 2)
    with pytest.raises(ValueError, match=remedy):
        held | "Held" >> transform
    judged, unjudged = BatchStream(ORDERS, 60), BatchStream(ORDERS, None)
    flat = (
        pipeline | "Judged" >> judged.end(),
        pipeline | "Not judged" >> unjudged.end(),
    ) | beam.Flatten()
    with pytest.raises(ValueError, match=remedy):
        flat | "Again" >> transform
