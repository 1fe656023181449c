"""The public transforms on orders: a schema that shares no column with activity."""

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.io.generated import ReadGenerated
from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.model.batches import Rows, one_of
from beam_pipelines.model.records import EVENT_TIME, PAYLOADS, TIMESTAMP
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.model.windows import WindowPolicy
from beam_pipelines.testing import rows_in_seconds
from beam_pipelines.transforms.aggregate import CountDistinctPerWindow, CountPerWindow
from beam_pipelines.transforms.batching import Unbatch
from beam_pipelines.transforms.dedupe import Deduplicate
from beam_pipelines.transforms.lateness import ClassifyLateness, Timed
from beam_pipelines.transforms.parse import COORDINATES, Parse, Parsed
from beam_pipelines.transforms.rows import FilterRows
from beam_pipelines.transforms.sessions import Sessionize

ORDERS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("order", pa.int64(), nullable=False),
        pa.field("shop", pa.string(), nullable=False),
        pa.field("customer", pa.string(), nullable=False),
        one_of("step", ("opened", "filled", "paid")),
        one_of("channel", ("web", "till"), nullable=True),
        pa.field("amount", pa.float64()),
        pa.field("gift", pa.bool_()),
    ]
)
DECODER = NdjsonDecoder(
    ORDERS,
    fields={"event_time": "at", "order": "no", "step": "status"},
    values={"step": {"cart": "opened", "basket": "filled"}, "channel": {"www": "web"}},
)
HOUR_S = 3_600


def order(at_s: float, no: int, shop: str, customer: str, status: str, **more: Any) -> bytes:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s)
    fields = {"at": at.isoformat(), "no": no, "shop": shop, "customer": customer, "status": status}
    return json.dumps(fields | more).encode()


# (append time in seconds, record): an hour on the till, in order of arrival.
RECORDS = [
    (100, order(99, 1, "north", "ann", "cart", channel="www")),
    (101, order(100, 1, "north", "ann", "basket", amount=12, gift=True)),
    (102, order(100, 1, "north", "ann", "basket", amount=12, gift=True)),  # sent again
    (103, order(102.5, 1, "north", "ann", "paid", amount=12.5)),
    (110, order(105, 2, "south", "bob", "cart", channel="till")),
    (120, b'{"at":"1970-01-01T00:01:59Z","no":true,"shop":"south"}'),
    (130, order(129, 3, "north", "cem", "returned")),
    (140, order(139, 3, "north", "cem", "cart", channel="fax")),
    (400, order(250, 2, "south", "bob", "basket", amount=3)),  # 30 s late
    (500, order(200, 4, "south", "dee", "paid")),  # 180 s late: too late
    (510, order(900, 4, "south", "dee", "paid")),  # 390 s ahead
    (3_601, order(3_600, 5, "north", "ann", "cart", gift=None)),
    (3_700, order(3_700, 5, "north", "ann", "cart")),
]


def payloads(chunk: int) -> pa.RecordBatch:
    """Return the records of a chunk; each has 5."""
    chosen = RECORDS[chunk * 5 : chunk * 5 + 5]
    return pa.RecordBatch.from_pydict(
        {
            "payload": [payload for _, payload in chosen],
            "offset": range(chunk * 5, chunk * 5 + len(chosen)),
            "append_time": [appended_s * 1_000_000 for appended_s, _ in chosen],
        },
        schema=PAYLOADS,
    )


@pytest.fixture
def pipeline() -> Iterable[beam.Pipeline]:
    with beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([])) as built:
        yield built


def parsed(pipeline: beam.Pipeline, identify_by: str = "customer") -> Parsed:
    read = ReadGenerated(payloads, len(RECORDS), chunk_records=5, topic="orders")
    return pipeline | read | Parse(DECODER, identify_by)


def timed(pipeline: beam.Pipeline) -> Timed:
    return parsed(pipeline).rows | ClassifyLateness(TimeRule())


def orders(pipeline: beam.Pipeline) -> beam.PCollection:
    return timed(pipeline).usable | Deduplicate("identity", shards=2)


def assert_rows(batches: beam.PCollection, expected: list[tuple[Any, ...]]) -> None:
    assert_that(batches | "In seconds" >> beam.FlatMap(rows_in_seconds), equal_to(expected))


def picked(*names: str) -> Callable[[Rows], list[tuple[Any, ...]]]:
    return lambda batch: rows_in_seconds(batch.select(list(names)))


def test_rows_have_the_columns_of_the_schema(pipeline):
    rows = parsed(pipeline).rows | beam.Values()
    chosen = picked(EVENT_TIME, "order", "step", "channel", "amount", "gift", "offset")
    assert_that(
        rows | beam.FlatMap(chosen),
        equal_to(
            [
                (99.0, 1, "opened", "web", None, None, 0),
                (100.0, 1, "filled", None, 12.0, True, 1),
                (100.0, 1, "filled", None, 12.0, True, 2),
                (102.5, 1, "paid", None, 12.5, None, 3),
                (105.0, 2, "opened", "till", None, None, 4),
                (250.0, 2, "filled", None, 3.0, None, 8),
                (200.0, 4, "paid", None, None, None, 9),
                (900.0, 4, "paid", None, None, None, 10),
                (3600.0, 5, "opened", None, None, None, 11),
                (3700.0, 5, "opened", None, None, None, 12),
            ]
        ),
    )


