import logging
import struct
from datetime import UTC, date, datetime
from types import SimpleNamespace

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from cassandra import AuthenticationFailed, ConsistencyLevel, InvalidRequest, WriteTimeout
from cassandra.cluster import NoHostAvailable
from cassandra.cqltypes import lookup_casstype
from cassandra.metadata import Murmur3Token
from cassandra.protocol import BatchMessage, OverloadedErrorMessage, ProtocolHandler
from cassandra.query import (
    UNSET_VALUE,
    BatchStatement,
    BatchType,
    BoundStatement,
    PreparedStatement,
)

from beam_pipelines.io.cassandra import cluster as cluster_module
from beam_pipelines.io.cassandra import encoding
from beam_pipelines.io.cassandra import write as write_module
from beam_pipelines.io.cassandra.cluster import (
    CassandraCluster,
    CassandraError,
    check_cassandra,
    is_transient,
    parse_cluster,
    reason,
)
from beam_pipelines.io.cassandra.encoding import batches, by_partition, encoded, routing_keys
from beam_pipelines.io.cassandra.tables import CassandraTable, DayOf, MicrosOf, insert_cql
from beam_pipelines.io.cassandra.write import CassandraWriter, WriteToCassandra
from beam_pipelines.io.patience import Patience
from beam_pipelines.kernels.texts import MAX_KEY_BYTES
from beam_pipelines.model.batches import BatchOf, batch_of_rows, empty_batch, one_of
from beam_pipelines.model.records import TIMESTAMP
from beam_pipelines.model.secret import Secret
from beam_pipelines.model.windows import WindowPolicy
from tests.io.contract import shortened_form

SCHEMA = pa.schema(
    [
        pa.field("at", TIMESTAMP, nullable=False),
        pa.field("who", pa.string(), nullable=False),
        pa.field("identity", pa.uint64(), nullable=False),
        one_of("kind", ("view", "click"), nullable=True),
        pa.field("note", pa.string()),
        pa.field("number", pa.int64()),
        pa.field("small", pa.int32()),
        pa.field("share", pa.float64()),
        pa.field("yes", pa.bool_()),
        pa.field("until", TIMESTAMP),
    ]
)
EVENTS = CassandraTable(
    "events",
    SCHEMA,
    columns={
        "who": "who",
        "day": DayOf("at"),
        "at": "at",
        "micros": MicrosOf("at"),
        "identity": "identity",
        **{name: name for name in SCHEMA.names[3:]},
    },
    partition_key=("who", "day"),
    clustering_key=("at", "micros", "identity"),
)
COUNTS = CassandraTable(
    "counts",
    pa.schema(
        [
            pa.field("start", TIMESTAMP, nullable=False),
            pa.field("page", pa.string(), nullable=False),
            pa.field("views", pa.int64(), nullable=False),
        ]
    ),
    columns={"page": "page", "start": "start", "views": "views"},
    partition_key=("page",),
    clustering_key=("start",),
    greatest=("start", "views"),
)
CLUSTER = CassandraCluster(("10.0.0.1",), 9042, "shop")
NINE = datetime(2026, 1, 5, 9, tzinfo=UTC)
QUERY_ID = bytes(range(16))
KINDS = {
    "text": "UTF8Type",
    "boolean": "BooleanType",
    "int": "Int32Type",
    "smallint": "ShortType",
    "bigint": "LongType",
    "double": "DoubleType",
    "timestamp": "DateType",
    "date": "SimpleDateType",
}


def prepared(table):
    """Return what the driver makes of the table's INSERT, had a server prepared it."""
    types = {name: table.cql_type(name) for name in table.columns}
    if table.greatest:
        types["[timestamp]"] = "bigint"
    metadata = [
        SimpleNamespace(
            keyspace_name="shop", table_name=table.name, name=name, type=lookup_casstype(KINDS[cql])
        )
        for name, cql in types.items()
    ]
    keys = [list(table.columns).index(name) for name in table.partition_key]
    return PreparedStatement(metadata, QUERY_ID, keys, "INSERT", "shop", 4, None, None)


def sent_by_driver(table, *rows, protocol=4):
    batch = BatchStatement(BatchType.UNLOGGED)
    for row in rows:
        batch.add(prepared(table), row)
    return message(batch._statements_and_parameters, ProtocolHandler, protocol)


