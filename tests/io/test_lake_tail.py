"""The lake of endless input: open tails, publication, and what readers see meanwhile."""

from datetime import UTC, datetime, timedelta

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.coders import TupleCoder
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing import test_stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import TimestampedValue

from beam_pipelines.io.lake import WriteLake, lake_files, open_lake
from beam_pipelines.io.lake.layout import Range
from beam_pipelines.model.batches import BatchCoder, BatchOf, batch_of_rows, one_of
from beam_pipelines.model.records import TIMESTAMP, classified_schema
from beam_pipelines.model.span import Span, SpanCoder, spanned
from beam_pipelines.telemetry import tally
from beam_pipelines.testing import stream_pipeline

SHOP = classified_schema(
    pa.schema(
        [
            pa.field("event_time", TIMESTAMP, nullable=False),
            pa.field("order_id", pa.string(), nullable=False),
            one_of("channel", ("web", "store")),
        ]
    )
)
MIDNIGHT = datetime(2026, 1, 6, tzinfo=UTC)
RANGE = Range("orders", 3, 100, 110)
WIDE = RANGE._replace(end=180)  # its eighths have ten offsets
MONDAY, TUESDAY = "event_date=2026-01-05", "event_date=2026-01-06"


def order(offset, verdict="on_time"):
    """Even offsets are of Monday, odd ones of Tuesday."""
    time = MIDNIGHT + timedelta(seconds=offset if offset % 2 else offset - 3600)
    return {
        "event_time": time,
        "order_id": f"o-{offset}",
        "channel": "web",
        "identity": offset,
        "offset": offset,
        "append_time": time + timedelta(seconds=5),
        "verdict": verdict,
    }


def pair(start, end, *, rows=None, last=False, of=RANGE):
    offsets = range(start, end) if rows is None else rows
    batch = batch_of_rows([order(offset) for offset in offsets], SHOP)
    return Span(*of, start, end, last), batch


class Stream:
    def __init__(self):
        coder = TupleCoder([SpanCoder(), BatchCoder(SHOP)])
        self.stream = test_stream.TestStream(coder=coder).with_output_types(spanned(BatchOf(SHOP)))
        self.stream.advance_watermark_to(0)

    def add(self, *pairs):
        self.stream.add_elements([TimestampedValue(each, 0) for each in pairs])
        return self

    def processing_time(self, seconds):
        self.stream.advance_processing_time(seconds)
        return self

    def write(self, folder, names):
        self.stream.advance_watermark_to_infinity()
        with stream_pipeline() as pipeline:
            # The clock stands still at the start: after a first timer, the next is due at once.
            published = pipeline | self.stream | WriteLake(str(folder), clock=lambda: 0.0)
            assert_that(published, equal_to(names))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))


def offsets(folder):
    return sorted(open_lake(folder).to_table(columns=["offset"])["offset"].to_pylist())


def opened(date, covered, start=100):
    return f"_open/{WIDE.place}/{date}/{WIDE.name}-{start:012}-{covered:012}.parquet"


WHOLE = [f"{MONDAY}/{RANGE.name}.parquet", f"{TUESDAY}/{RANGE.name}.parquet"]


def test_a_range_is_published_when_its_spans_cover_it_in_any_order(tmp_path):
    before = tally().get("rows_written.lake", 0)
    stream = Stream().add(pair(106, 110)).add(pair(100, 103), pair(103, 106))
    stream.write(tmp_path, WHOLE)
    assert tally()["rows_written.lake"] - before == 10
    assert files(tmp_path) == WHOLE
    monday = pq.ParquetFile(tmp_path / WHOLE[0]).read()
    assert monday["offset"].to_pylist() == [100, 102, 104, 106, 108]
    assert monday["partition"].to_pylist() == [3] * 5


def test_a_row_counts_as_written_when_it_first_lies_in_a_file(tmp_path):
    before = tally().get("rows_written.lake", 0)
    Stream().add(pair(100, 103)).processing_time(10).write(tmp_path / "open", [])
    assert tally()["rows_written.lake"] - before == 3
    stream = Stream().add(pair(100, 103)).processing_time(10).add(pair(103, 107))
    stream.processing_time(10).add(pair(107, 110)).write(tmp_path / "published", WHOLE)
    assert tally()["rows_written.lake"] - before == 3 + 10


def test_the_files_are_those_of_bounded_input(tmp_path):
    Stream().add(pair(103, 110), pair(100, 103)).write(tmp_path / "stream", WHOLE)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        whole = beam.Create([pair(100, 110, last=True)], reshuffle=False)
        _ = (
            pipeline
            | whole.with_output_types(spanned(BatchOf(SHOP)))
            | WriteLake(str(tmp_path / "bounded"))
        )
    for name in WHOLE:
        assert (tmp_path / "stream" / name).read_bytes() == (
            tmp_path / "bounded" / name
        ).read_bytes()


def test_before_ten_seconds_nothing_is_shown(tmp_path):
    Stream().add(pair(100, 105)).processing_time(9).write(tmp_path, [])
    assert files(tmp_path) == []
    assert lake_files(tmp_path) == []


def test_after_ten_seconds_the_open_tail_is_shown(tmp_path):
    stream = Stream().add(pair(100, 103, of=WIDE)).add(pair(103, 105, of=WIDE))
    stream.processing_time(11).write(tmp_path, [])
    assert files(tmp_path) == [opened(MONDAY, 105), opened(TUESDAY, 105)]
    assert offsets(tmp_path) == [100, 101, 102, 103, 104]


