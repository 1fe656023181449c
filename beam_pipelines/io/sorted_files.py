"""Rows as a few sorted files, for bounded input."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.pvalue import TaggedOutput
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from beam_pipelines.io.ndjson import ndjson, require_json
from beam_pipelines.io.parquet import write_parquet
from beam_pipelines.io.publication import published, scratch_path
from beam_pipelines.kernels.columns import divided, hashes, shards_of
from beam_pipelines.model.batches import Rows, concatenated, require_columns, schema_of
from beam_pipelines.telemetry import Counter

FORMATS = ("ndjson", "parquet")

SPILL_BYTES = 64 << 20
"""A worker writes its rows aside once it holds that many bytes of columns."""

SLICE_ROWS = 16_384
"""Rows written at once: a row group of a Parquet file."""

SLICE_BYTES = 128 << 20
"""Likewise bytes of text, which JSON may make six times as many: a batch takes 2 GiB."""


@dataclass
class WriteSortedFiles(beam.PTransform):
    """Write rows as sorted files, one per shard that has rows.

    Input: batches of any schema; bounded. Where it is unbounded nothing is ever written.
    Output: the names of the files, `part-00003-of-00016.ndjson`, in the folder.

    Rows go to unsorted runs below the folder (`_tmp`), at most `SPILL_BYTES` in memory;
    only the paths of the runs pass the shuffle. Then one worker per shard sorts the
    `sort_by` columns of its runs in memory, maps the rest, and writes the rows in slices
    of `SLICE_ROWS` or `SLICE_BYTES`. All workers see the same folder.

    Guarantee: each row once. A file is a pure function of the rows of its shard, in
    whatever batches they came, and is published by rename; runs of failed bundles are
    never read (`remove_leftovers` removes them before the next run). Files of an earlier
    run with other rows are replaced only where this run has rows for their shard.

    Args:
      folder: Where the files go.
      format: `ndjson` (as the function of that name writes it) or `parquet`.
      sort_by: Columns to sort by, ascending. They tell all rows apart, or the order of
        those that tie depends on how they came.
      sink: Name in the counter `rows_written.SINK`.
      shard_by: A uint64 hash column that chooses the shard; None: there is one shard.
      shards: How many files there may be.
      columns: Columns to write, in this order; None: all.
      constants: Columns with the same string in every row, written after the others.

    Raises:
      ValueError: the format is unknown, a column is missing or can't be written in this
        format, or there are several shards and no column that divides them.
    """

    folder: str
    format: str
    sort_by: tuple[str, ...]
    sink: str
    shard_by: str | None = None
    shards: int = 1
    columns: tuple[str, ...] | None = None
    constants: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is one of {FORMATS}, not {self.format!r}")
        if not self.sort_by:
            raise ValueError("sort_by names no column")
        if self.shards < 1:
            raise ValueError(f"shards must be positive, got {self.shards}")
        if self.shards > 1 and self.shard_by is None:
            raise ValueError(f"shard_by names no column to divide {self.shards} shards by")

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        columns = self.columns or tuple(schema_of(batches).names)
        schema = schema_of(batches, *self.sort_by, *columns)
        if self.shard_by is not None:
            require_columns(schema, self.shard_by)
            if schema.field(self.shard_by).type != pa.uint64():
                raise ValueError(
                    f"shard_by={self.shard_by!r} is {schema.field(self.shard_by).type}"
                    ", not a uint64 hash"
                )
        if clashing := set(columns) & set(self.constants):
            raise ValueError(f"both columns and constants: {', '.join(sorted(clashing))}")
        if self.format == "ndjson":
            require_json(pa.schema([schema.field(name) for name in columns]))
        spilled = pa.schema([schema.field(n) for n in dict.fromkeys((*columns, *self.sort_by))])
        written = (
            batches
            | "All time" >> beam.WindowInto(GlobalWindows())
            | "Spill" >> beam.ParDo(_SpillFn(self, spilled)).with_output_types(tuple[int, str])
            | "By shard" >> beam.GroupByKey()
            | "Sort" >> beam.ParDo(_SortFn(self, columns)).with_outputs("runs", main="files")
        )
        written.files.element_type = str
        written.runs.element_type = str
        # A repeated bundle of "Sort" still needs its runs: they go once it is done.
        _ = written.runs | "Sorted" >> beam.Reshuffle() | "Remove runs" >> beam.Map(_remove)
        return written.files


class _SpillFn(beam.DoFn):
    def __init__(self, files: WriteSortedFiles, schema: pa.Schema) -> None:
        self.folder = files.folder
        self.shard_by = files.shard_by
        self.shards = files.shards
        self.schema = schema

    def start_bundle(self) -> None:
        self._clear()

    def process(self, batch: Rows) -> Iterator[tuple[int, str]]:
        if not len(batch):
            return
        rows = batch.select(self.schema.names)
        if self._bytes and self._bytes + rows.nbytes > SPILL_BYTES:
            yield from self._spill()
        shards = (
            np.zeros(len(batch), np.uint64)
            if self.shard_by is None
            else shards_of(hashes(batch[self.shard_by]), self.shards)
        )
        # A batch that comes from the same shards upstream is whole: nothing is copied then.
        for shard, of_shard in divided(rows, shards):
            self._rows[shard].append(of_shard)
        self._bytes += rows.nbytes
        if self._bytes >= SPILL_BYTES:
            yield from self._spill()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for run in self._spill():
            yield WindowedValue(run, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def _spill(self) -> Iterator[tuple[int, str]]:
        spilled = self._rows
        self._clear()
        for shard, batches in sorted(spilled.items()):
            path = str(scratch_path(self.folder))
            with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, self.schema) as run:
                run.write(concatenated(batches, self.schema))
            yield shard, path

    def _clear(self) -> None:
        self._rows: defaultdict[int, list[pa.RecordBatch]] = defaultdict(list)
        self._bytes = 0


class _SortFn(beam.DoFn):
    def __init__(self, files: WriteSortedFiles, columns: tuple[str, ...]) -> None:
        self.folder = files.folder
        self.format = files.format
        self.sort_by = list(files.sort_by)
        self.columns = columns
        self.constants = dict(files.constants)
        self.shards = files.shards
        self.written = Counter(f"rows_written.{files.sink}")

    def process(self, element: tuple[int, Iterable[str]]) -> Iterator[Any]:
        shard, paths = element[0], list(element[1])
        name = f"part-{shard:05}-of-{self.shards:05}.{self.format}"
        with published(self.folder, name) as path:
            if self.format == "parquet":
                write_parquet(self._slices(paths), path)
            else:
                with path.open("wb") as file:
                    file.writelines(map(ndjson, self._slices(paths)))
        yield name
        for run in paths:
            yield TaggedOutput("runs", run)

    def _slices(self, paths: list[str]) -> Iterator[pa.RecordBatch]:
        for rows in merged_runs([_mapped(path) for path in paths], self.sort_by):
            self.written.inc(len(rows))
            yield _with_constants(rows.select(self.columns), self.constants)


def merged_runs(runs: list[pa.RecordBatch], sort_by: list[str]) -> Iterator[pa.RecordBatch]:
    """Sort the rows of all runs together; yields them in slices.

    Only the columns to sort by are gathered and sorted as a whole; slices then pick their
    rows from the runs, so the rest may be larger than memory where the runs are mapped.
    Dictionary-encoded columns sort in the order of their declared values.
    """
    keys = pa.Table.from_batches([_sort_keys(run, sort_by) for run in runs]).combine_chunks()
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in sort_by]).to_numpy()
    ends = np.cumsum([len(run) for run in runs])
    for chosen in _slices(order, runs):
        yield _picked(runs, ends, chosen.astype(np.int64))


def _slices(order: np.ndarray, runs: list[pa.RecordBatch]) -> Iterator[np.ndarray]:
    """Divide sorted rows into slices that depend on the rows alone, not on their runs."""
    if sum(run.nbytes for run in runs) <= SLICE_BYTES:
        yield from (order[at : at + SLICE_ROWS] for at in range(0, len(order), SLICE_ROWS))
        return
    sizes = np.concatenate([_text_bytes(run) for run in runs])
    ends = np.cumsum(sizes[order])
    start = 0
    while start < len(order):
        limit = SLICE_BYTES + (int(ends[start - 1]) if start else 0)
        fitting = int(np.searchsorted(ends[start : start + SLICE_ROWS], limit, "right"))
        end = start + max(fitting, 1)  # a row that is larger is a slice alone
        yield order[start:end]
        start = end


def _text_bytes(run: pa.RecordBatch) -> np.ndarray:
    """Return the bytes of each row's texts."""
    sizes = np.zeros(len(run), np.int64)
    for column in run.columns:
        if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
            sizes += pc.binary_length(column).fill_null(0).to_numpy()
    return sizes