def message(queries, handler, protocol=4):
    batch = BatchMessage(
        BatchType.UNLOGGED, queries, ConsistencyLevel.LOCAL_QUORUM, None, timestamp=1234567
    )
    return handler.encode_message(
        batch, 7, protocol, compressor=None, allow_beta_protocol_version=False
    )


def sent_by_us(table, *rows, protocol=4):
    statements = encoded(batch_of_rows(rows, table.schema), table, QUERY_ID)
    return message(statements, write_module._EncodedBatches, protocol)


def ms(time):
    return int(np.datetime64(time.replace(tzinfo=None), "us").astype(np.int64) // 1000)


FULL = {
    "at": NINE.replace(microsecond=123_456),
    "who": "ann",
    "identity": 2**64 - 5,
    "kind": "click",
    "note": "é\0",
    "number": -(2**63),
    "small": -7,
    "share": -0.1,
    "yes": True,
    "until": NINE,
}
FULL_VALUES = [
    "ann", date(2026, 1, 5), ms(FULL["at"]), 456, -5, "click", "é\0", -(2**63), -7, -0.1, True,
    ms(NINE),
]  # fmt: skip
EMPTY = {"at": datetime(1, 1, 1, tzinfo=UTC), "who": "", "identity": 0}
EMPTY_VALUES = ["", date(1, 1, 1), ms(EMPTY["at"]), 0, 0, *[UNSET_VALUE] * 7]


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_batch_is_sent_as_the_driver_would_send_it(protocol):
    assert sent_by_us(EVENTS, FULL, EMPTY, protocol=protocol) == sent_by_driver(
        EVENTS, FULL_VALUES, EMPTY_VALUES, protocol=protocol
    )


def test_other_messages_are_the_drivers_own():
    statements = [(True, QUERY_ID, [b"x"])]
    assert message(statements, write_module._EncodedBatches) == message(statements, ProtocolHandler)


def test_times_before_1970_are_rounded_down():
    row = {**FULL, "at": datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)}
    values = [FULL_VALUES[0], date(1969, 12, 31), -1, 999, *FULL_VALUES[4:]]
    assert sent_by_us(EVENTS, row) == sent_by_driver(EVENTS, values)


def test_a_count_is_written_with_its_time_and_itself_as_timestamp():
    rows = [{"start": NINE, "page": "/a", "views": views} for views in (3, 300)]
    start_us = ms(NINE) * 1000
    assert sent_by_us(COUNTS, *rows) == sent_by_driver(
        COUNTS, ["/a", ms(NINE), 3, start_us + 3], ["/a", ms(NINE), 300, start_us + 300]
    )


def test_a_slice_of_a_batch_is_encoded_alone():
    rows = batch_of_rows([EMPTY, FULL, EMPTY], SCHEMA).slice(1, 1)
    assert (
        encoded(rows, EVENTS, QUERY_ID).to_bytes()
        == encoded(batch_of_rows([FULL], SCHEMA), EVENTS, QUERY_ID).to_bytes()
    )


def test_no_rows_are_no_statements():
    statements = encoded(empty_batch(SCHEMA), EVENTS, QUERY_ID)
    assert len(statements) == 0
    assert statements.to_bytes() == b""
    assert list(batches(statements)) == []


def test_routing_keys_are_those_of_the_driver():
    rows = batch_of_rows([FULL, EMPTY], SCHEMA)
    bound = [BoundStatement(prepared(EVENTS)).bind(v) for v in (FULL_VALUES, EMPTY_VALUES)]
    assert routing_keys(rows, EVENTS) == [b.routing_key for b in bound]
    counts = batch_of_rows([{"start": NINE, "page": "/a", "views": 1}], COUNTS.schema)
    assert routing_keys(counts, COUNTS) == [b"/a"]


def test_long_texts_outside_of_the_key_are_whole():
    row = {**FULL, "note": "x" * 100_000}
    values = [*FULL_VALUES[:6], row["note"], *FULL_VALUES[7:]]
    assert sent_by_us(EVENTS, row) == sent_by_driver(EVENTS, values)


def test_rows_of_a_partition_come_together_in_their_order():
    names = ["b", "a", "b", "c", "a", "b"]
    rows = batch_of_rows([{**EMPTY, "who": w, "identity": i} for i, w in enumerate(names)], SCHEMA)
    order, starts = by_partition(rows, EVENTS)
    groups = [group.tolist() for group in np.split(order, starts[1:])]
    assert sorted(groups) == [[0, 2, 5], [1, 4], [3]]


