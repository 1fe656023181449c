"""The sink: rows to a table, in batches of one replica set, many of them in flight."""

import io
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from cassandra.cluster import NoHostAvailable
from cassandra.protocol import BatchMessage, ProtocolHandler
from cassandra.query import BatchStatement, BatchType, PreparedStatement

from beam_pipelines.io.cassandra.cluster import (
    CassandraCluster,
    CassandraError,
    Connection,
    is_too_large,
    is_transient,
    reason,
    shared_connection,
)
from beam_pipelines.io.cassandra.encoding import (
    Statements,
    batches,
    by_partition,
    encoded,
    routing_keys,
)
from beam_pipelines.io.cassandra.tables import CassandraTable, insert_cql
from beam_pipelines.io.patience import DEFAULT_PATIENCE, Patience
from beam_pipelines.io.upsert import upsert
from beam_pipelines.kernels.texts import key_limit, short_columns
from beam_pipelines.model.windows import refuse_partial_results

IN_FLIGHT = 32
"""Batches of one writer that await their acknowledgement; fewer after an error."""

_LOGGER = logging.getLogger(__name__)


@dataclass
class WriteToCassandra(beam.PTransform):
    """Upsert batches of rows into a table of a Cassandra keyspace.

    Input: batches of the table's schema. Output: nothing.

    Guarantee: at least once, and repeats change nothing: rows are whole, their primary key
    decides which row, and where they carry a growing count the greatest stays (`greatest`
    of the table). Rows are gathered within a bundle, and every write is acknowledged at the
    consistency of the cluster before the bundle ends.

    Rows are ordered by partition and sent as unlogged batches, each to a node that holds a
    replica of all its rows: a server's work grows with the partitions of a batch far more
    than with its rows, so larger bundles cost less. A batch isn't atomic, nor need it be.

    The table is there already (`sql/cassandra.cql`) and is compared with `table` whenever a
    worker connects. Timeouts, overload and nodes that are down are waited out as `patience`
    says; every other error fails the bundle. Texts of a key that are very long (Cassandra
    refuses keys of 64 KiB) are stored shortened, as in Postgres: their beginning, then
    their SHA-256.

    Args:
      table: Table name, columns, key, and what decides between rows of a key.
      cluster: Where it is.
      patience: How long failed writes are repeated.

    Raises:
      ValueError: the batches have other columns, or the rows come from discarding windows
        and the table keeps the greatest count.
      MissingSecret: (at run time) the worker has no such password.
      CassandraError: (at run time) the cluster can't be used; the message says why.
    """

    table: CassandraTable
    cluster: CassandraCluster
    patience: Patience = DEFAULT_PATIENCE

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        if self.table.greatest is not None:
            refuse_partial_results(rows, f"table {self.table.name}")
        open_table = partial(CassandraWriter, self.table, self.cluster, self.patience)
        return upsert(rows, self.table.name, self.table.schema, open_table)


