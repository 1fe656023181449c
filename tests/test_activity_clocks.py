"""The whole graph behind a topic whose clocks step: nothing is dropped in silence."""

import json

import apache_beam as beam
from apache_beam.coders import TupleCoder
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.activity import Activity, build
from beam_pipelines.connectors import Sinks
from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.model.activity import ACTIVITY
from beam_pipelines.model.batches import BatchCoder, BatchOf
from beam_pipelines.model.records import PAYLOADS
from beam_pipelines.model.span import SpanCoder, spanned
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.testing import RowsWithPanesFn, stream_pipeline
from tests.io.kafka.broker import DISORDER_S, NOON_S, P0
from tests.io.kafka.history import Topic, job_on

VIEWS = "page_view_counts"


class Collect(beam.PTransform):
    def __init__(self, name, expected, rows):
        super().__init__()
        self.name, self.expected, self.rows = name, expected, rows

    def expand(self, batches):
        assert_that(batches | self.rows, equal_to(self.expected), label=self.name)


def stored(pair):
    """Return (page, seconds after noon by which it was judged, verdict)."""
    _, batch = pair
    pages, times, verdicts = (
        batch[name].to_pylist() for name in ("page_url", "append_time", "verdict")
    )
    seconds = [time.timestamp() - NOON_S for time in times]
    return list(zip(pages, seconds, verdicts, strict=True))


def counted(pane_and_row):
    """Return what a table is left with, plainly; early rows come by the clock."""
    pane, (start_s, _, page, views) = pane_and_row
    return [] if pane == "EARLY" else [(pane, start_s - NOON_S, page, views)]


def letters(batch):
    return [(json.loads(r["payload"])["page_url"], r["reason"]) for r in batch.to_pylist()]


def test_a_view_stored_by_a_clock_that_stepped_back_counts_or_is_a_dead_letter():
    topic = Topic()
    topic.topics["views"] = ("id-1", 1, "LogAppendTime")
    coder = TupleCoder([SpanCoder(), BatchCoder(PAYLOADS)])
    stream = test_stream.TestStream(coder=coder).with_output_types(spanned(BatchOf(PAYLOADS)))
    with job_on(topic) as job:

        def read(*views):
            """Let views be stored, (seconds after noon, page), and the job read them."""
            for second, page in views:
                event = {
                    **{"event_time": (NOON_S + second) * 1000, "event_type": "page_view"},
                    **{"user_id": "ann", "page_url": page, "event_id": page},
                }
                topic.append(P0, json.dumps(event).encode())
            topic.go(1)
            before = job.reader.watermark
            stream.add_elements(job.reader.elements())
            if job.reader.watermark != before:
                stream.advance_watermark_to(job.reader.watermark)

        topic.go(1000)
        read((999, "/before"))
        topic.ahead_s[P0] = -600.0  # the new leader's clock
        read((401, "/of-its-time"), (900, "/in-time"), (790, "/late"))
        stream.advance_processing_time(60)
        topic.go(1000)
        read((1403, "/after"))
    stream.advance_watermark_to(NOON_S + 10_000).advance_watermark_to_infinity()
    views = [("ON_TIME", 960, "/before", 1), ("ON_TIME", 900, "/in-time", 1)]
    views += [("LATE", 780, "/late", 1), ("ON_TIME", 1380, "/after", 1)]
    judged = [("/before", 1000, "on_time"), ("/of-its-time", 1000, "too_late")]
    judged += [("/in-time", 1000, "on_time"), ("/late", 1000, "late"), ("/after", 1402, "on_time")]
    sinks = Sinks(
        write_lake=Collect("lake", judged, beam.FlatMap(stored)),
        write_enriched=beam.Map(lambda batch: batch),
        write_dead_letters=Collect(
            "letters", [("/of-its-time", "too_late")], beam.FlatMap(letters)
        ),
        write_table=lambda table: (
            Collect(VIEWS, views, beam.ParDo(RowsWithPanesFn()) | beam.FlatMap(counted))
            if table.name == VIEWS
            else beam.Map(lambda batch: batch)
        ),
    )
    activity = Activity(
        NdjsonDecoder(ACTIVITY, {}, {}),
        TimeRule(out_of_orderness_s=DISORDER_S),
        key_shards=1,
        window_shards=1,
    )
    with stream_pipeline() as pipeline:
        build(pipeline, stream, activity, sinks)
