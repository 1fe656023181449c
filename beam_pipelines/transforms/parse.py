"""Payloads become rows, or dead letters."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.pvalue import TaggedOutput
from apache_beam.typehints.decorators import no_annotations
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.kernels.columns import micros
from beam_pipelines.kernels.dead_letters import dead_letters
from beam_pipelines.kernels.decode import Decoder, Rejection
from beam_pipelines.kernels.hashing import hash_strings, hash_with
from beam_pipelines.kernels.secure_hashing import secure_hashes
from beam_pipelines.model.batches import BatchOf, Rows, concatenated
from beam_pipelines.model.hash_key import HashKey, key_of
from beam_pipelines.model.records import DEAD_LETTERS, EVENT_TIME, PAYLOADS, parsed_schema
from beam_pipelines.model.span import Span, spanned
from beam_pipelines.telemetry import Counter
from beam_pipelines.transforms.gather import in_global_window, require_global_window

PAYLOAD = "payload"
COORDINATES = "coordinates"

DECODED_ROWS = 8_192
"""Rows decoded together, where a bundle has them; a larger batch is decoded by itself."""

DECODED_BYTES = 64 << 20
"""Bytes of payloads decoded together at most; a larger batch is decoded by itself."""


class Parsed(NamedTuple):
    """Outputs of `Parse`."""

    rows: beam.PCollection  # (Span, batch of parsed_schema)
    dead_letters: beam.PCollection  # batches of DEAD_LETTERS


@dataclass
class Parse(beam.PTransform):
    """Decode payloads into rows of a declared schema.

    Input: (Span, batch of PAYLOADS), as a source yields them, in the global window.
    Output: `Parsed`, in the order of the input. Every payload is in exactly one of the two
    outputs; a span goes on even when none of its payloads was valid.

    Each row gets an `identity`, a hash that the copies of one event share: of the column
    `identify_by` and the event time, or of the payload where that column is null;
    `payload`: always of the payload; `coordinates`: of topic, partition and offset, so
    that every record is an event of its own.

    The hash can be inverted: who knows the id and time of an event can make a record of
    another id that shares its identity. With a `hash_key` nobody can who doesn't know it.

    Args:
      decoder: Turns payloads into columns, and rejects what it can't.
      identify_by: A column of the decoder's schema, `payload` or `coordinates`.
      hash_key: Makes identities of columns and payloads; None: MurmurHash does.

    Raises:
      ValueError: there is no such column, or the batches were windowed.
    """

    decoder: Decoder
    identify_by: str = PAYLOAD
    hash_key: HashKey | None = None

    def __post_init__(self) -> None:
        known = (*self.decoder.schema.names, PAYLOAD, COORDINATES)
        if self.identify_by not in known:
            raise ValueError(f"can't identify rows by {self.identify_by!r}, only {known}")

    @no_annotations
    def expand(self, payloads: beam.PCollection) -> Parsed:
        require_global_window(payloads, "Parse")
        outputs = payloads | "Decode" >> beam.ParDo(
            _ParseFn(self.decoder, self.identify_by, self.hash_key)
        ).with_outputs("dead_letters", main="rows")
        outputs.rows.element_type = spanned(BatchOf(parsed_schema(self.decoder.schema)))
        outputs.dead_letters.element_type = BatchOf(DEAD_LETTERS)
        return Parsed(outputs.rows, outputs.dead_letters)


def _bytes_of(records: pa.RecordBatch) -> int:
    """Return the bytes of a batch, or a little more: to count exactly takes 15 µs."""
    held: int = records.get_total_buffer_size()  # also what a slice doesn't show
    return held if held < DECODED_BYTES >> 6 else int(records.nbytes)


class _Waiting(NamedTuple):
    span: Span
    records: pa.RecordBatch
    timestamp: Timestamp


class _ParseFn(beam.DoFn):
    """Decodes small batches of a bundle together, and yields what came of each by itself.

    Decoding a batch costs as much as a thousand rows of it, and a reader of many partitions
    yields a small batch for each. Nothing outlives the bundle.
    """

    def __init__(self, decoder: Decoder, identify_by: str, hash_key: HashKey | None = None) -> None:
        self.decoder = decoder
        self.identify_by = identify_by
        self.hash_key = hash_key
        self.schema = parsed_schema(decoder.schema)
        self.read = Counter("read")
        self.invalid = Counter("invalid")

    def setup(self) -> None:
        self._key = key_of(self.hash_key)

    def start_bundle(self) -> None:
        self._waiting: list[_Waiting] = []
        self._rows = self._bytes = 0

    def process(
        self, element: tuple[Span, Rows], timestamp: Any = beam.DoFn.TimestampParam
    ) -> Iterator:
        span, records = element
        self.read.inc(len(records))
        new_bytes = _bytes_of(records)
        if self._waiting and (
            self._waiting[0].span.topic != span.topic or self._bytes + new_bytes > DECODED_BYTES
        ):
            yield from self._flush()
        self._waiting.append(_Waiting(span, records, timestamp))
        self._rows += len(records)
        self._bytes += new_bytes
        if self._rows >= DECODED_ROWS:
            yield from self._flush()

    def finish_bundle(self) -> Iterator:
        if self._waiting:
            yield from self._flush()

    def _flush(self) -> Iterator:
        waiting, self._waiting = self._waiting, []
        self._rows = self._bytes = 0
        records = concatenated([each.records for each in waiting], PAYLOADS)
        decoded = self.decoder(records["payload"], waiting[0].span.topic)
        if decoded.rejections:
            self.invalid.inc(len(decoded.rejections))
        borders = np.cumsum([0, *(len(each.records) for each in waiting)])
        rejected_at = np.searchsorted([each.row for each in decoded.rejections], borders)
        kept_at = np.append(0, np.cumsum(decoded.valid))[borders]
        kept = records.filter(pa.array(decoded.valid)) if decoded.rejections else records
        for i, (span, _, timestamp) in enumerate(waiting):
            rejections = decoded.rejections[rejected_at[i] : rejected_at[i + 1]]
            if rejections:
                letters = self._letters(records, span, rejections)
                yield TaggedOutput("dead_letters", in_global_window(letters, timestamp))
            at, rows = int(kept_at[i]), int(kept_at[i + 1] - kept_at[i])
            parsed = self._parsed(decoded.rows.slice(at, rows), kept.slice(at, rows), span)
            yield in_global_window((span, parsed), timestamp)

    def _letters(
        self, records: pa.RecordBatch, span: Span, rejections: list[Rejection]
    ) -> pa.RecordBatch:
        rows, reasons, messages = zip(*rejections, strict=True)
        for reason in set(reasons):
            Counter(f"invalid.{reason}").inc(reasons.count(reason))
        rejected = records.take(pa.array(rows, pa.int64()))
        return dead_letters(rejected, span, "parse", reasons, messages)

    def _parsed(self, rows: pa.RecordBatch, records: pa.RecordBatch, span: Span) -> pa.RecordBatch:
        columns = {
            **dict(zip(rows.schema.names, rows.columns, strict=True)),
            **dict(zip(records.schema.names, records.columns, strict=True)),
            "identity": pa.array(self._identity(rows, records, span)),
        }
        return pa.RecordBatch.from_arrays(
            [columns[name] for name in self.schema.names], schema=self.schema
        )

    def _identity(self, rows: pa.RecordBatch, records: pa.RecordBatch, span: Span) -> np.ndarray:
        if self.identify_by == COORDINATES:
            partition = hash_strings(pa.array([f"{span.topic}\0{span.partition}"]))
            return hash_with(np.repeat(partition, len(records)), micros(records["offset"]))
        if self.identify_by == PAYLOAD:
            return self._of_payloads(records["payload"])
        named = rows[self.identify_by]
        identity = self._of_names(named, micros(rows[EVENT_TIME]))
        if named.null_count:
            unnamed = np.flatnonzero(named.is_null().to_numpy(zero_copy_only=False))
            identity[unnamed] = self._of_payloads(records["payload"].take(pa.array(unnamed)))
        return identity

    def _of_names(self, names: pa.Array, times: np.ndarray) -> np.ndarray:
        if self._key:
            return secure_hashes(names, self._key, b"name and time", times)
        return hash_with(hash_strings(names), times)

    def _of_payloads(self, payloads: pa.Array) -> np.ndarray:
        return (
            secure_hashes(payloads, self._key, b"payload") if self._key else hash_strings(payloads)
        )
