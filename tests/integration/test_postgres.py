"""The Postgres sink against a server."""

import itertools
import random
import re
import select
import socket
import socketserver
import threading
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import psycopg
import pyarrow as pa
import pytest

from beam_pipelines.io.postgres import (
    Patience,
    PostgresTable,
    WriteToPostgres,
    check_postgres,
)
from beam_pipelines.kernels.texts import MAX_KEY_BYTES
from beam_pipelines.model.activity import TABLES
from beam_pipelines.model.batches import BatchOf, batch_of_rows, empty_batch
from beam_pipelines.model.records import TIMESTAMP
from beam_pipelines.model.secret import Secret
from beam_pipelines.model.tables import Table
from tests.io.contract import Sink, TableContract, run
from tests.io.test_duckdb import NINE, VIEWS, view

INIT_SQL = Path(__file__).parent.parent.parent / "init-db.sql"
DATABASE = Secret("env:TEST_DATABASE_URL")

CREATE_VIEWS = """
    CREATE TABLE views (
        window_start timestamptz NOT NULL, page text NOT NULL, views bigint NOT NULL, note text,
        PRIMARY KEY (window_start, page)
    )
"""


class Space:
    """A schema of its own in the server's database, and connections that see it alone."""

    numbers = itertools.count()

    def __init__(self, server_url):
        self.name = f"test_{next(self.numbers)}"
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {self.name}")
        self.url = self.with_settings(server_url)

    def with_settings(self, url, **settings):
        options = {"search_path": self.name, **settings}
        listed = quote(" ".join(f"-c {name}={value}" for name, value in options.items()))
        # Connections are found by their application_name.
        return f"{url}?options={listed}&application_name={self.name}"

    def execute(self, sql):
        """Return the rows that an outside reader finds."""
        with psycopg.connect(self.url, application_name="reader", autocommit=True) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else None

    def wait_until(self, sql):
        """Wait until the server says true: it goes on by itself after we have left it."""
        gives_up = time.monotonic() + 20
        while self.execute(sql) != [(True,)]:
            assert time.monotonic() < gives_up, sql
            time.sleep(0.01)


@pytest.fixture
def space(postgres, monkeypatch):
    space = Space(postgres)
    monkeypatch.setenv("TEST_DATABASE_URL", space.url)
    return space


@pytest.fixture
def views(space):
    space.execute(CREATE_VIEWS)
    return space


def stored_views(space):
    return space.execute("SELECT page, views, note FROM views ORDER BY page")


# What every sink promises


class PostgresSink(Sink):
    def __init__(self, space):
        self.space = space
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
        return BatchOf(VIEWS.schema)

    def write(self):
        return WriteToPostgres(VIEWS, DATABASE)

    def stored(self):
        return self.space.execute("SELECT ctid, xmin, * FROM views ORDER BY window_start, page")

    def rows(self):
        return stored_views(self.space)

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
        self.space.execute("DROP TABLE views")

    def assert_closed(self):
        self.space.wait_until(
            "SELECT count(*) = 0 FROM pg_stat_activity "
            f"WHERE application_name = '{self.space.name}'"
        )


class TestContract(TableContract):
    @pytest.fixture
    def sink(self, views):
        return PostgresSink(views)


# What is stored


@contextmanager
def opened(table=VIEWS, patience=None):
    with closing(PostgresTable(table, DATABASE, patience or Patience())) as stored:
        yield stored


def upsert(*rows, table=VIEWS):
    with opened(table) as stored:
        stored.upsert(batch_of_rows(rows, table.schema))


def test_the_greatest_count_stays_and_the_last_note(views):
    upsert(view("/a", 5, "first"), view("/b", 1))
    upsert(view("/a", 3, "second"), view("/b", 2))
    assert stored_views(views) == [("/a", 5, "second"), ("/b", 2, None)]


ONCE = Table("views", VIEWS.schema, VIEWS.key)
"""Rows that come once each: none of their columns grows."""


def test_rows_that_come_once_are_added_and_such_as_are_there_replaced(views):
    upsert(view("/c", 1, "n"), view("/a", 5, "first"), view("/b", 1), table=ONCE)
    before = dict(views.execute("SELECT page, xmin::text FROM views"))
    upsert(
        view("/d", 7), view("/b", 1), view("/a", 3, "second"), view("/a", 4, "third"), table=ONCE
    )
    assert stored_views(views) == [
        ("/a", 4, "third"),
        ("/b", 1, None),
        ("/c", 1, "n"),
        ("/d", 7, None),
    ]
    after = dict(views.execute("SELECT page, xmin::text FROM views"))
    assert {page for page in before if before[page] == after[page]} == {"/b", "/c"}


