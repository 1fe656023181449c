"""Choosing rows."""

from dataclasses import dataclass

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.model.batches import Rows, schema_of, values_of


@dataclass
class FilterRows(beam.PTransform):
    """Keep the rows whose column has a value.

    Input and output: batches of one schema. Batches left empty are dropped.

    Args:
      column: Column name.
      equals: The value.

    Raises:
      ValueError: there is no such column, or the column can't hold the value.
    """

    column: str
    equals: str

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        field = schema_of(batches, self.column).field(self.column)
        if pa.types.is_dictionary(field.type) and self.equals not in values_of(field):
            raise ValueError(f"{self.column} is one of {values_of(field)}, never {self.equals!r}")
        return batches | "Filter" >> beam.FlatMap(
            _matching, self.column, self.equals
        ).with_output_types(batches.element_type)


def _matching(batch: Rows, column: str, value: str) -> list[Rows]:
    kept = batch.filter(pc.equal(batch[column], value))
    return [kept] if len(kept) else []
