import math
import socket
import struct
from datetime import UTC, datetime
from pathlib import Path

import apache_beam as beam
import duckdb
import psycopg
import pyarrow as pa
import pytest

from beam_pipelines.io.duckdb import create_table_sql, merged
from beam_pipelines.io.patience import Patience
from beam_pipelines.io.postgres import (
    PostgresTable,
    WriteToPostgres,
    check_postgres,
    is_transient,
    merge_sql,
)
from beam_pipelines.io.postgres_copy import copied
from beam_pipelines.kernels.texts import MAX_KEY_BYTES
from beam_pipelines.model.activity import TABLES
from beam_pipelines.model.batches import BatchOf, batch_of_rows, one_of
from beam_pipelines.model.records import TIMESTAMP
from beam_pipelines.model.secret import MissingSecret, Secret
from beam_pipelines.model.tables import Table
from beam_pipelines.model.windows import WindowPolicy
from tests.io.contract import LONG, shortened_form
from tests.io.test_duckdb import VIEWS, view

INIT_SQL = Path(__file__).parent.parent.parent / "init-db.sql"


# What is sent


def sent(table, *rows):
    """What COPY reads of rows, by the manual: the bytes of each value, None for null."""
    data = copied(merged(batch_of_rows(rows, table.schema), table), table)
    assert data[:19] == b"PGCOPY\n\xff\r\n\0" + bytes(8)
    read, at = [], 19
    while (values := struct.unpack_from(">h", data, at)[0]) != -1:
        at, row = at + 2, []
        for _ in range(values):
            (length,) = struct.unpack_from(">i", data, at)
            row.append(None if length == -1 else data[at + 4 : at + 4 + length])
            at += 4 + max(length, 0)
        read.append(tuple(row))
    assert at + 2 == len(data)
    return read


def test_times_are_sent_as_microseconds_since_2000_and_nulls_as_such():
    start_us = (datetime(2026, 1, 5, 9, tzinfo=UTC) - datetime(2000, 1, 1, tzinfo=UTC)).days
    start_us = (start_us * 24 + 9) * 3_600_000_000
    assert sent(VIEWS, view("/a", 5), view("/b", 6, "")) == [
        (struct.pack(">q", start_us), b"/a", struct.pack(">q", 5), None),
        (struct.pack(">q", start_us), b"/b", struct.pack(">q", 6), b""),
    ]


def test_without_rows_there_is_a_header_and_a_trailer():
    assert sent(VIEWS) == []


def test_texts_are_sent_as_they_are():
    nasty = 'say "x",\r\n\\.\n é'
    [(_, page, _, _)] = sent(VIEWS, view(nasty, 1))
    assert page.decode() == nasty


def test_every_other_type_is_sent_as_postgres_reads_it():
    schema = pa.schema(
        [
            pa.field("id", pa.int32(), nullable=False),
            pa.field("ok", pa.bool_()),
            pa.field("share", pa.float64()),
            pa.field("count", pa.int64()),
            pa.field("at", TIMESTAMP),
        ]
    )
    table = Table("t", schema, key=("id",))
    rows = [
        {"id": 1, "ok": True, "share": 0.1, "count": None, "at": None},
        {"id": -2, "ok": False, "share": float("inf"), "count": -(2**63), "at": None},
        {"id": 3, "ok": None, "share": float("nan"), "count": 2**63 - 1, "at": None},
        {"id": 4, "ok": None, "share": None, "count": 0, "at": datetime(2000, 1, 1, tzinfo=UTC)},
    ]
    kinds = (">i", ">?", ">d", ">q", ">q")
    read = [
        tuple(
            None if value is None else struct.unpack(kind, value)[0]
            for kind, value in zip(kinds, row, strict=True)
        )
        for row in sent(table, *rows)
    ]
    assert math.isnan(read[2][2])
    assert [(*row[:2], *row[3:]) for row in read] == [
        (1, True, None, None),
        (-2, False, -(2**63), None),
        (3, None, 2**63 - 1, None),
        (4, None, 0, 0),
    ]
    assert [row[2] for row in read if row[0] != 3] == [0.1, float("inf"), None]