def test_a_table_that_refuses_a_row_for_another_reason_says_so(views, place):
    views.execute("CREATE UNIQUE INDEX ON views (views)")
    upsert(view("/a", 1), table=ONCE)
    with opened(ONCE, AT_ONCE) as stored, pytest.raises(RuntimeError) as raised:
        stored.upsert(batch_of_rows([view("/b", 1)], ONCE.schema))
    assert str(raised.value) == (
        f"could not write to table views of {place}: duplicate key value violates unique "
        'constraint "views_views_idx" (SQLSTATE 23505)'
    )


def test_rows_of_one_key_are_merged_within_a_batch(views):
    upsert(view("/a", 5, "first"), view("/a", 9, "second"), view("/a", 7, None))
    assert stored_views(views) == [("/a", 9, None)]


def test_a_row_that_would_stay_as_it_is_is_not_written(views):
    upsert(view("/a", 5, "n"), view("/b", 5))
    before = views.execute("SELECT page, ctid, xmin FROM views ORDER BY page")
    upsert(view("/a", 4, "n"), view("/b", 6))
    after = views.execute("SELECT page, ctid, xmin FROM views ORDER BY page")
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_table_of_keys_only_ignores_repeats(space):
    space.execute('CREATE TABLE "order" ("group" bigint PRIMARY KEY)')
    table = Table("order", pa.schema([pa.field("group", pa.int64(), nullable=False)]), ("group",))
    upsert({"group": 2}, {"group": 1}, {"group": 2}, table=table)
    upsert({"group": 1}, {"group": 3}, table=table)
    assert space.execute('SELECT * FROM "order" ORDER BY 1') == [(1,), (2,), (3,)]


def test_a_bundle_larger_than_a_flush_is_complete(views, monkeypatch):
    monkeypatch.setattr("beam_pipelines.io.upsert.FLUSH_ROWS", 10)
    rows = [view(f"/{i % 30}", i) for i in range(45)]
    batches = [batch_of_rows(rows[i : i + 4], VIEWS.schema) for i in range(0, 45, 4)]
    assert run(PostgresSink(views), batches) == {"rows_written.views": 45}
    expected = sum(i if i + 30 >= 45 else i + 30 for i in range(30))
    assert views.execute("SELECT count(*), sum(views) FROM views") == [(30, expected)]


def test_texts_are_stored_as_they_are(views):
    texts = [
        "",
        " ",
        "NULL",
        "\\N",
        "\\.",
        "a\n\\.\nb",
        'say "x"',
        '"',
        "a,b",
        "\r",
        "\r\n",
        "\t",
        "\\",
        "'",
        "é",
        "e\u0301",
        "🦆",
        "\u2028",
        "\x01",
        "\x7f",
        "\ufeff",
        "\ufffd",
        "\U0010ffff",
    ]
    upsert(*(view(text, 1, text) for text in texts))
    found = views.execute("SELECT page, note FROM views")
    assert sorted(found) == sorted((text, text) for text in texts)


def test_every_type_and_null_comes_back(space):
    space.execute(
        "CREATE TABLE t (id integer PRIMARY KEY, ok boolean, share double precision, "
        "big bigint, at timestamptz)"
    )
    schema = pa.schema(
        [
            pa.field("id", pa.int32(), nullable=False),
            pa.field("ok", pa.bool_()),
            pa.field("share", pa.float64()),
            pa.field("big", pa.int64()),
            pa.field("at", TIMESTAMP),
        ]
    )
    rows = [
        (1, True, 0.1 + 0.2, 2**63 - 1, NINE),
        (2, False, float("inf"), -(2**63), NINE.replace(microsecond=1)),
        (3, None, 5e-324, 0, None),
        (4, True, -1.7976931348623157e308, None, NINE),
        (5, None, None, None, None),
    ]
    upsert(
        *(dict(zip(schema.names, row, strict=True)) for row in rows),
        table=Table("t", schema, ("id",)),
    )
    assert space.execute("SELECT * FROM t ORDER BY id") == rows


MINUTE_US = 60_000_000


