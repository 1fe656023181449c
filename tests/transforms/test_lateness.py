"""The time rule over plain batches; tests/transforms/test_parse.py has it over a source's."""

from datetime import UTC, datetime, timedelta

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.model.batches import hint_of
from beam_pipelines.model.records import (
    EVENT_TIME,
    TIMESTAMP,
    VERDICT,
    append_time_of,
    with_append_time,
)
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.telemetry import tally
from beam_pipelines.testing import BatchStream
from beam_pipelines.transforms import Batch, ClassifyLateness, FilterRows

VISITS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("stored", TIMESTAMP),
        pa.field("page", pa.string(), nullable=False),
    ]
)
RULE = TimeRule(out_of_orderness_s=120, allowed_lateness_s=60, future_tolerance_s=300)


def at(second):
    return None if second is None else datetime(2026, 1, 5, tzinfo=UTC) + timedelta(seconds=second)


def visit(event_s, stored_s, page):
    return {EVENT_TIME: at(event_s), "stored": at(stored_s), "page": page}


def pages(batches, label):
    return batches | label >> beam.FlatMap(lambda batch: batch["page"].to_pylist())


def test_each_row_goes_its_way_with_its_schema():
    visits = [
        visit(880, 1000, "edge"),
        visit(879, 1000, "late"),
        visit(819, 1000, "gone"),
        visit(1301, 1000, "early"),
        visit(0, None, "complete"),  # nobody knows when it was stored
    ]
    before = tally()
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        batches = pipeline | beam.Create(visits) | Batch(VISITS, append_time="stored")
        timed = batches | FilterRows("page", "none") | "None" >> ClassifyLateness(RULE)
        assert_that(pages(timed.usable, "nothing"), equal_to([]), label="of nothing")
        timed = batches | ClassifyLateness(RULE)
        for output, expected in (
            ("usable", ["edge", "late", "complete"]),
            ("too_late", ["gone"]),
            ("future", ["early"]),
        ):
            rows = getattr(timed, output)
            assert hint_of(rows).schema.equals(hint_of(batches).schema, check_metadata=True)
            assert_that(pages(rows, output), equal_to(expected), label=output)
        verdicts = timed.classified | beam.FlatMap(
            lambda batch: zip(batch["page"].to_pylist(), batch["verdict"].to_pylist(), strict=True)
        )
        expected = {
            "edge": "on_time", "late": "late", "gone": "too_late", "complete": "on_time"
        }  # fmt: skip
        assert_that(verdicts, equal_to(list(expected.items())), label="classified")
    counts = {"on_time": 2, "late": 1, "too_late": 1, "future": 1}
    assert {name: tally()[name] - before.get(name, 0) for name in counts} == counts


def test_bounded_rows_need_not_say_when_they_were_stored():
    as_of = TimeRule(future_tolerance_s=0, as_of_us=int(at(10).timestamp() * 1e6))
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        visits = [visit(-(10**9), None, "old"), visit(10, None, "now"), visit(11, None, "early")]
        timed = pipeline | beam.Create(visits) | Batch(VISITS) | ClassifyLateness(as_of)
        assert_that(pages(timed.usable, "usable"), equal_to(["old", "now"]), label="usable")
        assert_that(pages(timed.future, "future"), equal_to(["early"]), label="future")
        assert_that(pages(timed.too_late, "too late"), equal_to([]), label="too late")


def test_only_the_usable_rows_are_known_not_to_be_too_late():
    schema = with_append_time(VISITS.set(1, VISITS.field(1).with_nullable(False)), "stored")
    timed = beam.Pipeline() | BatchStream(schema, None).end() | ClassifyLateness(RULE)
    # The watermark of somebody else's source may be at the append time.
    assert hint_of(timed.usable).lateness_s == 120 + 60
    for output in (timed.classified, timed.too_late, timed.future):
        assert hint_of(output).lateness_s is None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (VISITS, r"name the column with Batch\(…, append_time=COLUMN\)"),
        (with_append_time(VISITS, "stored"), "'stored' of unbounded input may be null"),
        (VISITS.append(VERDICT), "have a column 'verdict', which is the output's"),
        (VISITS.remove(0), "no column 'event_time'"),
        (VISITS.set(0, pa.field(EVENT_TIME, pa.timestamp("ms"))), "must be .*us.*, it is .*ms"),
    ],
)
def test_batches_that_can_not_be_judged_are_refused(schema, message):
    stream = BatchStream(schema, None).end()
    with pytest.raises(ValueError, match=message):
        beam.Pipeline() | stream | ClassifyLateness(RULE)


def test_what_are_neither_batches_nor_pairs_is_refused():
    elements = beam.Pipeline() | beam.Create([1])
    with pytest.raises(TypeError, match="expected a PCollection of batches, got"):
        elements | ClassifyLateness(RULE)
    pairs = elements | beam.Map(lambda _: (1, 2)).with_output_types(tuple[int, int])
    with pytest.raises(TypeError, match=r"expected \(Span, batch\) pairs"):
        pairs | "Pairs" >> ClassifyLateness(RULE)


def test_the_append_time_is_marked_in_the_schema():
    marked = with_append_time(VISITS, "stored")
    assert append_time_of(marked) == "stored"
    assert append_time_of(VISITS) is None
    assert marked.equals(VISITS)  # for all but ClassifyLateness
    with pytest.raises(ValueError, match=r"page must be timestamp.*, it is string"):
        with_append_time(VISITS, "page")
    with pytest.raises(ValueError, match="no column 'nobody'"):
        Batch(VISITS, append_time="nobody")
