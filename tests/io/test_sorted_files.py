import json
from datetime import UTC, datetime, timedelta

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.io import sorted_files
from beam_pipelines.io.publication import remove_leftovers
from beam_pipelines.io.sorted_files import SLICE_ROWS, WriteSortedFiles, merged_runs
from beam_pipelines.model.batches import BatchOf, batch_of_rows, empty_batch, one_of
from beam_pipelines.model.records import IDENTITY, TIMESTAMP
from beam_pipelines.model.windows import WindowPolicy
from tests.io.contract import Sink, SinkContract, run

ORDERS = pa.schema(
    [
        pa.field("event_time", TIMESTAMP, nullable=False),
        pa.field("order_id", pa.string(), nullable=False),
        one_of("channel", ("web", "store")),
        pa.field("note", pa.string()),
        IDENTITY,
    ]
)
NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)


def order(number):
    return {
        "event_time": NOON + timedelta(seconds=number * 7 % 5),  # in no order, with repeats
        "order_id": f"o-{number}",
        "channel": "web" if number % 3 else "store",
        "note": 'say "hi"' if number % 4 == 0 else None,
        "identity": number * 0x9E3779B97F4A7C15 % 2**64,
    }


class SortedFilesSink(Sink):
    def __init__(self, folder, file_format, numbers=range(10), **settings):
        self.folder = folder / "orders"
        self.given = [order(number) for number in numbers]
        self.settings = {
            "format": file_format,
            "sort_by": ("event_time", "identity"),
            "sink": "orders",
            "shard_by": "identity",
            "shards": 3,
            "columns": ("event_time", "order_id", "channel", "note"),
            "constants": {"processing_time": "2026-01-05T13:00:00.000000Z"},
            **settings,
        }

    def elements(self, batch_rows):
        return [
            batch_of_rows(self.given[i : i + batch_rows], ORDERS)
            for i in range(0, len(self.given), batch_rows)
        ]

    def nothing(self):
        return [empty_batch(ORDERS)] * 2

    def hint(self):
        return BatchOf(ORDERS)

    def write(self):
        return WriteSortedFiles(str(self.folder), **self.settings)

    def files(self):
        return sorted(path for path in self.folder.glob("*") if path.is_file())

    def stored(self):
        return {path.name: path.read_bytes() for path in self.files()}

    def file_rows(self, path):
        if self.settings["format"] == "ndjson":
            return [json.loads(line) for line in path.read_text().splitlines()]
        return pq.ParquetFile(path).read().to_pylist()

    def rows(self):
        rows = [row for path in self.files() for row in self.file_rows(path)]
        return sorted(row["order_id"] for row in rows)

    def expected_rows(self):
        return sorted(row["order_id"] for row in self.given)

    def with_keys(self, keys, batch_rows):
        self.given = [{**order(i), "order_id": key} for i, key in enumerate(keys)]
        return self.elements(batch_rows)

    def keys(self):
        return self.rows()

    def key_of(self, key):
        return key

    def obstruct(self):
        self.folder.write_text("not a folder")

    def assert_closed(self):
        assert list(self.folder.glob("_tmp/*")) == []


@pytest.fixture
def sink(tmp_path):
    return SortedFilesSink(tmp_path, "ndjson")


class TestNdjsonContract(SinkContract):
    pass


class TestParquetContract(SinkContract):
    @pytest.fixture
    def sink(self, tmp_path):
        return SortedFilesSink(tmp_path, "parquet")


def shard_of(row):
    return (row["identity"] & 0xFFFF) % 3


def test_each_shard_is_a_sorted_file(sink):
    counters = run(sink, sink.elements(4))
    shards = {}
    for row in sorted(sink.given, key=lambda row: (row["event_time"], row["identity"])):
        line = {
            "event_time": row["event_time"].strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "order_id": row["order_id"],
            "channel": row["channel"],
            "note": row["note"],
            "processing_time": "2026-01-05T13:00:00.000000Z",
        }
        shards.setdefault(f"part-{shard_of(row):05}-of-00003.ndjson", []).append(
            {name: value for name, value in line.items() if value is not None}
        )
    assert len(shards) == 3
    assert {path.name: sink.file_rows(path) for path in sink.files()} == shards
    assert counters == {"rows_written.orders": 10}


def test_shards_without_rows_have_no_file(tmp_path):
    sink = SortedFilesSink(tmp_path, "ndjson", numbers=[1])
    run(sink, sink.elements(1))
    assert [path.name for path in sink.files()] == [f"part-{shard_of(order(1)):05}-of-00003.ndjson"]


def test_one_parquet_file_keeps_all_columns_in_order(tmp_path):
    sink = SortedFilesSink(
        tmp_path,
        "parquet",
        sort_by=("order_id",),
        shard_by=None,
        shards=1,
        columns=None,
        constants={},
    )
    run(sink, sink.elements(3))
    [path] = sink.files()
    assert path.name == "part-00000-of-00001.parquet"
    assert sink.file_rows(path) == sorted(sink.given, key=lambda row: row["order_id"])