@pytest.mark.parametrize("time_zone", ["UTC", "Europe/Berlin", "Asia/Kathmandu"])
def test_times_are_exact_in_every_year_and_session(space, monkeypatch, postgres, time_zone):
    zoned = space.with_settings(postgres, TimeZone=time_zone)
    monkeypatch.setenv("TEST_DATABASE_URL", zoned)
    space.execute("CREATE TABLE times (at timestamptz PRIMARY KEY)")
    schema = pa.schema([pa.field("at", TIMESTAMP, nullable=False)])
    year_1, year_10000 = -62_135_596_800_000_000, 253_402_300_800_000_000
    given = sorted(
        [
            year_1 - 4 * MINUTE_US,  # where a sliding window begins
            year_1,
            year_1 + 1,
            -1,
            0,
            1,
            int(datetime(2026, 3, 29, 1, 30, tzinfo=UTC).timestamp()) * 1_000_000 + 999_999,
            int(datetime(2026, 10, 25, 0, 59, 59, tzinfo=UTC).timestamp()) * 1_000_000 + 1,
            year_10000 - 1,
            year_10000 + 4 * MINUTE_US,
        ]
    )
    rows = pa.record_batch([pa.array(given, pa.int64()).cast(TIMESTAMP)], schema)
    with opened(Table("times", schema, ("at",))) as stored:
        stored.upsert(rows)
    found = space.execute("SELECT (extract(epoch FROM at) * 1000000)::bigint FROM times ORDER BY 1")
    assert [at for (at,) in found] == given


def test_a_key_too_long_for_an_index_is_stored_shortened(views):
    long = random.Random(1).randbytes(16_000).hex()  # Postgres would compress what repeats
    upsert(view(long + "1", 1), view(long + "2", 2))
    upsert(view(long + "1", 3))
    found = views.execute(
        "SELECT left(page, 1000), octet_length(page), views FROM views ORDER BY 3"
    )
    assert found == [(long[:1000], MAX_KEY_BYTES, 2), (long[:1000], MAX_KEY_BYTES, 3)]


# What passes by itself


def forbid_waiting(seconds):
    raise AssertionError(f"waits {seconds} s for what will not pass")


AT_ONCE = Patience(sleep=forbid_waiting)


class Breaks:
    """Stands in for sleep: does something to the server or the clients instead."""

    def __init__(self, act=lambda: None):
        self.act = act
        self.taken = 0

    def __call__(self, seconds):
        self.taken += 1
        self.act()


def test_writers_of_the_same_rows_in_any_order_leave_the_greatest(views):
    def write(first):
        with opened() as stored:
            for round_ in range(20):
                pages = range(200) if (first + round_) % 2 else range(199, -1, -1)
                rows = [view(f"/{i}", (i * 7 + round_ * first) % 101) for i in pages]
                stored.upsert(batch_of_rows(rows, VIEWS.schema))

    writers = [threading.Thread(target=write, args=[first]) for first in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    greatest = {
        f"/{i}": max((i * 7 + r * first) % 101 for r in range(20) for first in (1, 2, 3))
        for i in range(200)
    }
    assert dict(views.execute("SELECT page, views FROM views")) == greatest


def test_a_connection_lost_between_bundles_is_made_again(views):
    pause = Breaks()
    with opened(patience=Patience(sleep=pause)) as stored:
        stored.upsert(batch_of_rows([view("/a", 1)], VIEWS.schema))
        views.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            f"WHERE application_name = '{views.name}'"
        )
        stored.upsert(batch_of_rows([view("/a", 2)], VIEWS.schema))
    assert pause.taken == 1
    assert stored_views(views) == [("/a", 2, None)]


def test_a_serialization_failure_is_tried_again(views, monkeypatch, postgres):
    strict = views.with_settings(postgres, default_transaction_isolation="serializable")
    monkeypatch.setenv("TEST_DATABASE_URL", strict)
    upsert(view("/a", 1))
    pause = Breaks()

    def write():
        with opened(patience=Patience(sleep=pause)) as stored:
            stored.upsert(batch_of_rows([view("/a", 5)], VIEWS.schema))

    writer = threading.Thread(target=write)
    with psycopg.connect(views.url, application_name="other") as other:
        other.execute("UPDATE views SET views = 3")
        writer.start()
        views.wait_until(
            "SELECT count(*) = 1 FROM pg_stat_activity "
            f"WHERE application_name = '{views.name}' AND wait_event_type = 'Lock'"
        )
    writer.join()
    assert pause.taken == 1
    assert stored_views(views) == [("/a", 5, None)]