def test_a_key_too_long_for_an_index_is_shortened_to_a_text_of_its_own():
    fits = "/" + "a" * (MAX_KEY_BYTES - 1)
    long = ["/" + "é" * MAX_KEY_BYTES + end for end in "xy"]
    rows = sent(VIEWS, view(fits, 1), *(view(page, 2) for page in long))
    pages = [page.decode() for _, page, _, _ in rows]
    assert pages[0] == fits
    assert pages[1] != pages[2]
    for page in pages[1:]:
        beginning, digest = page.split("…sha256:")
        assert beginning == "/" + "é" * ((MAX_KEY_BYTES - 74) // 2 - 1)
        assert len(digest) == 64
        assert MAX_KEY_BYTES - 2 <= len(page.encode()) <= MAX_KEY_BYTES


def test_a_long_key_and_the_text_it_is_shortened_to_are_two_rows():
    rows = sent(VIEWS, view(LONG[0], 5), view(shortened_form(LONG[0]), 3), view(LONG[0], 4))
    pages = {page.decode(): int.from_bytes(views) for _, page, views, _ in rows}
    assert pages == {
        shortened_form(LONG[0]): 5,
        shortened_form(shortened_form(LONG[0])): 3,
    }
    assert len(rows) == 2


def test_only_the_key_is_shortened_and_its_texts_share_the_room():
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("a", "b", "rest")])
    table = Table("t", schema, key=("a", "b"))
    [values] = sent(table, dict.fromkeys(schema.names, "x" * 5000))
    assert [len(value) for value in values] == [1000, 1000, 5000]


def test_rows_that_would_stay_as_they_are_are_not_written():
    assert merge_sql(VIEWS) == (
        'INSERT INTO "views" ("window_start", "page", "views", "note") '
        'SELECT "window_start", "page", "views", "note" FROM beam_incoming '
        'ORDER BY "window_start", "page" ON CONFLICT ("window_start", "page") '
        'DO UPDATE SET "views" = greatest("views"."views", excluded."views"), '
        '"note" = excluded."note" '
        'WHERE ("views"."views", "views"."note") IS DISTINCT FROM '
        '(greatest("views"."views", excluded."views"), excluded."note")'
    )
    keys = Table("keys", pa.schema([pa.field("id", pa.int64(), nullable=False)]), ("id",))
    assert merge_sql(keys) == (
        'INSERT INTO "keys" ("id") SELECT "id" FROM beam_incoming '
        'ORDER BY "id" ON CONFLICT ("id") DO NOTHING'
    )


# What is refused when the pipeline is built


def declared(schema, policy=None):
    rows = (
        beam.Pipeline()
        | beam.Create([])
        | beam.Map(lambda batch: batch).with_output_types(BatchOf(schema))
    )
    return rows if policy is None else rows | policy.into(lateness_s=0)


DATABASE = Secret("env:TEST_DATABASE_URL")


def test_batches_of_other_columns_are_refused():
    with pytest.raises(ValueError, match="table views takes columns"):
        _ = declared(VIEWS.schema.remove(3)) | WriteToPostgres(VIEWS, DATABASE)


def test_column_types_without_a_counterpart_are_refused():
    table = Table("t", pa.schema([pa.field("blob", pa.binary(), nullable=False)]), ("blob",))
    with pytest.raises(ValueError, match="column 'blob' of type binary has no Postgres type"):
        _ = declared(table.schema) | WriteToPostgres(table, DATABASE)


def test_known_values_are_stored_as_texts():
    table = Table("t", pa.schema([one_of("kind", ("a", "b"))]), ("kind",))
    _ = declared(table.schema) | WriteToPostgres(table, DATABASE)


def test_partial_counts_of_discarding_windows_are_refused():
    discarding = WindowPolicy.fixed(60, accumulating=False)
    with pytest.raises(ValueError, match="discarding"):
        _ = declared(VIEWS.schema, discarding) | WriteToPostgres(VIEWS, DATABASE)
    emitted_once = Table("views", VIEWS.schema, VIEWS.key)
    _ = declared(VIEWS.schema, discarding) | WriteToPostgres(emitted_once, DATABASE)
    _ = declared(VIEWS.schema, WindowPolicy.fixed(60)) | WriteToPostgres(VIEWS, DATABASE)


