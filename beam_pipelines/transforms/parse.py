"""Payloads become rows, or dead letters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations

from beam_pipelines.kernels.columns import micros
from beam_pipelines.kernels.dead_letters import dead_letters
from beam_pipelines.kernels.decode import Decoder
from beam_pipelines.kernels.hashing import hash_strings, hash_with
from beam_pipelines.model.batches import BatchOf, Rows
from beam_pipelines.model.records import DEAD_LETTERS, EVENT_TIME, parsed_schema
from beam_pipelines.model.span import Span, spanned
from beam_pipelines.telemetry import Counter

PAYLOAD = "payload"
COORDINATES = "coordinates"


class Parsed(NamedTuple):
    """Outputs of `Parse`."""

    rows: beam.PCollection  # (Span, batch of parsed_schema)
    dead_letters: beam.PCollection  # batches of DEAD_LETTERS


@dataclass
class Parse(beam.PTransform):
    """Decode payloads into rows of a declared schema.

    Input: (Span, batch of PAYLOADS), as a source yields them.
    Output: `Parsed`. Every payload is in exactly one of the two outputs; a span goes on
    even when none of its payloads was valid.

    Each row gets an `identity`, a hash that the copies of one event share: of the column
    `identify_by` and the event time, or of the payload where that column is null;
    `payload`: always of the payload; `coordinates`: of topic, partition and offset, so
    that every record is an event of its own.

    Args:
      decoder: Turns payloads into columns, and rejects what it can't.
      identify_by: A column of the decoder's schema, `payload` or `coordinates`.

    Raises:
      ValueError: there is no such column.
    """

    decoder: Decoder
    identify_by: str = PAYLOAD

    def __post_init__(self) -> None:
        known = (*self.decoder.schema.names, PAYLOAD, COORDINATES)
        if self.identify_by not in known:
            raise ValueError(f"can't identify rows by {self.identify_by!r}, only {known}")

    @no_annotations
    def expand(self, payloads: beam.PCollection) -> Parsed:
        outputs = payloads | "Decode" >> beam.ParDo(
            _ParseFn(self.decoder, self.identify_by)
        ).with_outputs("dead_letters", main="rows")
        outputs.rows.element_type = spanned(BatchOf(parsed_schema(self.decoder.schema)))
        outputs.dead_letters.element_type = BatchOf(DEAD_LETTERS)
        return Parsed(outputs.rows, outputs.dead_letters)


class _ParseFn(beam.DoFn):
    def __init__(self, decoder: Decoder, identify_by: str) -> None:
        self.decoder = decoder
        self.identify_by = identify_by
        self.schema = parsed_schema(decoder.schema)
        self.read = Counter("read")
        self.invalid = Counter("invalid")

    def process(self, element: tuple[Span, Rows]) -> Iterator:
        span, records = element
        self.read.inc(len(records))
        decoded = self.decoder(records["payload"], span.topic)
        if decoded.rejections:
            self.invalid.inc(len(decoded.rejections))
            rows, reasons, messages = zip(*decoded.rejections, strict=True)
            rejected = records.take(pa.array(rows, pa.int64()))
            for reason in set(reasons):
                Counter(f"invalid.{reason}").inc(reasons.count(reason))
            yield TaggedOutput(
                "dead_letters", dead_letters(rejected, span, "parse", reasons, messages)
            )
            records = records.filter(pa.array(decoded.valid))
        identity = self._identity(decoded.rows, records, span)
        columns = {
            **dict(zip(decoded.rows.schema.names, decoded.rows.columns, strict=True)),
            **dict(zip(records.schema.names, records.columns, strict=True)),
            "identity": pa.array(identity),
        }
        yield (
            span,
            pa.RecordBatch.from_arrays([columns[n] for n in self.schema.names], schema=self.schema),
        )

    def _identity(self, rows: pa.RecordBatch, records: pa.RecordBatch, span: Span) -> np.ndarray:
        if self.identify_by == COORDINATES:
            partition = hash_strings(pa.array([f"{span.topic}\0{span.partition}"]))
            return hash_with(np.repeat(partition, len(records)), micros(records["offset"]))
        if self.identify_by == PAYLOAD:
            return hash_strings(records["payload"])
        named = rows[self.identify_by]
        identity = hash_with(hash_strings(named), micros(rows[EVENT_TIME]))
        if named.null_count:
            unnamed = np.flatnonzero(named.is_null().to_numpy(zero_copy_only=False))
            identity[unnamed] = hash_strings(records["payload"].take(pa.array(unnamed)))
        return identity