def _sort_keys(run: pa.RecordBatch, sort_by: list[str]) -> pa.RecordBatch:
    keys = [
        run[name].indices if pa.types.is_dictionary(run[name].type) else run[name]
        for name in sort_by
    ]
    return pa.RecordBatch.from_arrays(keys, names=sort_by)


def _picked(runs: list[pa.RecordBatch], ends: np.ndarray, rows: np.ndarray) -> pa.RecordBatch:
    """Take rows by their number, counted through all runs."""
    if len(runs) == 1:
        return runs[0].take(pa.array(rows))
    run_of = np.searchsorted(ends, rows, side="right").astype(np.uint16)
    by_run = np.argsort(run_of, kind="stable")
    used, counts = np.unique(run_of, return_counts=True)
    parts = []
    for run, chosen in zip(used, np.split(rows[by_run], np.cumsum(counts)[:-1]), strict=True):
        first = ends[run] - len(runs[run])
        parts.append(runs[run].take(pa.array(chosen - first)))
    place = np.empty(len(rows), np.int64)
    place[by_run] = np.arange(len(rows))
    return concatenated(parts, runs[0].schema).take(pa.array(place))


def _with_constants(rows: pa.RecordBatch, constants: Mapping[str, str]) -> pa.RecordBatch:
    for name, value in constants.items():
        codes = pa.array(np.zeros(len(rows), np.int8))
        rows = rows.append_column(
            pa.field(name, pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.DictionaryArray.from_arrays(codes, pa.array([value], pa.string())),
        )
    return rows


def _mapped(path: str) -> pa.RecordBatch:
    with pa.memory_map(path) as file, pa.ipc.open_file(file) as run:
        return run.get_batch(0)


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
