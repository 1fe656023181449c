"""How a cluster is reached: its address, the session a process shares, and what is checked."""

import logging
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cassandra import (
    AuthenticationFailed,
    ConsistencyLevel,
    DriverException,
    InvalidRequest,
    ProtocolVersion,
    RequestValidationException,
)
from cassandra.auth import PlainTextAuthProvider
from cassandra.cluster import (
    EXEC_PROFILE_DEFAULT,
    Cluster,
    ExecutionProfile,
    NoHostAvailable,
    Session,
)
from cassandra.metadata import KeyspaceMetadata, TableMetadata
from cassandra.policies import ConstantReconnectionPolicy, DCAwareRoundRobinPolicy, TokenAwarePolicy
from cassandra.protocol import ErrorMessage

from beam_pipelines.io.cassandra.tables import CassandraTable
from beam_pipelines.model.secret import Secret

REMEDY = "sql/cassandra.cql makes it as it should be"

CONNECT_TIMEOUT_S = 10

REQUEST_TIMEOUT_S = 20

RECONNECT_S = 1.0
"""Seconds between two attempts at a node that is down; the driver's own grow to minutes."""

_WRITING = "ANY ONE TWO THREE QUORUM ALL LOCAL_QUORUM EACH_QUORUM LOCAL_ONE".split()


@dataclass(frozen=True)
class CassandraCluster:
    """A keyspace, where it is, and how certain a write must be.

    Args:
      contact_points: Hosts to ask first; the others are found through them.
      port: Of the native protocol, on every node.
      keyspace: The keyspace of the tables.
      consistency: How many replicas acknowledge a write.
      user: Name to log in with; None where the cluster asks for none.
      password: Where the worker finds the user's password.

    Raises:
      ValueError: the consistency isn't one of a write, or user or password is missing.
    """

    contact_points: tuple[str, ...]
    port: int
    keyspace: str
    consistency: str = "LOCAL_QUORUM"
    user: str | None = None
    password: Secret | None = None

    def __post_init__(self) -> None:
        if self.consistency not in _WRITING:
            raise ValueError(
                f"consistency {self.consistency!r} is none that a write can have: "
                f"{', '.join(_WRITING)}"
            )
        if (self.user is None) != (self.password is None):
            given, missing = ("password", "user") if self.user is None else ("user", "password")
            raise ValueError(f"Cassandra was given a {given} but no {missing}: it needs both")

    @property
    def address(self) -> str:
        """What errors call it: HOST[,HOST]:PORT/KEYSPACE."""
        hosts = (f"[{host}]" if ":" in host else host for host in self.contact_points)
        return f"{','.join(hosts)}:{self.port}/{self.keyspace}"


def parse_cluster(
    value: str,
    *,
    consistency: str = "LOCAL_QUORUM",
    user: str | None = None,
    password: Secret | None = None,
) -> CassandraCluster:
    """Parse HOST[,HOST]:PORT/KEYSPACE; IPv6 addresses stand in brackets.

    Raises:
      ValueError: the value has another form; or `CassandraCluster` refuses the rest.

    Example:
      >>> parse_cluster("10.0.0.1,10.0.0.2:9042/activity").contact_points
      ('10.0.0.1', '10.0.0.2')
    """
    example = "e.g. 10.0.0.1,10.0.0.2:9042/activity"
    if "@" in value:  # and not shown: what is before it may be a password
        raise ValueError(
            "the address of Cassandra has no user or password in it; they are given apart; "
            + example
        )
    host = r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)"
    found = re.fullmatch(rf"({host}(?:,{host})*):(\d+)/(\w+)", value, re.ASCII)
    if found is None:
        raise ValueError(f"{value!r} is not HOST[,HOST]:PORT/KEYSPACE; {example}")
    hosts, port, keyspace = found.groups()
    if not 0 < int(port) < 65_536:
        raise ValueError(f"{value!r} has port {port}, which is not from 1 to 65535; {example}")
    contact_points = tuple(host.strip("[]") for host in hosts.split(","))
    return CassandraCluster(contact_points, int(port), keyspace, consistency, user, password)


class CassandraError(RuntimeError):
    """A cluster or a table that can't be used as it is; the message says what to do."""


class Connection:
    """A session that all sinks of a process share, closed with the last of them.

    Args:
      cluster: Where to connect.

    Raises:
      CassandraError: the keyspace or password is wrong: trying again won't help.
      MissingSecret: there is no such password here.
      Exception: one of the driver's, for which `is_transient`: the cluster can't be
        reached now.
    """

    def __init__(self, cluster: CassandraCluster) -> None:
        self.cluster = cluster
        driver = _driver(cluster)
        weakref.finalize(self, driver.shutdown)
        try:
            self.session: Session = driver.connect()
        except Exception as error:
            driver.shutdown()
            if is_transient(error):
                raise
            raise CassandraError(_refusal(cluster, error)) from None
        if cluster.keyspace not in driver.metadata.keyspaces:
            driver.shutdown()
            raise CassandraError(
                f"keyspace {cluster.keyspace} does not exist at {cluster.address}; {REMEDY}"
            )

    @property
    def keyspace(self) -> KeyspaceMetadata:
        """What the cluster says of the keyspace."""
        return self.session.cluster.metadata.keyspaces[self.cluster.keyspace]

    def require(self, table: CassandraTable) -> None:
        """Compare a table with what is there now.

        Raises:
          CassandraError: it is missing, or a key or a column differs.
          Exception: one of the driver's, for which `is_transient`.
        """
        self.session.cluster.refresh_table_metadata(self.cluster.keyspace, table.name)
        place = f"table {table.name} of {self.cluster.address}"
        found: TableMetadata | None = self.keyspace.tables.get(table.name)
        if found is None:
            raise CassandraError(f"{place} does not exist; {REMEDY}")
        for what, declared, actual in (
            ("partition key", table.partition_key, found.partition_key),
            ("clustering key", table.clustering_key, found.clustering_key),
        ):
            names = tuple(column.name for column in actual)
            if names != declared:
                raise CassandraError(
                    f"{place} has the {what} ({', '.join(names)}), where ({', '.join(declared)}) "
                    f"is needed; {REMEDY}"
                )
        for column in table.columns:
            needed = table.cql_type(column)
            if column not in found.columns:
                raise CassandraError(f"{place} has no column {column} ({needed}); {REMEDY}")
            if found.columns[column].cql_type != needed:
                raise CassandraError(
                    f"{place} has column {column} of type {found.columns[column].cql_type}, "
                    f"where {needed} is needed; {REMEDY}"
                )


