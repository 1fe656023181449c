from datetime import UTC, datetime

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows, TimestampedValue

from beam_pipelines.model.batches import BatchOf, one_of
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.transforms.batching import Batch, Unbatch
from beam_pipelines.transforms.rows import FilterRows

SCHEMA = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("user", pa.string(), nullable=False),
        one_of("kind", ("view", "buy"), nullable=True),
    ]
)


def at(second):
    return datetime.fromtimestamp(second, UTC)


def run(build):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        build(pipeline)


def test_rows_survive_batching_and_get_their_event_time_back():
    rows = [{EVENT_TIME: at(i), "user": f"u{i}", "kind": "buy", "more": 1} for i in range(25)]

    def build(pipeline):
        batches = pipeline | beam.Create(rows, reshuffle=False) | Batch(SCHEMA, max_rows=10)
        assert batches.element_type == BatchOf(SCHEMA)
        sizes = batches | "Sizes" >> beam.Map(len)
        assert_that(sizes, equal_to([10, 10, 5]), label="sizes")
        windowed = batches | Unbatch() | beam.WindowInto(FixedWindows(10))
        counted = windowed | beam.Map(
            lambda row, window=beam.DoFn.WindowParam: (int(window.start), row["user"])
        )
        assert_that(counted, equal_to([(i // 10 * 10, f"u{i}") for i in range(25)]), label="rows")

    run(build)


def test_beam_rows_take_their_time_from_the_element_where_they_have_none():
    def build(pipeline):
        rows = (
            pipeline
            | beam.Create([beam.Row(user="a", kind=None), beam.Row(user="b", kind="view")])
            | beam.Map(lambda row: TimestampedValue(row, 7))
            | Batch(SCHEMA)
            | Unbatch()
            | beam.Map(lambda row: (row[EVENT_TIME].timestamp(), row["user"], row["kind"]))
        )
        assert_that(rows, equal_to([(7.0, "a", None), (7.0, "b", "view")]))

    run(build)


@pytest.mark.parametrize("make", [dict, beam.Row])
@pytest.mark.parametrize(
    ("time", "unit"),
    [(at(7), None), ("1970-01-01T01:00:07+01:00", None), (7, "s")],
)
def test_times_may_be_datetimes_text_or_integers_of_a_named_unit(make, time, unit):
    def build(pipeline):
        rows = pipeline | beam.Create([make(event_time=time, user="a", kind="buy")])
        times = rows | Batch(SCHEMA, time_unit=unit) | Unbatch() | beam.Map(lambda r: r[EVENT_TIME])
        assert_that(times, equal_to([at(7)]))

    run(build)


@pytest.mark.parametrize("make", [dict, beam.Row])
def test_epoch_seconds_are_not_taken_for_milliseconds(make):
    row = make(event_time=1_700_000_000, user="a", kind="buy")
    with pytest.raises(ValueError, match="these are s: time_unit='s'"):
        run(lambda pipeline: pipeline | beam.Create([row]) | Batch(SCHEMA, time_unit="ms"))


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        (SCHEMA, {"max_rows": 0}, "max_rows must be positive"),
        (SCHEMA, {"time_unit": "minutes"}, "one of s, ms, us, ns, not 'minutes'"),
        (SCHEMA, {"append_time": "stored"}, "no column 'stored'"),
        (SCHEMA, {"append_time": "user"}, "user must be .*, it is string"),
        (pa.schema([(EVENT_TIME, pa.timestamp("ms"))]), {}, r"it is timestamp\[ms\]"),
    ],
)
def test_misuse_is_refused_when_the_pipeline_is_built(schema, options, message):
    with pytest.raises(ValueError, match=message):
        Batch(schema, **options)


def test_windows_are_kept_apart():
    def build(pipeline):
        batches = (
            pipeline
            | beam.Create([1, 2, 61])
            | beam.Map(lambda t: TimestampedValue({"user": str(t)}, t))
            | beam.WindowInto(FixedWindows(60))
            | Batch(SCHEMA)
        )
        users = batches | beam.Map(
            lambda batch, stamp=beam.DoFn.TimestampParam: (
                int(stamp),
                sorted(batch["user"].to_pylist()),
            )
        )
        assert_that(users, equal_to([(1, ["1", "2"]), (61, ["61"])]))

    run(build)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({EVENT_TIME: at(1)}, "a row has no 'user'"),
        ({EVENT_TIME: at(1), "user": 5}, "user does not fit string"),
        (
            {EVENT_TIME: at(1), "user": "a", "kind": "steal"},
            "kind is 'steal', not one of view, buy",
        ),
        ({"user": "a"}, "neither event_time nor a timestamp"),
        ({EVENT_TIME: 1_700_000_000, "user": "a"}, "event_time is the integer 1700000000, of no"),
        ({EVENT_TIME: 1.5, "user": "a"}, "event_time is 1.5 of type float"),
    ],
)
def test_a_row_that_does_not_fit_stops_the_job_with_its_reason(row, message):
    with pytest.raises(ValueError, match=message):
        run(lambda pipeline: pipeline | beam.Create([row]) | Batch(SCHEMA))


def test_rows_are_chosen_by_value():
    rows = [{EVENT_TIME: at(i), "user": f"u{i}", "kind": ("view", "buy")[i % 2]} for i in range(4)]

    def build(pipeline):
        batches = pipeline | beam.Create(rows, reshuffle=False) | Batch(SCHEMA)
        bought = batches | FilterRows("kind", "buy") | beam.FlatMap(lambda b: b["user"].to_pylist())
        by_user = batches | "One" >> FilterRows("user", "u2") | "N" >> beam.Map(len)
        nobody = batches | "None" >> FilterRows("user", "u9") | "M" >> beam.Map(len)
        assert_that(bought, equal_to(["u1", "u3"]), label="bought")
        assert_that(by_user, equal_to([1]), label="by user")
        assert_that(nobody, equal_to([]), label="nobody")
        with pytest.raises(ValueError, match="never 'steal'"):
            batches | "Bad" >> FilterRows("kind", "steal")

    run(build)