def test_days_of_a_user_are_partitions():
    days = [NINE, NINE.replace(day=6), NINE.replace(hour=10)]
    order, starts = by_partition(batch_of_rows([{**FULL, "at": d} for d in days], SCHEMA), EVENTS)
    assert sorted(group.tolist() for group in np.split(order, starts[1:])) == [[0, 2], [1]]


def test_batches_are_bounded_in_bytes_and_rows(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 300)
    monkeypatch.setattr(encoding, "BATCH_ROWS", 3)
    sizes = [1, 1, 1, 1, 200, 1, 400, 1]
    rows = [{"start": NINE, "page": "x" * size, "views": 1} for size in sizes]
    statements = encoded(batch_of_rows(rows, COUNTS.schema), COUNTS, QUERY_ID)
    parts = list(batches(statements))
    assert [len(part) for part in parts] == [3, 1, 1, 1, 1, 1]
    assert b"".join(part.to_bytes() for part in parts) == statements.to_bytes()


def test_statements_name_the_keyspace_and_quote():
    table = CassandraTable("order", COUNTS.schema, {'pa"ge': "page"}, ('pa"ge',))
    assert insert_cql(table, "Shop") == 'INSERT INTO "Shop"."order" ("pa""ge") VALUES (?)'
    assert insert_cql(COUNTS, "shop").endswith("VALUES (?, ?, ?) USING TIMESTAMP ?")


def table(**changes):
    fields = ("name", "schema", "columns", "partition_key", "clustering_key", "greatest")
    return CassandraTable(**{**{name: getattr(COUNTS, name) for name in fields}, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition_key": ("url",)}, "no key column 'url'"),
        ({"columns": {"page": "path", "start": "start"}}, "no column 'path'"),
        ({"columns": {"page": DayOf("page"), "start": "start"}}, "'page' is part of a time"),
        ({"greatest": ("page", "views")}, "greatest needs a time and a count .* string, int64"),
        ({"schema": COUNTS.schema.set(1, pa.field("page", pa.string()))}, "'page' may be null"),
        (
            {"schema": COUNTS.schema.set(1, pa.field("page", pa.date32(), nullable=False))},
            "'page' of type date32.* has no CQL type",
        ),
    ],
)
def test_tables_that_cannot_be_written_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)


def test_addresses_are_parsed():
    found = parse_cluster("cass-1,10.0.0.2,[::1]:9042/shop", consistency="ONE")
    assert found == CassandraCluster(("cass-1", "10.0.0.2", "::1"), 9042, "shop", "ONE")
    assert found.address == "cass-1,10.0.0.2,[::1]:9042/shop"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "host/shop",
        "host:9042",
        "host:9042/",
        "host:port/shop",
        ",host:1/k",
        "h:1/k-s",
        "::1:1/k",
    ],
)
def test_addresses_of_another_form_are_refused(value):
    with pytest.raises(ValueError, match=r"is not HOST\[,HOST\]:PORT/KEYSPACE; e\.g\."):
        parse_cluster(value)


def test_ports_out_of_range_are_refused():
    with pytest.raises(ValueError, match="port 65536, which is not from 1 to 65535"):
        parse_cluster("host:65536/shop")


def test_an_address_with_a_password_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="no user or password") as refused:
        parse_cluster("ann:hunter2@host:9042/shop")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("consistency", ["local_quorum", "SERIAL", "MOST"])
def test_consistencies_that_no_write_has_are_refused(consistency):
    with pytest.raises(ValueError, match=f"'{consistency}' is none .* LOCAL_QUORUM"):
        parse_cluster("host:9042/shop", consistency=consistency)


def test_user_and_password_come_together():
    with pytest.raises(ValueError, match="a user but no password"):
        parse_cluster("host:9042/shop", user="ann")
    with pytest.raises(ValueError, match="a password but no user"):
        parse_cluster("host:9042/shop", password=Secret("env:PASSWORD"))


