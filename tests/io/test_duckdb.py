import hashlib
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import apache_beam as beam
import duckdb
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from beam_pipelines.io.duckdb import (
    WriteToDuckDB,
    create_events_view,
    create_table_sql,
    digest,
    merged,
    upsert_sql,
)
from beam_pipelines.io.lake import WriteLake
from beam_pipelines.model.batches import (
    BatchOf,
    batch_of_rows,
    empty_batch,
    one_of,
    shortened_field,
)
from beam_pipelines.model.records import TIMESTAMP
from beam_pipelines.model.span import spanned
from beam_pipelines.model.tables import Table
from beam_pipelines.model.windows import WindowPolicy
from tests.io.contract import LONG, Sink, TableContract, run, shortened_form
from tests.io.test_lake import ROWS, SHOP, Stream

VIEWS = Table(
    "views",
    pa.schema(
        [
            pa.field("window_start", TIMESTAMP, nullable=False),
            pa.field("page", pa.string(), nullable=False),
            pa.field("views", pa.int64(), nullable=False),
            pa.field("note", pa.string()),
        ]
    ),
    key=("window_start", "page"),
    merge={"views": "greatest"},
)

NINE = datetime(2026, 1, 5, 9, tzinfo=UTC)


def view(page, views, note=None):
    return {"window_start": NINE, "page": page, "views": views, "note": note}


def select(path, sql):
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.sql(sql).fetchall()


class DuckDBSink(Sink):
    def __init__(self, folder, table=VIEWS):
        self.path = folder / "out" / "results.duckdb"
        self.table = table
        self.given = [view(f"/{i}", i, "n") for i in range(9)]
        self.given.insert(4, view("/3", 8, "later"))  # repeats the key before it

    def elements(self, batch_rows):
        return [
            batch_of_rows(self.given[i : i + batch_rows], VIEWS.schema)
            for i in range(0, len(self.given), batch_rows)
        ]

    def nothing(self):
        return [empty_batch(VIEWS.schema)] * 2

    def hint(self):
        return BatchOf(self.table.schema)

    def write(self):
        return WriteToDuckDB(self.table, str(self.path))

    def stored(self):
        return digest(str(self.path), [VIEWS])

    def rows(self):
        return select(self.path, "SELECT page, views, note FROM views ORDER BY page")

    def expected_rows(self):
        rows = [(f"/{i}", i, "n") for i in range(9)]
        rows[3] = ("/3", 8, "later")
        return rows

    def with_keys(self, keys, batch_rows):
        self.given = [view(key, i) for i, key in enumerate(keys)]
        return self.elements(batch_rows)

    def keys(self):
        return sorted(row[0] for row in self.rows())

    def obstruct(self):
        self.path.mkdir(parents=True)

    def assert_closed(self):
        select(self.path, "SELECT 1")  # refused while a writing connection is open


class TestContract(TableContract):
    @pytest.fixture
    def sink(self, tmp_path):
        return DuckDBSink(tmp_path)


def write(path, *rows, table=VIEWS):
    sink = DuckDBSink(Path(path).parent, table)
    sink.path = path
    return run(sink, [batch_of_rows(rows, table.schema)])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.duckdb"


def test_keys_that_a_stage_before_has_shortened_are_stored_as_they_are(tmp_path):
    sink = DuckDBSink(tmp_path)
    marked = VIEWS.schema.set(1, shortened_field(VIEWS.schema.field("page"), 2_000))
    sink.hint = lambda: BatchOf(marked)
    short = shortened_form(LONG[0])
    made_by_hand = batch_of_rows([view(short, 1)], VIEWS.schema)
    run(sink, [batch_of_rows([view("/a", 1)], marked), made_by_hand])
    assert sink.keys() == ["/a", short]