_open: weakref.WeakValueDictionary[CassandraCluster, Connection] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def shared_connection(cluster: CassandraCluster) -> Connection:
    """Return the connection that this process shares; it closes with its last user."""
    with _opening:
        connection = _open.get(cluster)
        if connection is None:
            connection = _open[cluster] = Connection(cluster)
        return connection


def check_cassandra(cluster: CassandraCluster, tables: Sequence[CassandraTable]) -> None:
    """Connect once and compare the tables with what is there, before a run begins.

    Raises:
      MissingSecret: there is no such password here.
      CassandraError: the cluster can't be reached or used, or a table is missing or differs.
    """
    try:
        connection = shared_connection(cluster)
        for table in tables:
            connection.require(table)
    except (DriverException, NoHostAvailable) as error:
        raise CassandraError(f"can't reach {cluster.address}: {reason(error)}") from None


def is_transient(error: BaseException) -> bool:
    """Tell whether an error of the driver may be gone the next time."""
    if isinstance(error, NoHostAvailable):
        # Each node may have its own reason; one that is merely down may come back.
        return not any(_is_final(nested) for nested in _reasons(error))
    known = isinstance(error, DriverException | ErrorMessage | OSError)
    return known and not _is_final(error)


def reason(error: BaseException) -> str:
    """Return what an error says, without rows, statements or passwords."""
    if isinstance(error, NoHostAvailable):
        nested = "; ".join(sorted({reason(each) for each in _reasons(error)}))
        return f"no node answers ({nested or 'all are down'})"
    if isinstance(error, InvalidRequest) and _TOO_LARGE not in str(error):
        # Cassandra may quote what it could not take.
        return "the request is invalid"
    text = getattr(error, "summary", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300]


def is_too_large(error: BaseException) -> bool:
    """Tell whether a batch exceeded the server's batch_size_fail_threshold."""
    return isinstance(error, InvalidRequest) and _TOO_LARGE in str(error)


_TOO_LARGE = "Batch too large"


def _is_final(error: BaseException) -> bool:
    final = (AuthenticationFailed, RequestValidationException)
    return isinstance(error, final) or "Bad credentials" in str(error)


def _reasons(error: NoHostAvailable) -> list[BaseException]:
    errors = error.errors.values() if isinstance(error.errors, dict) else error.errors or ()
    return [each for each in errors if isinstance(each, BaseException)]


def _refusal(cluster: CassandraCluster, error: Exception) -> str:
    if isinstance(error, NoHostAvailable):
        error = next(e for e in _reasons(error) if _is_final(e))  # type: ignore[assignment]
    if isinstance(error, AuthenticationFailed) or "Bad credentials" in str(error):
        if cluster.password is None:
            return f"{cluster.address} asks for a user and a password, and none were given"
        return (
            f"{cluster.address} refuses user {cluster.user} with the password that "
            f"{cluster.password.reference} holds"
        )
    return f"can't use {cluster.address}: {reason(error)}"


def _driver(cluster: CassandraCluster) -> Cluster:
    authentication: Any = None
    if cluster.user is not None and cluster.password is not None:
        authentication = PlainTextAuthProvider(cluster.user, cluster.password.resolve())
    _quiet_batch_warnings()
    return Cluster(
        list(cluster.contact_points),
        port=cluster.port,
        auth_provider=authentication,
        protocol_version=ProtocolVersion.V4,  # every Cassandra since 2.2 has it, and its kin
        compression=False,  # costs more CPU than it saves within a data center
        connect_timeout=CONNECT_TIMEOUT_S,
        reconnection_policy=ConstantReconnectionPolicy(RECONNECT_S, max_attempts=None),
        execution_profiles={
            EXEC_PROFILE_DEFAULT: ExecutionProfile(
                load_balancing_policy=TokenAwarePolicy(DCAwareRoundRobinPolicy()),
                consistency_level=ConsistencyLevel.name_to_value[cluster.consistency],
                request_timeout=REQUEST_TIMEOUT_S,
            )
        },
    )


def _quiet_batch_warnings() -> None:
    """Keep the server's warning about a batch, which comes with each, out of the logs.

    It guards against batches that one node spreads over many; ours are of one replica set.
    """
    logger = logging.getLogger("cassandra.protocol")
    if _not_about_batches not in logger.filters:
        logger.addFilter(_not_about_batches)


def _not_about_batches(record: logging.LogRecord) -> bool:
    return not re.match(r"Server warning: (Batch for|Unlogged batch covering)", record.getMessage())