def test_a_tail_reaches_to_the_first_span_that_is_missing(tmp_path):
    stream = Stream().add(pair(104, 108, of=WIDE)).add(pair(100, 102, of=WIDE))
    stream.processing_time(11).write(tmp_path, [])
    assert files(tmp_path) == [opened(MONDAY, 102), opened(TUESDAY, 102)]


def test_a_tail_without_rows_has_no_file(tmp_path):
    Stream().add(pair(100, 105, rows=[])).processing_time(11).write(tmp_path, [])
    assert files(tmp_path) == []


def test_a_date_without_news_keeps_its_file(tmp_path):
    stream = Stream().add(pair(100, 103, of=WIDE)).processing_time(11)
    stream.add(pair(103, 107, rows=[105], of=WIDE)).processing_time(11)
    stream.write(tmp_path, [])
    assert files(tmp_path) == [
        opened(MONDAY, 103),
        *(opened(TUESDAY, covered) for covered in (103, 107)),
    ]
    assert lake_files(tmp_path) == [opened(MONDAY, 103), opened(TUESDAY, 107)]
    assert offsets(tmp_path) == [100, 101, 102, 105]


def test_the_two_longest_tails_stay_for_readers_that_have_listed_them(tmp_path):
    stream = Stream()
    for start in range(100, 108, 2):
        stream.add(pair(start, start + 2, of=WIDE)).processing_time(11)
    stream.write(tmp_path, [])
    assert files(tmp_path) == [opened(day, end) for day in (MONDAY, TUESDAY) for end in (106, 108)]
    assert offsets(tmp_path) == list(range(100, 108))


def test_each_eighth_has_files_of_its_own(tmp_path):
    stream = Stream().add(pair(100, 107, of=WIDE)).processing_time(11)
    stream.add(pair(107, 125, of=WIDE)).processing_time(11)
    stream.add(pair(125, 127, of=WIDE)).processing_time(11).write(tmp_path, [])
    parts = [(107, 100), (110, 100), (120, 110), (125, 120), (127, 120)]
    assert files(tmp_path) == [opened(day, *part) for day in (MONDAY, TUESDAY) for part in parts]
    read = [part for part in parts if part[0] in (110, 120, 127)]
    assert lake_files(tmp_path) == [
        opened(day, *part) for day in (MONDAY, TUESDAY) for part in read
    ]
    assert offsets(tmp_path) == list(range(100, 127))


def test_an_eighth_that_follows_a_missing_span_waits(tmp_path):
    stream = Stream().add(pair(110, 120, of=WIDE), pair(100, 105, of=WIDE)).processing_time(11)
    stream.write(tmp_path, [])
    assert offsets(tmp_path) == list(range(100, 105))


def test_publication_hides_the_tail_and_ten_seconds_later_it_is_gone(tmp_path):
    before = Stream().add(pair(100, 105)).processing_time(11).add(pair(105, 110))
    before.write(tmp_path / "before", WHOLE)
    assert lake_files(tmp_path / "before") == WHOLE
    after = Stream().add(pair(100, 105)).processing_time(11).add(pair(105, 110))
    after.processing_time(11).write(tmp_path / "after", WHOLE)
    assert files(tmp_path / "after") == WHOLE


def test_where_the_input_ends_within_a_range_it_is_shown_at_once_and_stays_open(tmp_path):
    before = tally().get("rows_written.lake", 0)
    stream = Stream().add(pair(112, 116, last=True, of=WIDE)).add(pair(100, 112, of=WIDE))
    stream.write(tmp_path, [])
    parts = [(110, 100), (116, 110)]
    assert files(tmp_path) == [opened(day, *part) for day in (MONDAY, TUESDAY) for part in parts]
    assert tally()["rows_written.lake"] - before == 16


def test_ranges_are_apart(tmp_path):
    other = RANGE._replace(partition=4)
    stream = Stream().add(pair(100, 104), pair(100, 110, of=other)).processing_time(11)
    stream.write(tmp_path, [f"{day}/{other.name}.parquet" for day in (MONDAY, TUESDAY)])
    assert offsets(tmp_path) == sorted([*range(100, 104), *range(100, 110)])


def test_a_range_whose_first_offset_isnt_at_a_border_is_published(tmp_path):
    began = RANGE._replace(start=107)
    Stream().add(pair(107, 110, of=began)).write(
        tmp_path, [f"{day}/{began.name}.parquet" for day in (MONDAY, TUESDAY)]
    )


def test_a_span_that_covers_nothing_changes_nothing(tmp_path):
    stream = Stream().add(pair(100, 100), pair(100, 105), pair(105, 105), pair(105, 110))
    stream.add(pair(110, 110, last=True)).write(tmp_path, WHOLE)


@pytest.mark.parametrize(
    ("spans", "why"),
    [
        ([(100, 105), (100, 105), (105, 110)], "several spans of .* begin at the same offset"),
        ([(100, 105), (100, 108), (105, 110)], "several spans of .* begin at the same offset"),
        ([(100, 102), (101, 110)], "hold 11 offsets, and reach to 110"),
        ([(100, 101), (102, 103), (102, 110)], "hold 10 offsets, and reach to 101"),
    ],
)
def test_spans_that_overlap_stop_the_job(tmp_path, spans, why):
    stream = Stream().add(*(pair(start, end) for start, end in spans))
    with pytest.raises(Exception, match=f"{why}: some overlap"):
        stream.write(tmp_path, [])
    assert files(tmp_path) == []
