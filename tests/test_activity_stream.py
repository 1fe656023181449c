"""The whole graph as a stream: what arrives late, twice, too late or broken, and when it shows."""

import json

import apache_beam as beam
from apache_beam.coders import TupleCoder
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import TimestampedValue

from beam_pipelines.activity import Activity, build
from beam_pipelines.connectors import Sinks
from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.model.activity import ACTIVITY
from beam_pipelines.model.batches import BatchCoder, BatchOf, Rows, batch_of_rows
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import Span, SpanCoder, spanned
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.testing import RowsWithPanesFn, rows_in_seconds, stream_pipeline

S = 1_000_000
RULE = TimeRule(out_of_orderness_s=10, allowed_lateness_s=60, future_tolerance_s=30)


def event(second, user="ann", page="/", kind="page_view", **more):
    record = {
        "event_time": second * 1000, "user_id": user, "page_url": page, "event_type": kind, **more
    }  # fmt: skip
    return json.dumps(record).encode()


class Topic:
    """A topic whose records are appended at the time of the clock, in seconds."""

    def __init__(self):
        coder = TupleCoder([SpanCoder(), BatchCoder(PAYLOADS)])
        self.stream = test_stream.TestStream(coder=coder).with_output_types(
            spanned(BatchOf(PAYLOADS))
        )
        self.offset = 0
        self.now_s = 0

    def at(self, append_s, *payloads):
        self.stream.advance_processing_time(append_s - self.now_s)
        self.now_s = append_s
        start, self.offset = self.offset, self.offset + len(payloads)
        rows = [
            {"payload": payload, "offset": start + i, "append_time": append_s * S}
            for i, payload in enumerate(payloads)
        ]
        span = Span("topic", 0, 0, 1000, start, self.offset, False)
        lower_bound_s = append_s - RULE.out_of_orderness_s
        pair = TimestampedValue((span, batch_of_rows(rows, PAYLOADS)), lower_bound_s)
        self.stream.add_elements([pair])
        self.stream.advance_watermark_to(lower_bound_s)
        return self

    def end(self):
        self.stream.advance_processing_time(60)
        return self.stream.advance_watermark_to(100_000).advance_watermark_to_infinity()


class Collect(beam.PTransform):
    """A sink that checks what it is given."""

    def __init__(self, name, expected, rows=None, matching=equal_to):
        super().__init__()
        self.name, self.expected = name, matching(expected)
        self.rows = rows or beam.ParDo(RowsWithPanesFn())

    def expand(self, batches):
        assert_that(batches | "Rows" >> self.rows, self.expected, label=self.name)


class _FirmRows(beam.PTransform):
    """Rows with their panes, without the early ones, whose number is up to the runner."""

    def expand(self, batches):
        panes = batches | beam.ParDo(RowsWithPanesFn())
        return panes | beam.Filter(lambda pane: pane[0] != "EARLY")


def once_or_more(expected):
    """Match rows of firings whose number is up to the runner."""

    def match(actual):
        assert {row for _, row in actual} == set(expected)

    return match


def letter(batch: Rows):
    return [(r["offset"], r["stage"], r["reason"]) for r in batch.to_pylist()]


def classified(pair):
    offsets, verdicts = (pair[1][name].to_pylist() for name in ("offset", "verdict"))
    return list(zip(offsets, verdicts, strict=True))


def check(topic, tables, lake, enriched, dead_letters, rule=RULE, matching=equal_to):
    sinks = Sinks(
        write_lake=Collect("lake", lake, beam.FlatMap(classified)),
        write_enriched=Collect(
            "enriched",
            enriched,
            beam.FlatMap(lambda batch: [row[:3] for row in rows_in_seconds(batch)]),
        ),
        write_dead_letters=Collect("dead letters", dead_letters, beam.FlatMap(letter)),
        write_table=lambda table: Collect(table.name, tables[table.name], _FirmRows(), matching),
    )
    activity = Activity(
        NdjsonDecoder(ACTIVITY, {}, {}),
        rule,
        users_window_s=120,
        session_gap_s=100,
        key_shards=2,
        window_shards=2,
    )
    with stream_pipeline() as pipeline:
        build(pipeline, topic.end(), activity, sinks)


def test_a_stream_with_every_kind_of_trouble():
    topic = (
        Topic()
        .at(10, event(1, "ann", event_id="a"), b"garbage", event(500, event_id="early"))
        .at(20, event(1, "ann", event_id="a"), event(15, "bob", "/pricing"))  # a is sent again
        .at(75, event(70, "bob", kind="click"))  # closes [0, 60)
        .at(80, event(30, "cy", event_id="c"))  # 40 s behind the watermark
        .at(85, event(30, "cy", event_id="c"))
        .at(100, event(3, "dan"))  # 87 s behind
        .at(200, event(200, "ann", kind="session_end"))  # ann's session has timed out
    )
    check(
        topic,
        tables={
            "page_view_counts": [
                ("ON_TIME", (0, 60, "/", 1)),
                ("ON_TIME", (0, 60, "/pricing", 1)),
                ("LATE", (0, 60, "/", 2)),
            ],
            "active_users": [
                ("ON_TIME", (-60, 60, 2)),
                ("LATE", (-60, 60, 3)),
                ("ON_TIME", (0, 120, 3)),
                ("ON_TIME", (60, 180, 1)),
                ("ON_TIME", (120, 240, 1)),
                ("ON_TIME", (180, 300, 1)),
            ],
            "user_sessions": [
                ("UNKNOWN", ("ann", 1, 1, 0, 1, 0, "timeout")),
                ("UNKNOWN", ("bob", 15, 70, 55, 1, 1, "timeout")),
                ("UNKNOWN", ("cy", 30, 30, 0, 1, 0, "timeout")),
            ],
        },
        lake=[
            (0, "on_time"), (3, "late"), (4, "on_time"), (5, "on_time"),
            (6, "late"), (7, "late"), (8, "too_late"), (9, "on_time"),
        ],
        enriched=[
            (1, "ann", "/"), (15, "bob", "/pricing"), (70, "bob", "/"), (30, "cy", "/"),
            (200, "ann", "/"),
        ],
        dead_letters=[
            (1, "parse", "not_json"), (2, "lateness", "future"), (8, "lateness", "too_late"),
        ],
    )  # fmt: skip


def test_all_that_the_time_rule_lets_pass_counts_once_everywhere():
    topic = (
        Topic()
        .at(10, event(1, "ann", event_id="a"))
        .at(710, event(700, "bob", "/new", event_id="b"))
        .at(711, event(105, "cy", event_id="c"))  # 596 s behind the watermark
        .at(714, event(105, "cy", event_id="c"))
    )
    check(
        topic,
        tables={
            "page_view_counts": [
                (0, 60, "/", 1),
                (60, 120, "/", 1),
                (660, 720, "/new", 1),
            ],
            "active_users": [
                (-60, 60, 1),
                (0, 120, 1),
                (0, 120, 2),
                (60, 180, 1),
                (600, 720, 1),
                (660, 780, 1),
            ],
            "user_sessions": [
                ("ann", 1, 1, 0, 1, 0, "timeout"),
                ("bob", 700, 700, 0, 1, 0, "timeout"),
                ("cy", 105, 105, 0, 1, 0, "timeout"),
            ],
        },
        lake=[(0, "on_time"), (1, "on_time"), (2, "late"), (3, "late")],
        enriched=[(1, "ann", "/"), (700, "bob", "/new"), (105, "cy", "/")],
        dead_letters=[],
        rule=TimeRule(out_of_orderness_s=10, allowed_lateness_s=600),
        matching=once_or_more,
    )