def test_rows_that_do_not_fit_into_memory_are_spilled_and_merged(tmp_path, monkeypatch):
    at_once = SortedFilesSink(tmp_path / "at once", "ndjson", range(300))
    run(at_once, at_once.elements(300))
    monkeypatch.setattr("beam_pipelines.io.sorted_files.SPILL_BYTES", 500)
    monkeypatch.setattr("beam_pipelines.io.sorted_files.SLICE_ROWS", 7)
    spilled = SortedFilesSink(tmp_path / "spilled", "ndjson", range(299, -1, -1))
    run(spilled, spilled.elements(20))
    assert spilled.stored() == at_once.stored()
    assert spilled.rows() == spilled.expected_rows()


def test_merged_runs_are_sorted_across_slices():
    rng = np.random.default_rng(1)
    values = rng.permutation(2 * SLICE_ROWS + 100)
    runs = [
        pa.record_batch({"n": part, "text": pa.array(part.astype(str))})
        for part in np.array_split(values, 5)
    ]
    slices = list(merged_runs(runs, ["n"]))
    assert [len(rows) for rows in slices] == [SLICE_ROWS, SLICE_ROWS, 100]
    merged = pa.Table.from_batches(slices)
    assert merged["n"].to_pylist() == list(range(len(values)))
    assert merged["text"].to_pylist() == [str(n) for n in range(len(values))]


def test_the_names_of_the_files_come_out_also_for_windowed_rows(sink):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        names = (
            pipeline
            | beam.Impulse()
            | beam.FlatMap(lambda _: sink.elements(4)).with_output_types(sink.hint())
            | WindowPolicy.fixed(60).into(lateness_s=0)
            | sink.write()
        )
        assert_that(names, equal_to([f"part-{i:05}-of-00003.ndjson" for i in range(3)]))
    assert sink.rows() == sink.expected_rows()


def test_runs_of_a_crash_are_not_read_and_can_be_removed(sink):
    (sink.folder / "_tmp").mkdir(parents=True)
    (sink.folder / "_tmp" / "run.tmp").write_bytes(b"half a run")
    run(sink, sink.elements(4))
    assert sink.rows() == sink.expected_rows()
    remove_leftovers(sink.folder)
    assert not (sink.folder / "_tmp").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "csv"}, "not 'csv'"),
        ({"sort_by": ()}, "sort_by names no column"),
        ({"shards": 0}, "must be positive, got 0"),
        ({"shards": 2, "shard_by": None}, "no column to divide 2 shards"),
        ({"sort_by": ("nowhere",)}, "no column 'nowhere'"),
        ({"columns": ("nowhere",)}, "no column 'nowhere'"),
        ({"shard_by": "order_id"}, "not a uint64 hash"),
        ({"constants": {"note": "x"}}, "both columns and constants: note"),
        ({"columns": ("note",)}, "the first column of NDJSON, 'note', is nullable"),
    ],
)
def test_misuse_fails_at_construction(tmp_path, settings, message):
    sink = SortedFilesSink(tmp_path, **{"file_format": "ndjson"})
    sink.settings.update(settings)
    rows = (
        beam.Pipeline()
        | beam.Create([])
        | beam.Map(lambda batch: batch).with_output_types(BatchOf(ORDERS))
    )
    with pytest.raises(ValueError, match=message):
        _ = rows | sink.write()


def test_slices_are_bounded_by_bytes_whatever_the_runs(monkeypatch):
    monkeypatch.setattr("beam_pipelines.io.sorted_files.SLICE_BYTES", 1_000)
    sizes = [10, 985, 5, 1, 2_000, 400, None, 600, 1] + [0] * SLICE_ROWS
    texts = pa.array([None if size is None else "x" * size for size in sizes])
    rows = pa.RecordBatch.from_arrays([pa.array(range(len(sizes))), texts], ["n", "text"])
    cuts = [(0, 3), (3, 4), (4, 5), (5, 8), (8, 8 + SLICE_ROWS), (8 + SLICE_ROWS, len(sizes))]
    expected = [rows.slice(start, end - start) for start, end in cuts]
    for runs in ([rows], [rows.slice(6), rows.slice(0, 2), rows.slice(2, 4)]):
        found = list(merged_runs(runs, ["n"]))
        assert [slice_.to_pydict() for slice_ in found] == [s.to_pydict() for s in expected]


def test_a_run_is_written_before_it_has_too_many_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr("beam_pipelines.io.sorted_files.SPILL_BYTES", 10_000)
    written = []
    concatenated = sorted_files.concatenated

    def noted(batches, schema):
        written.append(len(batches))
        return concatenated(batches, schema)

    monkeypatch.setattr(sorted_files, "concatenated", noted)
    sink = SortedFilesSink(tmp_path, "ndjson", shards=1)
    sizes = [4_000, 4_000, 4_000, 50_000, 10]
    sink.given = [{**order(i), "note": "x" * size} for i, size in enumerate(sizes)]
    run(sink, sink.elements(1))
    assert written[:4] == [2, 1, 1, 1]
    assert sink.rows() == sink.expected_rows()
