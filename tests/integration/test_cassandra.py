"""The Cassandra sink against a server."""

import gc
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from cassandra import ConsistencyLevel
from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
from cassandra.policies import RoundRobinPolicy

from beam_pipelines.io.cassandra import cluster as cluster_module
from beam_pipelines.io.cassandra import encoding
from beam_pipelines.io.cassandra.cluster import CassandraError, check_cassandra, parse_cluster
from beam_pipelines.io.cassandra.tables import CassandraTable, DayOf, MicrosOf
from beam_pipelines.io.cassandra.write import CassandraWriter, WriteToCassandra
from beam_pipelines.io.patience import Patience
from beam_pipelines.kernels.texts import MAX_KEY_BYTES
from beam_pipelines.model.activity import ACTIVITY, PAGE_VIEW_COUNTS
from beam_pipelines.model.batches import BatchOf, batch_of_rows, empty_batch
from beam_pipelines.model.records import event_schema
from beam_pipelines.model.secret import Secret
from stack.cassandra import statements
from stack.settings import REPOSITORY
from tests.io.contract import Sink, TableContract, run

NINE = datetime(2026, 1, 5, 9, tzinfo=UTC)

EVENTS_BY_USER = CassandraTable(
    "events_by_user",
    event_schema(ACTIVITY),
    columns={
        "user_id": "user_id",
        "day": DayOf("event_time"),
        "event_time": "event_time",
        "micros": MicrosOf("event_time"),
        "identity": "identity",
        "page_url": "page_url",
        "event_type": "event_type",
        "event_id": "event_id",
    },
    partition_key=("user_id", "day"),
    clustering_key=("event_time", "micros", "identity"),
)

PAGE_VIEWS_BY_PAGE = CassandraTable(
    "page_views_by_page",
    PAGE_VIEW_COUNTS.schema,
    columns={
        "page_url": "page_url",
        "day": DayOf("window_start"),
        "window_start": "window_start",
        "window_end": "window_end",
        "views": "views",
    },
    partition_key=("page_url", "day"),
    clustering_key=("window_start", "window_end"),
    greatest=("window_start", "views"),
)


class Keyspace:
    """A keyspace with the tables of the repository, and a session to look at them."""

    def __init__(self, address, session):
        self.cluster = parse_cluster(address)
        self.session = session

    def select(self, cql):
        return [tuple(row) for row in self.session.execute(cql)]

    def writer(self, table, **options):
        return CassandraWriter(table, self.cluster, Patience(**options))


@pytest.fixture(scope="session")
def session_of_server(cassandra):
    cluster = parse_cluster(cassandra)
    profile = ExecutionProfile(
        load_balancing_policy=RoundRobinPolicy(),
        consistency_level=ConsistencyLevel.ONE,
        request_timeout=60,
    )
    driver = Cluster(
        list(cluster.contact_points),
        port=cluster.port,
        protocol_version=4,
        execution_profiles={EXEC_PROFILE_DEFAULT: profile},
    )
    session = driver.connect()
    for statement in statements((REPOSITORY / "sql/cassandra.cql").read_text()) * 2:
        session.execute(statement)  # may be run as often as one likes
    session.set_keyspace("activity")
    yield cassandra, session
    driver.shutdown()


@pytest.fixture
def keyspace(session_of_server):
    address, session = session_of_server
    for table in (EVENTS_BY_USER, PAGE_VIEWS_BY_PAGE):
        session.execute(f"TRUNCATE {table.name}")
    return Keyspace(address, session)


def view(page, views, start=NINE):
    end = start + timedelta(minutes=1)
    return {"window_start": start, "window_end": end, "page_url": page, "views": views}


def event(user, at, identity, **fields):
    given = {"user_id": user, "event_time": at, "identity": identity, "page_url": "/a"}
    return {**given, "event_type": "click", **fields}


def views_of(*rows):
    return batch_of_rows(rows, PAGE_VIEWS_BY_PAGE.schema)


class CassandraSink(Sink):
    def __init__(self, keyspace):
        self.keyspace = keyspace
        self.cluster = keyspace.cluster
        self.given = [view(f"/{i}", i) for i in range(9)]
        self.given.insert(4, view("/3", 8))  # repeats the key before it

    def elements(self, batch_rows):
        parts = range(0, len(self.given), batch_rows)
        return [views_of(*self.given[i : i + batch_rows]) for i in parts]

    def nothing(self):
        return [empty_batch(PAGE_VIEWS_BY_PAGE.schema)] * 2

    def hint(self):
        return BatchOf(PAGE_VIEWS_BY_PAGE.schema)

    def write(self):
        return WriteToCassandra(PAGE_VIEWS_BY_PAGE, self.cluster, Patience(limit_s=20))

    def stored(self):
        return sorted(self.keyspace.select("SELECT page_url, day, views FROM page_views_by_page"))

    def rows(self):
        return sorted(self.keyspace.select("SELECT page_url, views FROM page_views_by_page"))

    def expected_rows(self):
        return [(f"/{i}", 8 if i == 3 else i) for i in range(9)]

    def with_keys(self, keys, batch_rows):
        self.given = [view(key, i) for i, key in enumerate(keys)]
        return self.elements(batch_rows)

    def keys(self):
        return sorted(row[0] for row in self.rows())

    def obstruct(self):
        self.cluster = parse_cluster(self.cluster.address.replace("/activity", "/nowhere"))

    def assert_closed(self):
        gc.collect()
        assert list(cluster_module._open) == []
        threads = [t.name for t in threading.enumerate() if "Task Scheduler" in t.name]
        assert len(threads) <= 1  # of the session that looks