def test_large_rows_of_a_bundle_are_upserted_before_they_are_too_many(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(
        "beam_pipelines.io.duckdb._OpenTable.upsert", lambda _, rows: written.append(len(rows))
    )
    monkeypatch.setattr("beam_pipelines.io.upsert.FLUSH_BYTES", 10_000)
    sink = DuckDBSink(tmp_path)
    sink.given = [view("/", i, "x" * 4_000) for i in range(5)] + [view("/", 9, "x" * 40_000)]
    run(sink, sink.elements(1))
    assert written == [2, 2, 1, 1]


def test_the_greatest_count_stays_and_the_last_note(path):
    write(path, view("/a", 5, "first"), view("/b", 1))
    write(path, view("/a", 3, "second"), view("/b", 2))
    assert select(path, "SELECT page, views, note FROM views ORDER BY page") == [
        ("/a", 5, "second"),
        ("/b", 2, None),
    ]


def test_rows_of_one_key_are_merged_within_a_batch(path):
    write(path, view("/a", 5, "first"), view("/a", 9, "second"), view("/a", 7, None))
    assert select(path, "SELECT views, note FROM views") == [(9, None)]


def test_a_table_of_keys_only_ignores_repeats(path):
    names = ["window_start", "page"]
    keys = Table("views", pa.schema([VIEWS.schema.field(name) for name in names]), tuple(names))
    row = {name: view("/a", 5)[name] for name in names}
    write(path, row, row, table=keys)
    write(path, row, table=keys)
    assert select(path, "SELECT page FROM views") == [("/a",)]


def test_tables_are_typed_and_keyed(path):
    write(path, view("/a", 5))
    columns = select(
        path,
        "SELECT column_name, data_type, is_nullable FROM information_schema.columns ORDER BY 1",
    )
    assert columns == [
        ("note", "VARCHAR", "YES"),
        ("page", "VARCHAR", "NO"),
        ("views", "BIGINT", "NO"),
        ("window_start", "TIMESTAMP WITH TIME ZONE", "NO"),
    ]
    assert select(path, "SELECT epoch_us(window_start) FROM views") == [
        (int(NINE.timestamp() * 1_000_000),)
    ]
    key = select(
        path,
        "SELECT constraint_column_names FROM duckdb_constraints() "
        "WHERE constraint_type = 'PRIMARY KEY'",
    )
    assert key == [(["window_start", "page"],)]


def test_names_may_be_words_of_sql(path):
    table = Table("order", pa.schema([pa.field("group", pa.int64(), nullable=False)]), ("group",))
    with duckdb.connect(str(path)) as connection:
        connection.execute(create_table_sql(table))
        connection.register("rows", pa.table({"group": [2, 1]}))
        connection.execute(upsert_sql(table, "rows"))
        assert connection.sql('SELECT * FROM "order" ORDER BY 1').fetchall() == [(1,), (2,)]


def test_a_bundle_larger_than_a_flush_is_complete(path, monkeypatch):
    monkeypatch.setattr("beam_pipelines.io.upsert.FLUSH_ROWS", 10)
    rows = [view(f"/{i % 30}", i) for i in range(45)]
    batches = [batch_of_rows(rows[i : i + 4], VIEWS.schema) for i in range(0, 45, 4)]
    sink = DuckDBSink(path.parent)
    sink.path = path
    assert run(sink, batches) == {"rows_written.views": 45}
    expected = sum(i if i + 30 >= 45 else i + 30 for i in range(30))
    assert select(path, "SELECT count(*), sum(views) FROM views") == [(30, expected)]


def test_merging_decodes_known_values():
    kind = one_of("kind", ("a", "b"))
    table = Table(
        "kinds", pa.schema([kind, pa.field("n", pa.int64())]), ("kind",), {"n": "greatest"}
    )
    rows = batch_of_rows([{"kind": "b", "n": 1}, {"kind": "b", "n": 2}], table.schema)
    assert merged(rows, table).to_pylist() == [{"kind": "b", "n": 2}]


def test_several_tables_share_one_file(path):
    other = Table("other", VIEWS.schema, VIEWS.key)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        rows = (
            pipeline
            | beam.Create([batch_of_rows([view("/a", 1)], VIEWS.schema)], reshuffle=False)
            | beam.Map(lambda batch: batch).with_output_types(BatchOf(VIEWS.schema))
        )
        _ = rows | "Views" >> WriteToDuckDB(VIEWS, str(path))
        _ = rows | "Other" >> WriteToDuckDB(other, str(path))
    assert select(path, "SELECT page FROM views UNION ALL SELECT page FROM other") == [
        ("/a",),
        ("/a",),
    ]


def test_a_file_open_in_another_process_is_named(path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import duckdb, sys\n"
            "connection = duckdb.connect(sys.argv[1])\n"
            "print('open', flush=True)\n"
            "input()",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(Exception, match=r"results\.duckdb is open in another process"):
            write(path, view("/a", 1))
        holder.communicate("\n")


def declared(schema, policy=None):
    rows = (
        beam.Pipeline()
        | beam.Create([])
        | beam.Map(lambda batch: batch).with_output_types(BatchOf(schema))
    )
    return rows if policy is None else rows | policy.into(lateness_s=0)


def test_batches_of_other_columns_are_refused():
    other = VIEWS.schema.remove(3)
    with pytest.raises(ValueError, match="table views takes columns"):
        _ = declared(other) | WriteToDuckDB(VIEWS, "unused")


def test_a_key_that_may_be_null_is_refused_when_the_pipeline_is_built():
    maybe = VIEWS.schema.set(1, pa.field("page", pa.string()))
    with pytest.raises(ValueError, match="key column 'page' may be null; declare it with nullable"):
        Table("views", maybe, VIEWS.key, VIEWS.merge)
    with pytest.raises(ValueError, match="table views takes columns"):  # which has it not null
        _ = declared(maybe) | WriteToDuckDB(VIEWS, "unused")


def test_column_types_without_a_counterpart_are_refused():
    table = Table("t", pa.schema([pa.field("blob", pa.binary(), nullable=False)]), ("blob",))
    with pytest.raises(ValueError, match="column 'blob' of type binary"):
        _ = declared(table.schema) | WriteToDuckDB(table, "unused")


def test_partial_counts_of_discarding_windows_are_refused():
    discarding = WindowPolicy.fixed(60, accumulating=False)
    with pytest.raises(ValueError, match="discarding"):
        _ = declared(VIEWS.schema, discarding) | WriteToDuckDB(VIEWS, "unused")
    emitted_once = Table("views", VIEWS.schema, VIEWS.key)
    _ = declared(VIEWS.schema, discarding) | WriteToDuckDB(emitted_once, "unused")
    _ = declared(VIEWS.schema, WindowPolicy.fixed(60)) | WriteToDuckDB(VIEWS, "unused")


def test_the_digest_tells_contents_apart_and_forgets_how_they_came(tmp_path):
    one, two, three = (tmp_path / f"{name}.duckdb" for name in ("one", "two", "three"))
    write(one, view("/a", 1), view("/b", 2, 'say "x",'))
    write(two, view("/b", 2, 'say "x",'))
    write(two, view("/a", 1))
    write(three, view("/a", 1), view("/b", 2, 'say "x"'))
    assert digest(str(one), [VIEWS]) == digest(str(two), [VIEWS])
    assert digest(str(one), [VIEWS]) != digest(str(three), [VIEWS])


def test_the_digest_is_that_of_the_rows_as_lines_in_key_order(path):
    write(path, view("/b", 2, "é"), view("/a", 1))
    lines = (
        "views\n"
        '{"window_start":1767603600000000,"page":"/a","views":1}\n'
        '{"window_start":1767603600000000,"page":"/b","views":2,"note":"é"}\n'
    )
    assert digest(str(path), [VIEWS]) == hashlib.sha256(lines.encode()).hexdigest()


def test_the_view_shows_each_accepted_event_once(tmp_path, path):
    lake = tmp_path / "lake [1]"
    stream = Stream(ROWS)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        _ = (
            pipeline
            | beam.Impulse()
            | beam.FlatMap(lambda _: stream.spans(4)).with_output_types(
                spanned(BatchOf(stream.schema))
            )
            | WriteLake(str(lake))
        )
    create_events_view(str(path), str(lake), SHOP)
    seen = {}
    for row in ROWS:  # stored in this order: the first copy wins
        if row["verdict"] in ("on_time", "late"):
            seen.setdefault(row["identity"], row["order_id"])
    assert len(seen) < len(ROWS)
    assert dict(select(path, "SELECT identity, order_id FROM events")) == seen
    assert select(path, "SELECT count(*) FROM events") == [(len(seen),)]
    [names] = select(path, "SELECT list(column_name) FROM (DESCRIBE events)")
    assert names == ([*SHOP.names, "identity", "event_date"],)


def test_the_view_of_an_empty_lake_is_empty(tmp_path, path):
    create_events_view(str(path), str(tmp_path / "nothing"), SHOP)
    assert select(path, "SELECT * FROM events") == []
    types = dict(select(path, "SELECT column_name, column_type FROM (DESCRIBE events)"))
    assert types == {
        "event_time": "TIMESTAMP WITH TIME ZONE",
        "order_id": "VARCHAR",
        "amount": "DOUBLE",
        "channel": "VARCHAR",
        "identity": "UBIGINT",
        "event_date": "DATE",
    }