class LosesOneAnswer(socketserver.BaseRequestHandler):
    """Stands between a client and the server; cuts the line once it has committed."""

    def handle(self):
        with socket.create_connection(self.server.target) as server:
            while True:
                for source in select.select([self.request, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (server if source is self.request else self.request).sendall(data)
                    if source is self.request and b"COMMIT\0" in data and not self.server.has_cut:
                        self.server.has_cut = True
                        assert server.recv(1 << 16)  # it is done, and nobody hears of it
                        return


def test_an_upsert_whose_commit_was_not_answered_is_repeated(views, monkeypatch):
    [host_and_port] = re.findall(r"@([^/]+)/", views.url)
    host, port = host_and_port.split(":")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), LosesOneAnswer) as proxy:
        proxy.target, proxy.has_cut = (host, int(port)), False
        threading.Thread(target=proxy.serve_forever, args=[0.01]).start()
        own = f"127.0.0.1:{proxy.server_address[1]}"
        monkeypatch.setenv("TEST_DATABASE_URL", views.url.replace(host_and_port, own))
        seen = []
        pause = Breaks(lambda: seen.append(stored_views(views)))
        with opened(patience=Patience(sleep=pause)) as stored:
            stored.upsert(batch_of_rows([view("/a", 1), view("/b", 2)], VIEWS.schema))
        proxy.shutdown()
    rows = [("/a", 1, None), ("/b", 2, None)]
    assert seen == [rows]  # it had been committed
    assert stored_views(views) == rows


def test_a_server_that_was_killed_is_waited_for(views, stack):
    restart = Breaks(lambda: stack.up("postgres"))
    with opened(patience=Patience(sleep=restart)) as stored:
        stored.upsert(batch_of_rows([view("/a", 1)], VIEWS.schema))
        stack.kill("postgres")
        stored.upsert(batch_of_rows([view("/a", 2), view("/b", 1)], VIEWS.schema))
    assert restart.taken == 1
    assert stored_views(views) == [("/a", 2, None), ("/b", 1, None)]


# What doesn't


def refused_upsert(message, *rows):
    """Assert that an upsert fails at once, with this message and nothing else to show."""
    with opened(patience=AT_ONCE) as stored, pytest.raises(RuntimeError) as raised:
        stored.upsert(batch_of_rows(rows or [view("/secret", 1)], VIEWS.schema))
    assert str(raised.value) == message
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None or raised.value.__suppress_context__


def refused_check(message, *tables):
    with pytest.raises(RuntimeError) as raised:
        check_postgres(DATABASE, tables or [VIEWS])
    assert str(raised.value) == message


@pytest.fixture
def place(stack):
    return f"database activity at 127.0.0.1:{stack.service('postgres').ports['sql']}"


def test_tables_as_declared_pass(views):
    check_postgres(DATABASE, [VIEWS])


def test_a_table_may_have_more_columns_and_a_covering_key(space):
    space.execute(
        """
        CREATE TABLE views (
            id bigserial, gone text, page text NOT NULL, note text, views bigint NOT NULL,
            window_start timestamptz NOT NULL, stored_at timestamptz DEFAULT now(),
            PRIMARY KEY (page, window_start) INCLUDE (views)
        );
        ALTER TABLE views DROP COLUMN gone
        """
    )
    check_postgres(DATABASE, [VIEWS])
    upsert(view("/a", 1))
    upsert(view("/a", 2, "n"))
    assert stored_views(space) == [("/a", 2, "n")]


def test_a_missing_table_is_named_at_once(space, place):
    message = f"table views does not exist in {place}: run init-db.sql"
    refused_upsert(message)
    refused_check(message)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("DROP COLUMN note", "column note of table views in {} is missing, not text"),
        (
            "ALTER window_start TYPE timestamp",
            "column window_start of table views in {} is timestamp without time zone, "
            "not timestamp with time zone",
        ),
        (
            "ALTER page TYPE varchar(100)",
            "column page of table views in {} is character varying(100), not text",
        ),
        ("ALTER views TYPE integer", "column views of table views in {} is integer, not bigint"),
        (
            "DROP CONSTRAINT views_pkey",
            "the primary key of table views in {} is (missing), not (window_start, page)",
        ),
        (
            "DROP CONSTRAINT views_pkey, ADD PRIMARY KEY (window_start, page, views)",
            "the primary key of table views in {} is (page, views, window_start), "
            "not (window_start, page)",
        ),
    ],
)
def test_a_table_that_differs_is_named_with_the_difference(views, place, change, difference):
    views.execute(f"ALTER TABLE views {change}")
    remedy = "alter it to what init-db.sql says, or drop it and run that"
    message = f"{difference.format(place)}; {remedy}"
    refused_upsert(message)
    refused_check(message)