class TestContract(TableContract):
    @pytest.fixture
    def sink(self, keyspace):
        return CassandraSink(keyspace)


@pytest.mark.parametrize("order", [(3, 9, 7), (9, 7, 3), (7, 3, 9)])
def test_the_greatest_count_stays_in_whatever_order_counts_come(keyspace, order):
    writer = keyspace.writer(PAGE_VIEWS_BY_PAGE)
    for views in order:
        writer.upsert(views_of(view("/a", views)))
    assert keyspace.select(
        "SELECT day, window_start, window_end, views FROM page_views_by_page "
        "WHERE page_url = '/a' AND day = '2026-01-05'"
    ) == [(NINE.date(), NINE.replace(tzinfo=None), datetime(2026, 1, 5, 9, 1), 9)]


def test_the_windows_of_a_page_are_rows_newest_first(keyspace):
    starts = [NINE, NINE + timedelta(hours=1), NINE + timedelta(days=1)]
    keyspace.writer(PAGE_VIEWS_BY_PAGE).upsert(
        views_of(*(view("/a", i, start) for i, start in enumerate(starts)), view("/b", 7))
    )
    assert keyspace.select(
        "SELECT views FROM page_views_by_page WHERE page_url = '/a' AND day = '2026-01-05'"
    ) == [(1,), (0,)]


def test_events_of_a_user_are_newest_first_to_the_microsecond(keyspace):
    times = [NINE + timedelta(microseconds=us) for us in (999, 1_000, 1_001, 500)]
    rows = [event("ann", at, 2**63 + i, event_id=f"e{i}") for i, at in enumerate(times)]
    other = [event("ann", NINE + timedelta(days=1), 1), event("bob", NINE, 2, event_id=None)]
    keyspace.writer(EVENTS_BY_USER).upsert(batch_of_rows(rows + other, EVENTS_BY_USER.schema))
    found = keyspace.select(
        "SELECT event_time, micros, identity, page_url, event_type, event_id FROM events_by_user "
        "WHERE user_id = 'ann' AND day = '2026-01-05'"
    )
    nine = NINE.replace(tzinfo=None)
    one_ms = nine + timedelta(milliseconds=1)
    assert found == [
        (one_ms, 1, 2 - 2**63, "/a", "click", "e2"),
        (one_ms, 0, 1 - 2**63, "/a", "click", "e1"),
        (nine, 999, -(2**63), "/a", "click", "e0"),
        (nine, 500, 3 - 2**63, "/a", "click", "e3"),
    ]
    [(none, tombstone)] = keyspace.select(
        "SELECT event_id, writetime(event_id) FROM events_by_user "
        "WHERE user_id = 'bob' AND day = '2026-01-05'"
    )
    assert (none, tombstone) == (None, None)


def test_many_rows_and_very_long_texts_arrive_whole(keyspace):
    rng = np.random.default_rng(4)
    n = 30_000
    rows = [
        event(f"user-{user}", NINE + timedelta(milliseconds=i), i, event_id=f"{i:032x}")
        for i, user in enumerate(rng.integers(0, 300, n).tolist())
    ]
    rows[7]["page_url"] = "/" + "x" * 500_000
    rows[8]["user_id"] = "u" * 100_000
    result = run(
        _Events(keyspace), [batch_of_rows(rows[i : i + 4_000], EVENTS_BY_USER.schema)
        for i in range(0, n, 4_000)]
    )  # fmt: skip
    assert result == {"rows_written.events_by_user": n}
    found = keyspace.select("SELECT identity, user_id, page_url, event_id FROM events_by_user")
    stored = {identity: (user, page, key) for identity, user, page, key in found}
    assert len(found) == n
    assert stored[8][0].startswith("uuu")
    assert len(stored[8][0]) == MAX_KEY_BYTES - len("…".encode()) + 1
    del stored[8]
    assert stored == {
        row["identity"]: (row["user_id"], row["page_url"], row["event_id"])
        for row in rows
        if row["identity"] != 8
    }