# Patience


class Time:
    """A clock that moves only by sleeping, and by what an attempt takes."""

    def __init__(self):
        self.now_s = 1000.0
        self.slept_s = []

    def sleep(self, seconds):
        self.slept_s.append(seconds)
        self.now_s += seconds

    def patience(self, **settings):
        return Patience(clock=lambda: self.now_s, sleep=self.sleep, **settings)


@pytest.fixture
def time():
    return Time()


def failing(errors):
    """Return an attempt that raises these errors, then succeeds."""
    left = list(errors)

    def attempt():
        if left:
            raise left.pop(0)

    return attempt


def test_waits_double_up_to_the_longest_and_half_of_each_is_chance(time):
    patience = time.patience(limit_s=1000, first_wait_s=1, longest_wait_s=6)
    patience.repeat(failing([OSError() for _ in range(20)]), lambda error: True)
    shares = [slept / wait for slept, wait in zip(time.slept_s, [1, 2, 4, *[6] * 17], strict=True)]
    assert all(0.5 <= share <= 1 for share in shares)
    assert len(set(shares)) == 20


def test_what_succeeds_at_once_waits_for_nothing(time):
    time.patience().repeat(failing([]), lambda error: False)
    assert time.slept_s == []


def test_what_will_not_pass_is_raised_at_once(time):
    with pytest.raises(OSError, match="for good"):
        time.patience().repeat(failing([OSError("for good")]), lambda error: False)
    assert time.slept_s == []


def test_the_last_attempt_is_at_the_limit_and_its_error_is_raised(time):
    errors = [OSError(i) for i in range(1000)]
    begun_s = []
    attempt = failing(errors)

    def timed():
        begun_s.append(time.now_s - 1000)
        attempt()

    with pytest.raises(OSError) as raised:
        time.patience(limit_s=90).repeat(timed, lambda error: True)
    assert raised.value is errors[len(begun_s) - 1]
    assert begun_s[-1] <= 90
    assert len(begun_s) >= 90 / 5


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.DeadlockDetected(),
        psycopg.errors.SerializationFailure(),
        psycopg.errors.AdminShutdown(),
        psycopg.errors.CannotConnectNow(),
        psycopg.errors.TooManyConnections(),
        psycopg.errors.ConnectionFailure(),
        psycopg.OperationalError("server closed the connection unexpectedly"),
        psycopg.OperationalError("connection failed: FATAL:  the database system is starting up"),
        psycopg.OperationalError("connection failed: Connection refused"),
        psycopg.errors.ConnectionTimeout("connection timeout expired"),
        psycopg.OperationalError("failed to resolve host 'db': Name or service not known"),
    ],
    ids=repr,
)
def test_errors_that_pass(error):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.InvalidPassword(),
        psycopg.errors.UndefinedTable(),
        psycopg.errors.UndefinedColumn(),
        psycopg.errors.NotNullViolation(),
        psycopg.errors.DiskFull(),
        psycopg.OperationalError('FATAL:  password authentication failed for user "me"'),
        psycopg.OperationalError('FATAL:  role "me" does not exist'),
        psycopg.OperationalError('FATAL:  database "nowhere" does not exist'),
        psycopg.OperationalError("fe_sendauth: no password supplied"),
        psycopg.OperationalError('FATAL:  no pg_hba.conf entry for host "10.0.0.1"'),
        psycopg.OperationalError("SSL error: certificate verify failed"),
        ValueError("connection refused"),
    ],
    ids=repr,
)
def test_errors_that_stay(error):
    assert not is_transient(error)


# Secrets and servers that aren't there


@pytest.fixture
def closed_port():
    with socket.socket() as taken:  # bound, and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_server_that_is_down_is_waited_for_and_then_named(monkeypatch, time, closed_port, caplog):
    url = f"postgresql://me:hunter2@127.0.0.1:{closed_port}/activity"
    monkeypatch.setenv("TEST_DATABASE_URL", url)
    table = PostgresTable(VIEWS, DATABASE, time.patience(limit_s=3, longest_wait_s=1))
    with pytest.raises(RuntimeError) as raised:
        table.upsert(batch_of_rows([view("/a", 1)], VIEWS.schema))
    place = f"database activity at 127.0.0.1:{closed_port}"
    assert str(raised.value).startswith(f"could not write to table views of {place}: ")
    assert "Connection refused" in str(raised.value)
    assert sum(time.slept_s) == pytest.approx(3)
    assert len(caplog.messages) == len(time.slept_s)
    assert all(line.startswith(f"Trying again to write to {place}: ") for line in caplog.messages)
    assert "hunter2" not in f"{raised.value!r}{raised.value.__cause__!r}{caplog.text}"
    assert raised.value.__suppress_context__