TIMED_OUT = WriteTimeout(
    "no answer", consistency=6, required_responses=2, received_responses=1, write_type=1
)
DOWN = NoHostAvailable("down", {"10.0.0.1": ConnectionRefusedError(111, "refused")})
WRONG_PASSWORD = NoHostAvailable("no", {"10.0.0.1": AuthenticationFailed("Bad credentials")})


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TIMED_OUT, True),
        (DOWN, True),
        (NoHostAvailable("all busy", {}), True),
        (OverloadedErrorMessage(0x1001, "busy", None), True),
        (ConnectionResetError("reset"), True),
        (WRONG_PASSWORD, False),
        (InvalidRequest("unconfigured table"), False),
        (TypeError("a bug"), False),
    ],
)
def test_what_may_pass_is_told_apart(error, passes):
    assert is_transient(error) is passes


def test_reasons_do_not_quote_the_rows():
    assert reason(InvalidRequest("Invalid value hunter2")) == "the request is invalid"
    assert reason(DOWN) == "no node answers ([Errno 111] refused)"


class Future:
    def __init__(self, error):
        self.error = error

    def add_callbacks(self, callback, errback, errback_args=()):
        if self.error is None:
            callback(None)
        else:
            errback(self.error, *errback_args)


class Nodes:
    """Stands in for a connection; `answer` decides what becomes of a batch."""

    def __init__(self, answer, hosts=1):
        self.answer = answer
        self.stored = []
        self.requests = []
        self.cluster = CLUSTER
        self.session = self
        self.metadata = self
        self.hosts = [f"10.0.0.{i}" for i in range(hosts)]
        self.required = 0

    def require(self, table):
        self.required += 1

    def prepare(self, cql):
        return SimpleNamespace(query_id=QUERY_ID)

    def all_hosts(self):
        return self.hosts

    def get_replicas(self, keyspace, key):
        token = Murmur3Token.from_key(key).value
        return [self.hosts[token % len(self.hosts)]]

    def execute_async(self, batch):
        assert batch.batch_type == BatchType.UNLOGGED
        self.requests.append(batch)
        error = self.answer(batch)
        if error is None:
            self.stored += pages(batch.statements)
        return Future(error)


# The session's metadata are found through its cluster, a connection's cluster is ours.
class Session(SimpleNamespace):
    def execute_async(self, batch):
        return self.nodes.execute_async(batch)

    def prepare(self, cql):
        return self.nodes.prepare(cql)


def pages(statements):
    """Return the first value of each statement."""
    found = []
    for start in statements.starts[:-1].tolist():
        at = start + 1 + 2 + len(QUERY_ID) + 2
        (size,) = struct.unpack_from(">i", statements.encoded, at)
        found.append(bytes(statements.encoded[at + 4 : at + 4 + size]).decode())
    return found


@pytest.fixture
def connect(monkeypatch):
    """Return what makes a writer whose writes are answered by a function of the batch."""

    def make(answer, hosts=1, patience=Patience(sleep=lambda _: None)):  # noqa: B008
        nodes = Nodes(answer, hosts)
        nodes.session = Session(nodes=nodes, cluster=SimpleNamespace(metadata=nodes))
        monkeypatch.setattr(write_module, "shared_connection", lambda cluster: nodes)
        return nodes, CassandraWriter(COUNTS, CLUSTER, patience)

    return make


def counts(*names):
    return batch_of_rows([{"start": NINE, "page": n, "views": 1} for n in names], COUNTS.schema)


NAMES = [f"/{i}" for i in range(50)]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_ROWS", 4)


def test_long_texts_of_a_key_are_shortened_and_stay_apart(connect):
    nodes, writer = connect(lambda batch: None)
    long = ["ä" * MAX_KEY_BYTES + end for end in "12"]
    writer.upsert(counts(*long, "/a", shortened_form(long[0])))
    given = [*long, shortened_form(long[0])]
    assert sorted(nodes.stored) == sorted([*map(shortened_form, given), "/a"])
    assert max(len(key.encode()) for key in nodes.stored) <= MAX_KEY_BYTES


@pytest.mark.usefixtures("small_batches")
def test_every_row_is_written_once(connect):
    nodes, writer = connect(lambda batch: None)
    writer.upsert(counts(*NAMES))
    assert sorted(nodes.stored) == sorted(NAMES)
    assert len(nodes.requests) == 13
    writer.upsert(counts("/again"))
    assert nodes.required == 1  # compared when connected, not per bundle


