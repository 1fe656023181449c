"""Counts and distinct counts under a moved watermark: every pane is asserted."""

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.model.batches import (
    BatchOf,
    batch_of_rows,
    one_of,
    schema_of,
    shortened_field,
    shortened_to,
)
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.model.windows import WindowPolicy
from beam_pipelines.testing import BatchStream, RowsWithPanesFn, rows_in_seconds, stream_pipeline
from beam_pipelines.transforms.aggregate import CountDistinctPerWindow, CountPerWindow
from tests.io.contract import LONG, shortened_form
from tests.murmur import texts_of

VISITS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("page", pa.string(), nullable=False),
    ]
)


def visits(*times, page="/"):
    return [{EVENT_TIME: time, "page": page} for time in times]


def panes(stream, transform):
    """Check the panes of a stream; usage: panes(stream, transform) == expected."""

    class Expectation:
        def __eq__(self, expected):
            with stream_pipeline() as pipeline:
                rows = pipeline | stream.end() | transform
                assert_that(rows | beam.ParDo(RowsWithPanesFn()), equal_to(expected))
            return True

    return Expectation()


def test_a_window_fires_once_the_watermark_passes_its_end():
    stream = BatchStream(VISITS).add(*visits(10, 20, 70)).watermark(61)
    assert panes(stream, CountPerWindow("page")) == [
        ("ON_TIME", (0, 60, "/", 2)),
        ("ON_TIME", (60, 120, "/", 1)),
    ]


def test_a_late_view_fires_again_with_the_full_count():
    stream = BatchStream(VISITS).add(*visits(10, 20)).watermark(61).add(*visits(30))
    assert panes(stream, CountPerWindow("page")) == [
        ("ON_TIME", (0, 60, "/", 2)),
        ("LATE", (0, 60, "/", 3)),
    ]


def test_a_late_view_within_the_slack_is_still_not_dropped_by_the_runner():
    stream = BatchStream(VISITS).add(*visits(10)).watermark(60 + 120 + 59).add(*visits(30))
    assert panes(stream, CountPerWindow("page")) == [
        ("ON_TIME", (0, 60, "/", 1)),
        ("LATE", (0, 60, "/", 2)),
    ]


def test_a_view_older_than_the_slack_would_vanish_so_the_time_rule_must_come_before():
    stream = BatchStream(VISITS).add(*visits(10)).watermark(60 + 120 + 61).add(*visits(30))
    assert panes(stream, CountPerWindow("page")) == [("ON_TIME", (0, 60, "/", 1))]


def test_late_and_on_time_rows_of_one_batch_part_ways():
    stream = BatchStream(VISITS).add(*visits(10)).watermark(65).add(*visits(50, 66))
    assert panes(stream, CountPerWindow("page")) == [
        ("ON_TIME", (0, 60, "/", 1)),
        ("LATE", (0, 60, "/", 2)),
        ("ON_TIME", (60, 120, "/", 1)),
    ]


def test_early_firings_carry_the_count_so_far():
    policy = WindowPolicy.fixed(60, early_s=10)
    stream = (
        BatchStream(VISITS)
        .add(*visits(10))
        .processing_time(11)
        .add(*visits(20))
        .processing_time(11)
    )
    assert panes(stream, CountPerWindow("page", policy)) == [
        ("EARLY", (0, 60, "/", 1)),
        ("EARLY", (0, 60, "/", 2)),
        ("ON_TIME", (0, 60, "/", 2)),
    ]


def test_discarding_windows_carry_what_is_new():
    policy = WindowPolicy.fixed(60, accumulating=False)
    stream = BatchStream(VISITS).add(*visits(10, 20)).watermark(61).add(*visits(30))
    assert panes(stream, CountPerWindow("page", policy)) == [
        ("ON_TIME", (0, 60, "/", 2)),
        ("LATE", (0, 60, "/", 1)),
    ]


def test_a_row_counts_in_every_sliding_window_it_lies_in():
    stream = BatchStream(VISITS).add(*visits(65)).watermark(121).add(*visits(70))
    assert panes(stream, CountPerWindow("page", WindowPolicy.sliding(120, 60))) == [
        ("ON_TIME", (0, 120, "/", 1)),
        ("LATE", (0, 120, "/", 2)),
        ("ON_TIME", (60, 180, "/", 2)),
    ]


