"""Counts per value and slice of event time."""

import numpy as np
import pyarrow as pa


def counts_per_slice(slices: np.ndarray, values: pa.Array) -> pa.RecordBatch:
    """Count rows by slice and value.

    Args:
      slices: int64, the slice of event time each row lies in.
      values: Column to group by, as long.

    Returns:
      Columns slice (int64), value, count (int64); a row per value and slice that occurs,
      unordered.
    """
    rows = pa.table({"slice": pa.array(slices), "value": values})
    grouped = rows.group_by(["slice", "value"], use_threads=False).aggregate([([], "count_all")])
    columns = [grouped[name].combine_chunks() for name in ("slice", "value", "count_all")]
    return pa.RecordBatch.from_arrays(columns, ["slice", "value", "count"])


def summed(counts: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Add up the counts of equal values, in batches (value, count) of one schema."""
    rows = pa.Table.from_batches(counts)
    grouped = rows.group_by("value", use_threads=False).aggregate([("count", "sum")])
    columns = [grouped[name].combine_chunks() for name in ("value", "count_sum")]
    return pa.RecordBatch.from_arrays(columns, schema=counts[0].schema)
