"""A made-up stream as a source: its ranges, its stamps, its offsets."""

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.timestamp import MIN_TIMESTAMP, Timestamp

from beam_pipelines.io import generated
from beam_pipelines.io.generated import ReadGenerated
from beam_pipelines.model.batches import BatchOf
from beam_pipelines.model.records import PAYLOADS, TIMESTAMP
from beam_pipelines.model.span import Span, spanned


class Numbers:
    """Records "0", "1", ... appended one a second from 1000 s on."""

    def __init__(self, total: int, chunk_records: int, appended: bool = True) -> None:
        self.total, self.chunk_records, self.appended = total, chunk_records, appended

    def __call__(self, i: int) -> pa.RecordBatch:
        start = i * self.chunk_records
        offsets = np.arange(start, min(start + self.chunk_records, self.total))
        append_us = pa.array(
            (1_000 + offsets) * 1_000_000, mask=np.full(len(offsets), not self.appended)
        )
        return pa.RecordBatch.from_arrays(
            [
                pa.array([str(offset).encode() for offset in offsets], pa.binary()),
                pa.array(offsets, pa.int64()),
                append_us.cast(TIMESTAMP),
            ],
            schema=PAYLOADS,
        )


class StampedFn(beam.DoFn):
    def process(self, pair, timestamp=beam.DoFn.TimestampParam):
        span, batch = pair
        yield span, timestamp, batch["payload"].to_pylist()


@pytest.fixture
def small_ranges(monkeypatch):
    monkeypatch.setattr(generated, "RANGE_OFFSETS", 4)


def test_ranges_are_cut_in_order_and_stamped_before_their_first_append(small_ranges):
    source = ReadGenerated(Numbers(7, 2), 7, 2, "numbers", out_of_orderness_s=120)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        pairs = pipeline | source
        assert pairs.element_type == spanned(BatchOf(PAYLOADS))
        assert_that(
            pairs | beam.ParDo(StampedFn()),
            equal_to(
                [
                    (Span("numbers", 0, 0, 4, 0, 2, False), Timestamp(880), [b"0", b"1"]),
                    (Span("numbers", 0, 0, 4, 2, 4, True), Timestamp(882), [b"2", b"3"]),
                    (Span("numbers", 0, 4, 8, 4, 6, False), Timestamp(884), [b"4", b"5"]),
                    (Span("numbers", 0, 4, 8, 6, 7, True), Timestamp(886), [b"6"]),
                ]
            ),
        )


def test_a_full_last_range_ends_with_its_last_chunk(small_ranges):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        spans = pipeline | ReadGenerated(Numbers(4, 4), 4, 4, "n") | beam.Keys()
        assert_that(spans, equal_to([Span("n", 0, 0, 4, 0, 4, True)]))


def test_without_append_times_batches_have_the_earliest_timestamp():
    source = ReadGenerated(Numbers(1, 1, appended=False), 1, 1, "numbers")
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        stamps = pipeline | source | beam.ParDo(StampedFn()) | beam.Map(lambda row: row[1])
        assert_that(stamps, equal_to([MIN_TIMESTAMP]))


def test_an_empty_stream_is_one_span_without_records():
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        rows = pipeline | ReadGenerated(Numbers(0, 1), 0, 1, "none") | beam.ParDo(StampedFn())
        assert_that(rows, equal_to([(Span("none", 0, 0, 500_000, 0, 0, True), MIN_TIMESTAMP, [])]))


def test_a_chunk_with_other_offsets_stops_the_run():
    with (
        pytest.raises(Exception, match=r"at offset 2 must have 2 records .* not 1 from"),
        beam.Pipeline(runner=FnApiRunner()) as pipeline,
    ):
        pipeline | ReadGenerated(Numbers(3, 2), 4, 2, "numbers")


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="chunk_records must divide 500000: 3"):
        ReadGenerated(Numbers(3, 3), 3, 3, "numbers")
    with pytest.raises(ValueError, match="must not be negative: -1, 120"):
        ReadGenerated(Numbers(3, 1), -1, 1, "numbers")
