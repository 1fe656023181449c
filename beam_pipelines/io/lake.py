"""The lake: every valid record once, as Parquet files by date."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.io.parquet import write_parquet
from beam_pipelines.io.publication import published
from beam_pipelines.kernels.columns import divided, micros
from beam_pipelines.model.batches import Rows, concatenated, require_columns
from beam_pipelines.model.records import (
    EVENT_TIME,
    FUTURE,
    IDENTITY,
    PAYLOADS,
    VERDICT,
    declared_names,
)
from beam_pipelines.model.span import Span, batch_hint
from beam_pipelines.telemetry import Counter

ROW_GROUP_ROWS = 131_072

_DAY_US = 86_400_000_000


def lake_schema(rows: pa.Schema) -> pa.Schema:
    """Return the columns of the lake's files for rows as the time rule yields them.

    The declared columns and the identity, then where the record was read (topic,
    partition, offset), its append time and its verdict.
    """
    declared = [rows.field(name) for name in declared_names(rows)]
    return pa.schema(
        [
            *declared,
            IDENTITY,
            pa.field("topic", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("partition", pa.int32(), nullable=False),
            PAYLOADS.field("offset"),
            PAYLOADS.field("append_time"),
            VERDICT,
        ]
    )


@dataclass
class WriteLake(beam.PTransform):
    """Store the records of every offset range, one Parquet file per range and date.

    Input: (Span, batch of classified_schema). The spans of a range come in order, all in
    one bundle, as a source that reads a range in one go yields them: no shuffle, and no
    file before its range is complete. Spans of several ranges may take turns. The rows of
    the open ranges wait in memory.
    Output: the published files, relative to the folder, as
    `event_date=YYYY-MM-DD/TOPIC-PARTITION-START-END.parquet` (UTC date of the event time,
    offsets of the range). A range without rows has none.

    Guarantee: a file is a pure function of the records in its range, named by it and
    published by rename, so a repeated bundle replaces files with the same bytes. The
    files of one range appear one after the other. Rows judged `future` are left out; no
    others are.

    Raises:
      RuntimeError: (at run time) a span is missing or out of order, or a bundle ends within
        a range.
    """

    folder: str

    def expand(self, pairs: beam.PCollection) -> beam.PCollection:
        schema = batch_hint(pairs).schema
        stored = (EVENT_TIME, IDENTITY.name, "offset", "append_time", VERDICT.name)
        require_columns(schema, *stored)
        return pairs | "Publish ranges" >> beam.ParDo(
            _WriteRangesFn(self.folder, schema)
        ).with_output_types(str)


@dataclass
class _OpenRange:
    covered: int  # up to this offset
    batches: list[pa.RecordBatch] = field(default_factory=list)


class _WriteRangesFn(beam.DoFn):
    def __init__(self, folder: str, rows: pa.Schema) -> None:
        self.folder = folder
        self.schema = lake_schema(rows)
        self.gathered = pa.schema([field for field in rows if field.name in self.schema.names])
        self.written = Counter("rows_written.lake")

    def start_bundle(self) -> None:
        self._open: dict[tuple[str, int, int, int], _OpenRange] = {}

    def process(self, element: tuple[Span, Rows]) -> Iterator[str]:
        span, rows = element
        key = span[:4]
        opened = self._open.setdefault(key, _OpenRange(covered=span.range_start))
        if span.start != opened.covered:
            raise RuntimeError(
                f"a span of {_named(span)} starts at {span.start}, but the ones before it "
                f"reach to {opened.covered}"
            )
        opened.covered = span.end
        if len(rows):
            opened.batches.append(rows.select(self.gathered.names))
        if span.last:
            del self._open[key]
            yield from self._publish(span, opened.batches)

    def finish_bundle(self) -> None:
        if self._open:
            (topic, partition, start, end), opened = next(iter(self._open.items()))
            raise RuntimeError(
                f"a bundle ends at {opened.covered}, within offsets [{start}, {end}) of {topic}, "
                f"partition {partition}; the lake needs whole ranges"
            )

    def _publish(self, span: Span, batches: list[pa.RecordBatch]) -> Iterator[str]:
        rows = self._stored(span, concatenated(batches, self.gathered))
        file_name = f"{_named_range(span)}.parquet"
        for day, of_day in divided(rows, micros(rows[EVENT_TIME]) // _DAY_US):
            name = f"event_date={np.datetime64(day, 'D')}/{file_name}"
            with published(self.folder, name) as path:
                write_parquet(_row_groups(of_day), path)
            yield name
        self.written.inc(len(rows))

    def _stored(self, span: Span, rows: pa.RecordBatch) -> pa.RecordBatch:
        future = pc.equal(rows[VERDICT.name].indices, FUTURE)
        if pc.any(future).as_py():
            rows = rows.filter(pc.invert(future))
        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        columns["topic"] = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(len(rows), np.int8)), pa.array([span.topic])
        )
        columns["partition"] = pa.array(np.full(len(rows), span.partition, np.int32))
        return pa.RecordBatch.from_arrays(
            [columns[name] for name in self.schema.names], schema=self.schema
        )


def _row_groups(rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), ROW_GROUP_ROWS):
        yield rows.slice(start, ROW_GROUP_ROWS)


def _named(span: Span) -> str:
    return (
        f"offsets [{span.range_start}, {span.range_end}) of {span.topic}, "
        f"partition {span.partition}"
    )


def _named_range(span: Span) -> str:
    """Name a range, safe as a file name; topics that read alike differ by their hash."""
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", PurePath(span.topic).name)[-60:].strip("-.")
    digest = hashlib.sha256(span.topic.encode()).hexdigest()[:12]
    place = f"{digest}-{span.partition}-{span.range_start:012}-{span.range_end:012}"
    return f"{slug}-{place}" if slug else place