def test_the_check_asks_once_and_names_where_the_url_is_found(monkeypatch, closed_port):
    monkeypatch.setenv("TEST_DATABASE_URL", f"postgresql://me:hunter2@127.0.0.1:{closed_port}/x")
    with pytest.raises(RuntimeError) as raised:
        check_postgres(DATABASE, [VIEWS])
    assert str(raised.value).startswith(
        f"can't use database x at 127.0.0.1:{closed_port}, which env:TEST_DATABASE_URL names: "
    )
    assert "Connection refused" in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_a_missing_secret_is_reported_before_the_first_row(monkeypatch):
    monkeypatch.delenv("TEST_DATABASE_URL", raising=False)
    with pytest.raises(MissingSecret, match="variable TEST_DATABASE_URL is not set"):
        PostgresTable(VIEWS, DATABASE, Patience())
    with pytest.raises(MissingSecret, match="variable TEST_DATABASE_URL is not set"):
        check_postgres(DATABASE, [VIEWS])


@pytest.mark.parametrize(
    "url",
    [
        "hunter2",
        "mysql://me:hunter2@db/activity",
        "postgresql+psycopg://me:hunter2@db/activity",
        "postgresql://me:hunter2@2@db/activity",
        "postgresql://me:hunter2/2@db/activity",
        "postgresql://me:hunter2?2@db/activity",
        "postgresql://me:hunter2%zz@db/activity",
        "postgresql://me:hunter2",
        "postgresql://me:hunter2@db/activity?hunter2=1",
        "host=db password=hunter2",
    ],
)
def test_what_is_no_url_is_refused_without_showing_it(monkeypatch, url):
    monkeypatch.setenv("TEST_DATABASE_URL", url)
    with pytest.raises(ValueError, match="env:TEST_DATABASE_URL holds no URL such as") as refused:
        PostgresTable(VIEWS, DATABASE, Patience())
    assert "hunter2" not in f"{refused.value!r}{refused.value.__cause__!r}"
    assert refused.value.__suppress_context__


# init-db.sql


def described(connection):
    columns = connection.sql(
        "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns"
    )
    keys = connection.sql(
        "SELECT table_name, constraint_column_names FROM duckdb_constraints() "
        "WHERE constraint_type = 'PRIMARY KEY'"
    )
    return sorted(columns.fetchall()), sorted(keys.fetchall())


def test_init_db_sql_makes_the_tables_of_activity():
    with duckdb.connect() as declared_tables, duckdb.connect() as made:
        for table in TABLES:
            declared_tables.execute(create_table_sql(table))
        for statement in made.extract_statements(INIT_SQL.read_text()):
            own = statement.type is duckdb.StatementType.ALTER or " brin " in statement.query
            if not own:  # storage and a kind of index, which are Postgres' own
                made.execute(statement)
        assert described(made) == described(declared_tables)


def test_init_db_sql_can_run_again():
    commands = [line for line in INIT_SQL.read_text().splitlines() if line.startswith("CREATE")]
    assert len(commands) == len(TABLES) + 1
    assert all(" IF NOT EXISTS " in command for command in commands)


def test_the_smallest_and_greatest_times_have_a_counterpart():
    schema = pa.schema([pa.field("at", TIMESTAMP, nullable=False)])
    times_us = [-(2**62), 2**62]
    rows = pa.table({"at": pa.array(times_us, pa.int64()).cast(TIMESTAMP)}, schema)
    encoded = copied(rows, Table("t", schema, ("at",)))
    since_2000 = [time - 946_684_800_000_000 for time in times_us]
    assert struct.unpack(">19shiqhiqh", encoded)[3::3] == tuple(since_2000)