class CassandraWriter:
    """Writes rows to a table, over the connection that the process shares.

    Args:
      table: The table.
      cluster: Where it is; connected to when first written to.
      patience: How long an upsert is repeated.
    """

    def __init__(
        self, table: CassandraTable, cluster: CassandraCluster, patience: Patience
    ) -> None:
        self.table = table
        self.cluster = cluster
        self.patience = patience
        self._connection: Connection | None = None
        self._insert: PreparedStatement | None = None

    def upsert(self, rows: pa.RecordBatch) -> None:
        """Write rows, in any order; returns when all are acknowledged.

        Raises:
          CassandraError: the cluster can't be reached for too long, or refuses the rows.
        """
        key = [self.table.field_of(column).name for column in self.table.primary_key]
        pending: list[_EncodedBatch] | None = None
        in_flight = IN_FLIGHT

        def attempt() -> None:
            nonlocal pending, in_flight
            connection, insert = self._prepared()
            if pending is None:
                short = short_columns(rows, key, key_limit(rows.schema, key))
                pending = list(_batches_of(short, self.table, connection, insert))
            pending, error = _sent(connection, pending, in_flight)
            if error is not None:
                in_flight = max(1, in_flight // 2)  # a server that timed out has enough to do
                raise error

        try:
            self.patience.repeat(attempt, self._passes)
        except CassandraError:
            raise
        except Exception as error:
            if is_transient(error) or isinstance(error, NoHostAvailable):
                raise self._failure(error, f"for {self.patience.limit_s:.0f} s") from None
            raise self._failure(error, "and it would not pass") from None

    def close(self) -> None:
        """Let go of the connection; the last one to do so closes it."""
        self._connection = self._insert = None

    def _prepared(self) -> tuple[Connection, PreparedStatement]:
        if self._connection is None or self._insert is None:
            connection = shared_connection(self.cluster)
            connection.require(self.table)
            connection.session.client_protocol_handler = _EncodedBatches
            self._insert = connection.session.prepare(insert_cql(self.table, self.cluster.keyspace))
            self._connection = connection
        return self._connection, self._insert

    def _failure(self, error: Exception, how: str) -> CassandraError:
        return CassandraError(
            f"could not write to table {self.table.name} of {self.cluster.address} {how}: "
            f"{reason(error)}"
        )

    def _passes(self, error: Exception) -> bool:
        if not is_transient(error):
            return False
        _LOGGER.warning(
            "Trying again to write to table %s of %s: %s",
            self.table.name,
            self.cluster.address,
            reason(error),
        )
        return True


class _EncodedBatch(BatchStatement):
    """A batch whose statements are encoded already; the driver hands them on unread.

    Args:
      statements: All of one replica set.
      keyspace: Of their table.
      routing_key: The key of one of their partitions; None where there is one node.
    """

    def __init__(self, statements: Statements, keyspace: str, routing_key: bytes | None) -> None:
        super().__init__(BatchType.UNLOGGED)
        self.keyspace = keyspace
        self._statements_and_parameters = statements
        self.statements = statements
        self.is_idempotent = True
        if routing_key is not None:
            self.routing_key = routing_key

    def halves(self) -> list["_EncodedBatch"]:
        return [
            _EncodedBatch(half, self.keyspace, self.routing_key)
            for half in self.statements.halves()
        ]


class _EncodedMessage(BatchMessage):
    """A BATCH message around encoded statements; the rest of it is the driver's."""

    def __init__(self, message: BatchMessage) -> None:
        self.__dict__.update(message.__dict__)
        self.statements: Statements = message.queries
        self.queries = ()

    def send_body(self, f: Any, protocol_version: int) -> None:
        empty = io.BytesIO()
        super().send_body(empty, protocol_version)
        body = empty.getvalue()  # kind of batch, 1 byte; number of statements, 2 bytes; the rest
        f.write(body[:1] + len(self.statements).to_bytes(2))
        f.write(self.statements.to_bytes())
        f.write(body[3:])


class _EncodedBatches(ProtocolHandler):
    """The driver's protocol, which sends encoded statements as they are."""

    @classmethod
    def encode_message(cls, msg: Any, *args: Any, **options: Any) -> bytes:
        if isinstance(msg, BatchMessage) and isinstance(msg.queries, Statements):
            msg = _EncodedMessage(msg)
        return super().encode_message(msg, *args, **options)


def _batches_of(
    rows: pa.RecordBatch, table: CassandraTable, connection: Connection, insert: PreparedStatement
) -> Iterator[_EncodedBatch]:
    """Encode rows, partitions together, and divide them into batches of one replica set."""
    order, starts = by_partition(rows, table)
    keyspace, metadata = connection.cluster.keyspace, connection.session.cluster.metadata
    if len(metadata.all_hosts()) == 1:
        ordered = rows.take(pa.array(order))
        for batch in batches(encoded(ordered, table, insert.query_id)):
            yield _EncodedBatch(batch, keyspace, None)
        return
    keys = routing_keys(rows.take(pa.array(order[starts])), table)
    sets: dict[frozenset[Any], int] = {}  # replica sets, numbered as they are met
    set_of = np.array(
        [
            sets.setdefault(frozenset(metadata.get_replicas(keyspace, key)), len(sets))
            for key in keys
        ]
    )
    lengths = np.diff(np.append(starts, len(order)))
    set_of_row = np.repeat(set_of, lengths)
    for number in range(len(sets)):
        ordered = rows.take(pa.array(order[set_of_row == number]))
        key = keys[int(np.argmax(set_of == number))]
        for batch in batches(encoded(ordered, table, insert.query_id)):
            yield _EncodedBatch(batch, keyspace, key)


def _sent(
    connection: Connection, pending: list[_EncodedBatch], in_flight: int
) -> tuple[list[_EncodedBatch], Exception | None]:
    """Send batches, `in_flight` of them at a time; returns those that failed, and an error.

    After an error no more are begun. A batch that is too large for the server is divided.
    The error is one that won't pass, where there is one.
    """
    free = threading.Semaphore(in_flight)
    left: list[_EncodedBatch] = []
    errors: list[Exception] = []
    waiting = list(reversed(pending))

    def acknowledged(_: Any) -> None:
        free.release()

    def failed(error: Exception, batch: _EncodedBatch) -> None:
        if is_too_large(error) and len(batch.statements) > 1:
            waiting.extend(batch.halves())
        else:
            left.append(batch)
            errors.append(error)
        free.release()

    while True:
        while waiting and not errors:
            free.acquire()
            batch = waiting.pop()
            try:
                future = connection.session.execute_async(batch)
            except Exception as error:
                failed(error, batch)
            else:
                future.add_callbacks(acknowledged, failed, errback_args=(batch,))
        for _ in range(in_flight):  # until nothing is in flight
            free.acquire()
        if errors or not waiting:
            break
        for _ in range(in_flight):  # what was divided goes out as well
            free.release()
    final = next((error for error in errors if not is_transient(error)), None)
    return [*left, *waiting], final or (errors[0] if errors else None)
