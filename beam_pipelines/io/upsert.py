"""What sinks of tables have in common: the rows of a bundle are upserted together."""

from collections.abc import Callable
from typing import Protocol

import apache_beam as beam
import pyarrow as pa

from beam_pipelines.model.batches import Rows, concatenated, declared, schema_of
from beam_pipelines.telemetry import Counter

FLUSH_ROWS = 200_000
"""Rows upserted at once, where a bundle has as many."""

FLUSH_BYTES = 64 << 20
"""Likewise bytes of columns: a few large records are as much as many small ones."""


class OpenTable(Protocol):
    """A table that can be written to."""

    def upsert(self, rows: pa.RecordBatch) -> None:
        """Write rows, in any order; returns when all are stored."""

    def close(self) -> None:
        """Let go of what was opened."""


def upsert(
    rows: beam.PCollection, name: str, schema: pa.Schema, open_table: Callable[[], OpenTable]
) -> beam.PCollection:
    """Gather rows within a bundle; upsert them at its end, `FLUSH_ROWS` or `FLUSH_BYTES`.

    Args:
      rows: Batches of the table's schema.
      name: Of the table, in messages and in the counter `rows_written.NAME`.
      schema: Of the table.
      open_table: Called by each worker thread.

    Raises:
      ValueError: the batches have other columns.
    """
    given = schema_of(rows)
    if not given.equals(schema):
        raise ValueError(
            f"table {name} takes columns {schema.to_string()}; the batches have {given.to_string()}"
        )
    return rows | "Upsert" >> beam.ParDo(_UpsertFn(name, given, open_table))


class _UpsertFn(beam.DoFn):
    def __init__(self, name: str, schema: pa.Schema, open_table: Callable[[], OpenTable]) -> None:
        self.schema = schema
        self.open_table = open_table
        self.written = Counter(f"rows_written.{name}")

    def setup(self) -> None:
        self._table = self.open_table()

    def start_bundle(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0

    def process(self, batch: Rows) -> None:
        size = batch.nbytes
        if self._rows and self._bytes + size > FLUSH_BYTES:
            self._flush()
        self._batches.append(batch)
        self._rows += len(batch)
        self._bytes += size
        if self._rows >= FLUSH_ROWS:
            self._flush()

    def finish_bundle(self) -> None:
        if self._rows:
            self._flush()

    def teardown(self) -> None:
        self._table.close()

    def _flush(self) -> None:
        rows = declared(concatenated(self._batches, self.schema), self.schema)
        self._table.upsert(rows)
        self.written.inc(len(rows))
        self.start_bundle()