class _Events:
    def __init__(self, keyspace):
        self.keyspace = keyspace

    def hint(self):
        return BatchOf(EVENTS_BY_USER.schema)

    def write(self):
        return WriteToCassandra(EVENTS_BY_USER, self.keyspace.cluster)


def test_batches_that_the_server_finds_too_large_are_divided(keyspace, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 1_000_000)
    monkeypatch.setattr(encoding, "BATCH_ROWS", 65_000)
    rows = [view(f"/{i}{'x' * 500}", 1) for i in range(2_000)]  # 1 MB
    keyspace.writer(PAGE_VIEWS_BY_PAGE).upsert(views_of(*rows))
    assert keyspace.select("SELECT count(*) FROM page_views_by_page") == [(2_000,)]


def test_tables_as_the_repository_makes_them_pass_the_check(keyspace):
    check_cassandra(keyspace.cluster, [EVENTS_BY_USER, PAGE_VIEWS_BY_PAGE])


@contextmanager
def altered(keyspace, create):
    keyspace.session.execute("DROP TABLE IF EXISTS other")
    keyspace.session.execute(create)
    try:
        yield CassandraTable(
            "other",
            pa.schema([pa.field("a", pa.string(), False), pa.field("b", pa.int64(), False)]),
            {"a": "a", "b": "b"},
            ("a",),
        )
    finally:
        keyspace.session.execute("DROP TABLE other")


@pytest.mark.parametrize(
    ("create", "message"),
    [
        ("CREATE TABLE other (a text PRIMARY KEY)", r"has no column b \(bigint\)"),
        ("CREATE TABLE other (a text PRIMARY KEY, b int)", "column b of type int, .* bigint"),
        (
            "CREATE TABLE other (a text, b bigint, PRIMARY KEY (b))",
            r"has the partition key \(b\), where \(a\) is needed",
        ),
        (
            "CREATE TABLE other (a text, b bigint, PRIMARY KEY (a, b))",
            r"has the clustering key \(b\), where \(\) is needed",
        ),
    ],
)
def test_a_table_that_differs_is_refused_with_the_remedy(keyspace, create, message):
    with altered(keyspace, create) as table:
        with pytest.raises(CassandraError, match=message) as refused:
            check_cassandra(keyspace.cluster, [table])
        assert "sql/cassandra.cql" in str(refused.value)
        with pytest.raises(CassandraError, match=message):
            CassandraWriter(table, keyspace.cluster, Patience()).upsert(
                batch_of_rows([{"a": "x", "b": 1}], table.schema)
            )


def test_a_table_that_is_missing_is_named(keyspace):
    missing = CassandraTable(
        "gone", PAGE_VIEWS_BY_PAGE.schema, {"page_url": "page_url"}, ("page_url",)
    )
    with pytest.raises(CassandraError, match=r"table gone of .* does not exist; sql/cassandra"):
        check_cassandra(keyspace.cluster, [missing])


def test_a_keyspace_that_is_missing_is_named(keyspace):
    nowhere = parse_cluster(keyspace.cluster.address.replace("/activity", "/nowhere"))
    with pytest.raises(CassandraError, match=r"keyspace nowhere does not exist .* sql/cassandra"):
        check_cassandra(nowhere, [])


def test_a_server_that_is_not_there_is_named(free_port):
    with pytest.raises(CassandraError, match=rf"can't reach 127\.0\.0\.1:{free_port}/activity: "):
        check_cassandra(parse_cluster(f"127.0.0.1:{free_port}/activity"), [])


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound, but nothing listens


def test_a_password_that_is_not_there_is_named(keyspace, monkeypatch):
    monkeypatch.delenv("CASSANDRA_PASSWORD", raising=False)
    cluster = parse_cluster(
        keyspace.cluster.address, user="ann", password=Secret("env:CASSANDRA_PASSWORD")
    )
    with pytest.raises(LookupError, match="CASSANDRA_PASSWORD"):
        check_cassandra(cluster, [])


# The last one: the session that others look through finds its node again only later.
def test_a_writer_survives_a_server_that_is_killed(keyspace, stack):
    writer = keyspace.writer(PAGE_VIEWS_BY_PAGE, limit_s=300)
    writer.upsert(views_of(*(view(f"/{i}", 1) for i in range(500))))
    stack.kill("cassandra")
    restart = threading.Thread(target=stack.up, args=("cassandra",))
    restart.start()
    try:
        writer.upsert(views_of(*(view(f"/{i}", 2) for i in range(250, 1_000))))
    finally:
        restart.join()
    session = writer._prepared()[0].session  # has its node back; the one that looks may not
    found = session.execute("SELECT page_url, views FROM activity.page_views_by_page", timeout=60)
    assert dict(list(found)) == {f"/{i}": 1 if i < 250 else 2 for i in range(1_000)}