def test_a_late_row_passes_both_windowings_of_a_distinct_count():
    users = [*visits(10, page="a"), *visits(20, page="b")]
    stream = BatchStream(VISITS).add(*users).watermark(61).add(*visits(30, page="c"))
    assert panes(stream, CountDistinctPerWindow("page", WindowPolicy.sliding(120, 60))) == [
        ("ON_TIME", (-60, 60, 2)),
        ("LATE", (-60, 60, 3)),
        ("ON_TIME", (0, 120, 3)),
    ]


def test_no_distinct_count_is_greater_than_the_rows_of_its_window():
    made = texts_of(np.arange(4096, dtype=np.uint64) << np.uint64(52))  # all registers, full
    stream = (
        BatchStream(VISITS)
        .add(*(visit for page in made[:3000] for visit in visits(10, page=page)))
        .add(*(visit for page in made[3000:4000] for visit in visits(70, page=page)))
        .watermark(61)
        .add(*(visit for page in made[4000:] for visit in visits(50, page=page)))  # late
    )
    assert panes(stream, CountDistinctPerWindow("page", WindowPolicy.sliding(120, 60))) == [
        ("ON_TIME", (-60, 60, 3000)),
        ("LATE", (-60, 60, 3096)),
        ("ON_TIME", (0, 120, 4096)),
        ("ON_TIME", (60, 180, 1000)),
    ]


def test_a_distinct_count_fires_early_with_its_slices():
    policy = WindowPolicy.sliding(120, 60, early_s=10)
    stream = (
        BatchStream(VISITS)
        .add(*visits(70, page="a"))
        .processing_time(11)
        .add(*visits(80, page="b"), *visits(81, page="a"))
        .processing_time(11)
    )
    assert panes(stream, CountDistinctPerWindow("page", policy)) == [
        ("EARLY", (0, 120, 1)),
        ("EARLY", (60, 180, 1)),
        ("EARLY", (0, 120, 2)),
        ("EARLY", (60, 180, 2)),
        ("ON_TIME", (0, 120, 2)),
        ("ON_TIME", (60, 180, 2)),
    ]


def test_a_row_too_late_for_one_sliding_window_still_counts_in_the_next():
    policy = WindowPolicy.sliding(120, 60)
    stream = BatchStream(VISITS, lateness_s=0).add(*visits(10)).watermark(60 + 61).add(*visits(30))
    assert panes(stream, CountPerWindow("page", policy)) == [
        ("ON_TIME", (-60, 60, "/", 1)),
        ("ON_TIME", (0, 120, "/", 1)),
        ("LATE", (0, 120, "/", 2)),
    ]


def test_empty_batches_and_times_before_1970_are_no_trouble():
    stream = BatchStream(VISITS).add().add(*visits(5)).add()
    assert panes(stream, CountPerWindow("page")) == [("ON_TIME", (0, 60, "/", 1))]
    early = batch_of_rows([{EVENT_TIME: -1, "page": "/"}], VISITS)
    assert_that_equal([early], CountPerWindow("page"), [(-60, 0, "/", 1)])


@pytest.mark.parametrize("policy", [WindowPolicy.fixed(60), WindowPolicy.sliding(100, 40)])
@pytest.mark.parametrize("shards", [1, 4])
def test_shards_and_batches_change_nothing(policy, shards):
    rows = [{EVENT_TIME: (i * 37 % 500) * 1_000_000, "page": f"/{i * i % 7}"} for i in range(400)]
    whole = batch_of_rows(rows, VISITS)
    parts = [whole.slice(start, 23) for start in range(0, 400, 23)]
    expected = {}
    for row in rows:
        at = row[EVENT_TIME] // 1_000_000
        for start in range(-policy.size_s, 500, 1):
            if start % policy.period_s == 0 and start <= at < start + policy.size_s:
                key = (float(start), float(start + policy.size_s), row["page"])
                expected[key] = expected.get(key, 0) + 1
    counts = [(*key, count) for key, count in expected.items()]
    assert_that_equal(parts, CountPerWindow("page", policy, shards=shards), counts)


def assert_that_equal(batches, transform, expected):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        rows = (
            pipeline
            | beam.Create(batches, reshuffle=False).with_output_types(BatchOf(VISITS))
            | transform
            | beam.FlatMap(rows_in_seconds)
        )
        assert_that(rows, equal_to(expected))