def test_what_does_not_fit_the_schema_is_a_dead_letter(pipeline):
    letters = parsed(pipeline).dead_letters
    assert_that(
        letters | beam.FlatMap(picked("topic", "offset", "reason", "payload")),
        equal_to(
            [
                ("orders", 5, "wrong_type", RECORDS[5][1]),
                ("orders", 6, "unknown_value", RECORDS[6][1]),
                ("orders", 7, "unknown_value", RECORDS[7][1]),
            ]
        ),
    )


def test_the_time_rule_divides_them(pipeline):
    outputs = timed(pipeline)
    judged = (
        outputs.classified | beam.Values() | "Judged" >> beam.FlatMap(picked("offset", "verdict"))
    )
    usable = dict.fromkeys((0, 1, 2, 3, 4, 11, 12), "on_time") | {8: "late", 9: "too_late"}
    assert_that(judged, equal_to(list(usable.items())), label="judged")
    letters = (outputs.too_late, outputs.future) | beam.Flatten()
    assert_that(
        letters | "Letters" >> beam.FlatMap(picked("offset", "reason", "seconds_late")),
        equal_to([(9, "too_late", 180.0), (10, "future", -390.0)]),
        label="letters",
    )


def test_each_event_passes_once(pipeline):
    chosen = picked(EVENT_TIME, "customer", "step")
    assert_that(
        orders(pipeline) | beam.FlatMap(chosen),
        equal_to(
            [
                (99.0, "ann", "opened"),
                (100.0, "ann", "filled"),
                (102.5, "ann", "paid"),
                (105.0, "bob", "opened"),
                (250.0, "bob", "filled"),
                (3600.0, "ann", "opened"),
                (3700.0, "ann", "opened"),
            ]
        ),
    )


def test_every_record_is_an_event_by_its_coordinates(pipeline):
    usable = (parsed(pipeline, COORDINATES).rows | ClassifyLateness(TimeRule())).usable
    passed = usable | Deduplicate("identity") | beam.Map(len) | beam.CombineGlobally(sum)
    assert_that(passed, equal_to([8]))


def test_rows_are_counted_by_a_column(pipeline):
    window = WindowPolicy.fixed(HOUR_S)
    counts = orders(pipeline) | CountPerWindow("shop", window, into="orders", shards=2)
    assert_rows(
        counts,
        [
            (0.0, 3600.0, "north", 3),
            (0.0, 3600.0, "south", 2),
            (3600.0, 7200.0, "north", 2),
        ],
    )


def test_rows_of_one_kind_are_counted_by_a_column_of_numbers(pipeline):
    opened = orders(pipeline) | FilterRows("step", "opened")
    counts = opened | CountPerWindow("order", WindowPolicy.sliding(7_200, HOUR_S), shards=2)
    assert_rows(
        counts,
        [
            (-3600.0, 3600.0, 1, 1),
            (-3600.0, 3600.0, 2, 1),
            (0.0, 7200.0, 1, 1),
            (0.0, 7200.0, 2, 1),
            (0.0, 7200.0, 5, 2),
            (3600.0, 10800.0, 5, 2),
        ],
    )


def test_distinct_values_are_counted(pipeline):
    window = WindowPolicy.sliding(7_200, HOUR_S)
    customers = orders(pipeline) | CountDistinctPerWindow("customer", window, into="customers")
    assert_rows(customers, [(-3600.0, 3600.0, 2), (0.0, 7200.0, 2), (3600.0, 10800.0, 1)])


def test_visits_go_from_the_opened_to_the_paid_order(pipeline):
    visits = orders(pipeline) | Sessionize(
        "customer",
        gap_s=120,
        marker="step",
        start="opened",
        end="paid",
        counts={"fillings": "filled"},
        shards=2,
    )
    assert_rows(
        visits,
        [
            ("ann", 99.0, 102.5, 3.5, 1, "paid"),
            ("bob", 105.0, 105.0, 0.0, 0, "timeout"),
            ("bob", 250.0, 250.0, 0.0, 1, "timeout"),
            ("ann", 3600.0, 3600.0, 0.0, 0, "timeout"),
            ("ann", 3700.0, 3700.0, 0.0, 0, "timeout"),
        ],
    )


def test_rows_leave_as_dicts_with_their_own_times(pipeline):
    rows = orders(pipeline) | FilterRows("step", "paid") | Unbatch()
    stamped = rows | beam.Map(lambda row, at=beam.DoFn.TimestampParam: (row["order"], float(at)))
    assert_that(stamped, equal_to([(1, 102.5)]))