@pytest.mark.usefixtures("small_batches")
def test_batches_hold_rows_of_one_replica_set(connect):
    nodes, writer = connect(lambda batch: None, hosts=3)
    writer.upsert(counts(*NAMES, *NAMES))
    assert sorted(nodes.stored) == sorted([*NAMES, *NAMES])
    for batch in nodes.requests:
        keys = [page.encode() for page in pages(batch.statements)]
        [node] = {nodes.get_replicas("shop", key)[0] for key in keys}
        assert nodes.get_replicas("shop", batch.routing_key) == [node]
        assert batch.keyspace == "shop"


@pytest.mark.usefixtures("small_batches")
def test_only_what_failed_is_written_again(connect, caplog):
    errors = [None, TIMED_OUT, None, DOWN]
    nodes, writer = connect(lambda batch: errors.pop(0) if errors else None)
    with caplog.at_level(logging.WARNING):
        writer.upsert(counts(*NAMES))
    assert sorted(nodes.stored) == sorted(NAMES)
    assert len(nodes.requests) == 13 + 2
    [first, _] = caplog.messages
    assert "Trying again to write to table counts of 10.0.0.1:9042/shop: " in first


def test_a_failure_that_lasts_is_raised_after_the_patience(connect):
    clock = iter(range(0, 1000, 10))
    waits = []
    patience = Patience(limit_s=90, clock=lambda: next(clock), sleep=waits.append)
    nodes, writer = connect(lambda batch: DOWN, patience=patience)
    with pytest.raises(
        CassandraError,
        match=r"table counts of 10\.0\.0\.1:9042/shop for 90 s: no node answers .*refused",
    ):
        writer.upsert(counts("/a"))
    assert len(nodes.requests) == 9
    assert len(waits) == 8


def test_a_failure_that_will_not_pass_is_raised_at_once(connect):
    nodes, writer = connect(lambda batch: InvalidRequest("unconfigured table"))
    with pytest.raises(CassandraError, match="would not pass: the request is invalid"):
        writer.upsert(counts("/a"))
    assert len(nodes.requests) == 1


def test_batches_too_large_for_the_server_are_divided(connect):
    def answer(batch):
        return InvalidRequest("Batch too large") if len(batch.statements) > 10 else None

    nodes, writer = connect(answer)
    writer.upsert(counts(*NAMES))
    assert sorted(nodes.stored) == sorted(NAMES)


def test_a_row_too_large_for_the_server_fails(connect):
    _, writer = connect(lambda batch: InvalidRequest("Batch too large"))
    with pytest.raises(CassandraError, match="Batch too large"):
        writer.upsert(counts("/a", "/b"))


def test_a_cluster_that_comes_back_is_connected_to_again(connect, monkeypatch):
    nodes, writer = connect(lambda batch: None)
    answers = iter([DOWN, TIMED_OUT])

    def shared(cluster):
        for error in answers:
            raise error
        return nodes

    monkeypatch.setattr(write_module, "shared_connection", shared)
    writer.upsert(counts("/a"))
    assert nodes.stored == ["/a"]


def test_a_check_names_the_cluster_that_does_not_answer(monkeypatch):
    def shared(cluster):
        raise DOWN

    monkeypatch.setattr(cluster_module, "shared_connection", shared)
    with pytest.raises(CassandraError, match=r"can't reach 10\.0\.0\.1:9042/shop: no node"):
        check_cassandra(CLUSTER, [COUNTS])


def declared(schema, policy=None):
    rows = (
        beam.Pipeline()
        | beam.Create([])
        | beam.Map(lambda batch: batch).with_output_types(BatchOf(schema))
    )
    return rows if policy is None else rows | policy.into(lateness_s=0)


def test_batches_of_other_columns_are_refused():
    with pytest.raises(ValueError, match="table counts takes columns"):
        _ = declared(SCHEMA) | WriteToCassandra(COUNTS, CLUSTER)


def test_partial_counts_of_discarding_windows_are_refused():
    discarding = WindowPolicy.fixed(60, accumulating=False)
    with pytest.raises(ValueError, match="discarding"):
        _ = declared(COUNTS.schema, discarding) | WriteToCassandra(COUNTS, CLUSTER)
    _ = declared(COUNTS.schema, WindowPolicy.fixed(60)) | WriteToCassandra(COUNTS, CLUSTER)
    _ = declared(SCHEMA, discarding) | WriteToCassandra(EVENTS, CLUSTER)
