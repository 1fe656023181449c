"""The lake: every valid record once, as Parquet files by date."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import apache_beam as beam

from beam_pipelines.io.lake.ranges import ROW_GROUP_ROWS, RangeFiles, WriteRangesFn, lake_schema
from beam_pipelines.io.lake.reading import accepted_sql, lake_files, open_lake
from beam_pipelines.io.lake.tail import KEYED_PAGES, PagesFn, WriteTailsFn
from beam_pipelines.model.batches import require_columns
from beam_pipelines.model.records import EVENT_TIME, IDENTITY, VERDICT
from beam_pipelines.model.span import batch_hint

__all__ = [
    "ROW_GROUP_ROWS",
    "WriteLake",
    "accepted_sql",
    "lake_files",
    "lake_schema",
    "open_lake",
]


@dataclass
class WriteLake(beam.PTransform):
    """Store the records of every offset range, one Parquet file per range and date.

    Input: (Span, batch of classified_schema). Where it is bounded, the spans of a range come
    in order, all in one bundle, as a source that reads a range in one go yields them: no
    shuffle, and no file before its range is complete. Spans of several ranges may take
    turns; the rows of the open ranges wait in memory. Where it is unbounded, the spans of a
    range come in any bundles, and its rows wait in state.
    Output: the published files, relative to the folder, as
    `event_date=YYYY-MM-DD/TOPIC-PARTITION-START-END.parquet` (UTC date of the event time,
    offsets of the range). A range without rows has none.

    On unbounded input a range that isn't complete shows what is known of it below `_open/`,
    at most ten seconds of processing time late; `lake_files` knows which files to read. A
    range in which a topic ends (`Span.open`) stays there, on bounded input, too: another run
    may read on, and is hidden by nothing.

    Guarantee: a file is a pure function of the records in its range, named by it and
    published whole, so a repeated bundle, or a worker that was replaced and still writes,
    replaces files with the same bytes. The files of one range appear one after the other,
    by date, and readers see each record once at any moment. Rows judged `future` are left
    out; no others are.

    State holds the encoded rows of the open ranges, one per partition: some 100 bytes a row,
    10 MB per range of 100,000 offsets, an eighth of it in each of eight bags; one that holds
    more than 16 MB is logged.

    Args:
      folder: A local path, or `s3://bucket/path` or `gs://bucket/path` (see
        `io.publication`).
      clock: Seconds since 1970, for the timers of unbounded input.

    Raises:
      RuntimeError: (at run time) a span is missing, out of order or repeated, or a bundle of
        bounded input ends within a range.
    """

    folder: str
    clock: Callable[[], float] = time.time

    def expand(self, pairs: beam.PCollection) -> beam.PCollection:
        schema = batch_hint(pairs).schema
        stored = (EVENT_TIME, IDENTITY.name, "offset", "append_time", VERDICT.name)
        require_columns(schema, *stored)
        if pairs.is_bounded:
            return pairs | "Publish ranges" >> beam.ParDo(
                WriteRangesFn(self.folder, schema)
            ).with_output_types(str)
        files = RangeFiles(self.folder, schema)
        return (
            pairs
            | "By range" >> beam.ParDo(PagesFn(files)).with_output_types(KEYED_PAGES)
            | "Publish ranges and tails"
            >> beam.ParDo(WriteTailsFn(files, self.clock)).with_output_types(str)
        )