def test_bounded_results_are_stamped_with_the_last_instant_of_their_window():
    batch = batch_of_rows([{EVENT_TIME: t * 1_000_000, "page": "/"} for t in (10, 70)], VISITS)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        counts = (
            pipeline
            | beam.Create([batch], reshuffle=False).with_output_types(BatchOf(VISITS))
            | CountPerWindow("page", WindowPolicy.sliding(120, 60))
        )
        stamps = counts | beam.Map(lambda _, stamp=beam.DoFn.TimestampParam: stamp.micros)
        assert_that(stamps, equal_to([59_999_999, 119_999_999, 179_999_999]))


def test_long_values_are_shortened_once_and_the_column_says_so():
    short = [shortened_form(text) for text in LONG]
    pages = pa.table([pa.array([10, 20, 30]), pa.array([*LONG, LONG[0]])], VISITS.names)
    stream = BatchStream(VISITS).add(*pages.to_pylist()).watermark(61)
    counted = [("ON_TIME", (0, 60, short[0], 2)), ("ON_TIME", (0, 60, short[1], 1))]
    assert panes(stream, CountPerWindow("page")) == counted

    field = shortened_field(VISITS.field("page"), 2_000)
    marked = VISITS.set(1, field)
    stream = BatchStream(marked).add(*visits(10, page=short[0]))
    assert panes(stream, CountPerWindow("page")) == [("ON_TIME", (0, 60, short[0], 1))]
    for schema in (VISITS, marked):
        rows = beam.Pipeline() | BatchStream(schema).end() | CountPerWindow("page")
        assert shortened_to(schema_of(rows).field("page")) == 2_000


def test_session_windows_are_refused():
    with pytest.raises(ValueError, match="CountPerWindow takes fixed or sliding windows"):
        CountPerWindow("page", WindowPolicy.session(30))


def test_batches_that_were_windowed_are_refused():
    batches = (
        beam.Pipeline()
        | beam.Create([]).with_output_types(BatchOf(VISITS))
        | WindowPolicy.fixed(60).into(lateness_s=120)
    )
    with pytest.raises(ValueError, match="CountPerWindow takes batches in the global window"):
        batches | CountPerWindow("page")


def test_discarding_distinct_counts_are_refused():
    with pytest.raises(ValueError, match="discarding windows can't be put together"):
        CountDistinctPerWindow("page", WindowPolicy.fixed(60, accumulating=False))


MAYBE = {
    "text": (pa.field("by", pa.string()), "a", "b"),
    "number": (pa.field("by", pa.int64()), 7, 8),
    "known": (one_of("by", ("x", "y"), nullable=True), "x", "y"),
}


@pytest.mark.parametrize("kind", MAYBE)
@pytest.mark.parametrize("shards", [1, 4])
def test_null_is_a_group_of_its_own(kind, shards):
    field, one, other = MAYBE[kind]
    schema = pa.schema([VISITS.field(EVENT_TIME), field])
    rows = [{EVENT_TIME: t, "by": by} for t, by in [(1, None), (2, one), (3, None), (4, other)]]
    stream = BatchStream(schema).add(*rows).watermark(61).add({EVENT_TIME: 5, "by": None})
    with stream_pipeline() as pipeline:
        counts = pipeline | stream.end() | CountPerWindow("by", shards=shards)
        assert schema_of(counts).field("by").nullable
        counts | beam.Map(lambda batch: batch.validate(full=True))
        last = counts | beam.FlatMap(rows_in_seconds)

        def greatest(actual):
            assert max(row for row in actual if row[2] is None) == (0, 60, None, 3)
            assert {row for row in actual if row[2] is not None} == {
                (0, 60, one, 1), (0, 60, other, 1),
            }  # fmt: skip

        assert_that(last, greatest)


def test_a_count_by_what_is_never_null_is_never_null():
    batches = beam.Pipeline() | beam.Create([]).with_output_types(BatchOf(VISITS))
    assert not schema_of(batches | CountPerWindow("page")).field("page").nullable


@pytest.mark.parametrize("kind", MAYBE)
def test_null_is_no_distinct_value(kind):
    field, one, other = MAYBE[kind]
    schema = pa.schema([VISITS.field(EVENT_TIME), field])
    rows = [{EVENT_TIME: t, "by": by} for t, by in [(1, None), (2, one), (3, one), (70, None)]]
    stream = BatchStream(schema).add(*rows).add({EVENT_TIME: 130, "by": None})
    stream.add({EVENT_TIME: 131, "by": other})
    assert panes(stream, CountDistinctPerWindow("by", WindowPolicy.fixed(60))) == [
        ("ON_TIME", (0, 60, 1)),
        ("ON_TIME", (120, 180, 1)),  # [60, 120) has nothing but null
    ]
