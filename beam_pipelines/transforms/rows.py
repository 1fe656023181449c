"""Choosing rows."""

from dataclasses import dataclass

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.model.batches import Rows, hint_of, schema_of, values_of


@dataclass
class FilterRows(beam.PTransform):
    """Keep the rows whose column has a value.

    Input: batches. Output: batches of the columns kept; those left empty are dropped.

    Args:
      column: Column name.
      equals: The value.
      keep: Columns to go on with; None: all of them.

    Raises:
      ValueError: there is no such column, or the column can't hold the value.
    """

    column: str
    equals: str
    keep: tuple[str, ...] | None = None

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        schema = schema_of(batches, self.column, *(self.keep or ()))
        field = schema.field(self.column)
        if pa.types.is_dictionary(field.type) and self.equals not in values_of(field):
            raise ValueError(f"{self.column} is one of {values_of(field)}, never {self.equals!r}")
        names = list(self.keep or schema.names)
        kept = pa.schema([schema.field(name) for name in names])
        return batches | "Filter" >> beam.FlatMap(
            _matching, self.column, self.equals, names
        ).with_output_types(hint_of(batches).of(kept))


def _matching(batch: Rows, column: str, value: str, names: list[str]) -> list[Rows]:
    kept = batch.select(names).filter(pc.equal(batch[column], value))
    return [kept] if len(kept) else []