def test_a_wrong_password_is_told_at_once_and_not_shown(views, place, monkeypatch):
    monkeypatch.setenv("TEST_DATABASE_URL", re.sub(r":[^:@/]+@", ":hunter2@", views.url))
    reason = (
        'connection failed: connection to server at "127.0.0.1", port '
        f'{place.split(":")[1]} failed: FATAL: password authentication failed for user "activity"'
    )
    refused_upsert(f"could not write to table views of {place}: {reason}")
    refused_check(f"can't use {place}, which env:TEST_DATABASE_URL names: {reason}")


def test_a_missing_database_is_told_at_once(views, place, monkeypatch):
    monkeypatch.setenv("TEST_DATABASE_URL", views.url.replace("/activity?", "/nowhere?"))
    with opened(patience=AT_ONCE) as stored, pytest.raises(RuntimeError) as raised:
        stored.upsert(batch_of_rows([view("/a", 1)], VIEWS.schema))
    assert str(raised.value).endswith('FATAL: database "nowhere" does not exist')


def test_a_missing_privilege_is_told_at_once(views, place):
    views.execute("REVOKE UPDATE ON views FROM activity")
    refused_upsert(
        f"could not write to table views of {place}: permission denied for table views "
        "(SQLSTATE 42501)"
    )


def test_a_refused_row_is_not_shown(views, place):
    views.execute("ALTER TABLE views ADD CONSTRAINT few CHECK (views < 9)")
    refused_upsert(
        f"could not write to table views of {place}: new row for relation "
        '"views" violates check constraint "few" (SQLSTATE 23514)',
        view("/fine", 1),
        view("/secret", 10),
    )
    assert stored_views(views) == []  # all or none
    upsert(view("/fine", 1))
    assert stored_views(views) == [("/fine", 1, None)]


# init-db.sql


@pytest.fixture
def activity(space):
    for _ in range(2):  # running it again changes nothing
        with psycopg.connect(space.url) as connection:
            connection.execute("SET client_min_messages = warning")
            connection.execute(INIT_SQL.read_text())
    return space


EXAMPLES = {pa.string(): "x", pa.int64(): 1, pa.float64(): 1.5, TIMESTAMP: NINE}


def test_init_db_sql_makes_what_the_pipeline_writes_to(activity):
    check_postgres(DATABASE, TABLES)
    for table in TABLES:
        row = {column.name: EXAMPLES[column.type] for column in table.schema}
        upsert(row, row, table=table)
        assert activity.execute(f"SELECT * FROM {table.name}") == [tuple(row.values())]


QUERIES = re.findall(r"--   (SELECT(?:[^;]|\n)*;)", INIT_SQL.read_text())

ROWS = """
    INSERT INTO page_view_counts
    SELECT start, start + interval '1 minute', '/' || page, page
    FROM generate_series(now() - interval '1 day', now(), interval '1 minute') AS start,
        generate_series(1, 30) AS page;
    INSERT INTO active_users
    SELECT start, start + interval '5 minutes', 10
    FROM generate_series(now() - interval '30 days', now(), interval '1 minute') AS start;
    INSERT INTO user_sessions
    SELECT 'u-' || number % 5000, now() - number * interval '10 s', now() - number * interval '9 s',
        number, 1, 1, 'timeout'
    FROM generate_series(1, 40000) AS number;
    ANALYZE
"""


def test_the_queries_people_ask_use_an_index(activity):
    activity.execute(ROWS)
    used = []
    for query in QUERIES:
        plan = "\n".join(line for (line,) in activity.execute(f"EXPLAIN {query.replace('--', '')}"))
        assert "Seq Scan" not in plan, plan
        used += re.findall(r"using (\w+)|Index Scan on (\w+)", plan)
        assert activity.execute(query.replace("--", "")), query
    assert ["".join(names) for names in used] == [
        "page_view_counts_pkey",
        "active_users_pkey",
        "user_sessions_pkey",
        "user_sessions_session_end",
    ]
