"""Cassandra: one node that owns the whole ring."""

import socket
from pathlib import Path

from stack.downloads import release
from stack.java import java
from stack.service import Service
from stack.settings import HOST, REPOSITORY, StackError, versions

SCHEMA = REPOSITORY / "sql/cassandra.cql"
CONTAINER_YAML = REPOSITORY / "runners/cassandra/cassandra.yaml"
"""What docker-compose.yml mounts: `python -m stack lock` writes it from `node_yaml`."""

CONTAINER_PORTS = {"native": 9042, "storage": 7000, "ssl_storage": 7001}

# A node that is alone has nobody to wait for.
ALONE = (
    "-Dcassandra.skip_wait_for_gossip_to_settle=0",
    "-Dcassandra.ring_delay_ms=0",
    "-Dcassandra.superuser_setup_delay_ms=0",
)

# A frame of the native protocol, version 4: what do you support? And the kind of answer.
_OPTIONS = bytes((4, 0, 0, 0, 5, 0, 0, 0, 0))
_SUPPORTED = 6

_LOGBACK = """\
<configuration>
  <appender name="STDOUT" class="ch.qos.logback.core.ConsoleAppender">
    <encoder><pattern>%date %-5level [%thread] %logger{0} %msg%n</pattern></encoder>
  </appender>
  <root level="INFO"><appender-ref ref="STDOUT"/></root>
</configuration>
"""

# The parts of the JDK that Cassandra reaches into (its own conf/jvm17-server.options).
_EXPORTS = """
  java.base/jdk.internal.misc java.base/java.lang.ref
  java.management.rmi/com.sun.jmx.remote.internal.rmi java.rmi/sun.rmi.registry
  java.rmi/sun.rmi.server java.sql/java.sql jdk.unsupported/sun.misc
  jdk.compiler/com.sun.tools.javac.file jdk.attach/sun.tools.attach
""".split()
_OPENS = """
  java.base/java.lang.module java.base/jdk.internal.loader java.base/jdk.internal.ref
  java.base/jdk.internal.reflect java.base/jdk.internal.math java.base/jdk.internal.module
  java.base/jdk.internal.util.jar java.base/sun.nio.ch java.base/java.io
  java.base/java.lang.reflect java.base/java.lang java.base/java.util
  jdk.management/com.sun.management.internal jdk.compiler/com.sun.tools.javac.file
""".split()


class Cassandra(Service):
    """The node, the keyspace, and its tables."""

    name = "cassandra"

    @property
    def ports(self) -> dict[str, int]:
        return {
            name: self.settings.port("cassandra", name)
            for name in ("native", "storage", "ssl_storage")
        }

    def fetch(self) -> None:
        self._jars = release("cassandra", self.settings)

    def prepare(self) -> list[str]:
        heap_mb = self.settings.of("cassandra")["heap_mb"]
        for name, text in {
            "cassandra.yaml": node_yaml(self.ports, self.folder / "data", heap_mb),
            "logback.xml": _LOGBACK,
        }.items():
            (self.folder / name).write_text(text)
        (jamm,) = self._jars.glob("jamm-*.jar")
        return [
            *(java(), f"-javaagent:{jamm}", f"-Xms{heap_mb}m", f"-Xmx{heap_mb}m", "-Xss256k"),
            # Of few cores and a small heap, this collector takes less than G1.
            *("-XX:+UseParallelGC", f"-XX:MaxDirectMemorySize={256 + heap_mb // 4}m"),
            "-XX:+ExitOnOutOfMemoryError",
            *("-Djdk.attach.allowAttachSelf=true", "-Dio.netty.tryReflectionSetAccessible=true"),
            *(f"--add-exports={package}=ALL-UNNAMED" for package in _EXPORTS),
            *(f"--add-opens={package}=ALL-UNNAMED" for package in _OPENS),
            f"-Dcassandra.config=file://{self.folder}/cassandra.yaml",
            f"-Dcassandra.storagedir={self.folder}/data",
            f"-Dcassandra.logdir={self.folder}/data/logs",
            f"-Dlogback.configurationFile={self.folder}/logback.xml",
            *ALONE,
            *("-Djava.awt.headless=true", "-Dcassandra-foreground=yes"),
            *("-cp", f"{self._jars}/*", "org.apache.cassandra.service.CassandraDaemon"),
        ]

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.ports["native"]), timeout=2) as connection:
            connection.sendall(_OPTIONS)
            answer = connection.recv(5)
        return len(answer) == 5 and answer[4] == _SUPPORTED

    def furnish(self) -> None:
        from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile
        from cassandra.policies import RoundRobinPolicy

        keyspace = self.settings.of("cassandra")["keyspace"]
        cluster = Cluster(
            [HOST],
            port=self.ports["native"],
            protocol_version=5,
            connect_timeout=60,  # its first seconds are slow, on a busy machine more so
            control_connection_timeout=60,
            execution_profiles={
                EXEC_PROFILE_DEFAULT: ExecutionProfile(
                    load_balancing_policy=RoundRobinPolicy(), request_timeout=60
                )
            },
        )
        try:
            session = cluster.connect()
            session.execute(
                f"CREATE KEYSPACE IF NOT EXISTS {keyspace} WITH replication = "
                "{'class': 'SimpleStrategy', 'replication_factor': 1}"
            )
            session.set_keyspace(keyspace)
            for statement in statements(SCHEMA.read_text()) if SCHEMA.exists() else ():
                try:
                    session.execute(statement)
                except Exception as error:
                    raise StackError(f"{SCHEMA} failed at {statement!r}: {error}") from error
        finally:
            cluster.shutdown()


def statements(cql: str) -> list[str]:
    """Split a file of CQL at its semicolons; lines that are comments don't count."""
    lines = [line for line in cql.splitlines() if not line.lstrip().startswith(("--", "//"))]
    return [each.strip() for each in "\n".join(lines).split(";") if each.strip()]


def container_yaml() -> str:
    """Return the configuration of the node that docker-compose.yml runs."""
    heap_mb = versions()["cassandra"]["heap_mb"]
    node = node_yaml(CONTAINER_PORTS, Path("/var/lib/cassandra"), heap_mb, host="cassandra")
    return f"# Written by `python -m stack lock`, from stack/cassandra.py: change it there.\n{node}"


def node_yaml(ports: dict[str, int], data: Path, heap_mb: int, host: str = HOST) -> str:
    """Return the configuration of a node that is alone; `host` is the address it listens at."""
    return f"""\
cluster_name: stack
num_tokens: 1
initial_token: "0"
partitioner: org.apache.cassandra.dht.Murmur3Partitioner
auto_bootstrap: false
endpoint_snitch: SimpleSnitch
authenticator: AllowAllAuthenticator
authorizer: AllowAllAuthorizer
listen_address: {host}
rpc_address: {host}
storage_port: {ports["storage"]}
ssl_storage_port: {ports["ssl_storage"]}
native_transport_port: {ports["native"]}
start_native_transport: true
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
    parameters: [{{seeds: "{host}:{ports["storage"]}"}}]
data_file_directories: [{data}/data]
commitlog_directory: {data}/commitlog
saved_caches_directory: {data}/saved_caches
hints_directory: {data}/hints
cdc_raw_directory: {data}/cdc_raw
# The usual "periodic" loses acknowledged writes when the process is killed.
commitlog_sync: batch
commitlog_segment_size: 8MiB
# It is the commit log that has memtables written out, if it is small.
commitlog_total_space: {heap_mb}MiB
# Past the page cache, where the file system has such a way: a sync takes less than of a file that
# is mapped.
commitlog_disk_access_mode: auto
disk_access_mode: mmap_index_only
memtable_heap_space: {heap_mb // 4}MiB
memtable_flush_writers: 1 # of one disk; the more there are, the sooner rows are written out
memtable:
  configurations:
    trie: {{class_name: TrieMemtable}}
    default: {{inherits: trie}}
# Rows wait outside the heap, where its collector doesn't look at them.
memtable_offheap_space: {heap_mb // 4}MiB
memtable_allocation_type: offheap_objects
key_cache_size: 16MiB
counter_cache_size: 0MiB
row_cache_size: 0MiB
networking_cache_size: 32MiB
file_cache_size: 32MiB
concurrent_reads: 8
# Each write waits for the disk: many at a time share one sync.
concurrent_writes: 128
concurrent_compactors: 1
# The pipelines' batches are of one replica set, and by no means small.
batch_size_warn_threshold: 64KiB
batch_size_fail_threshold: 256KiB
unlogged_batch_across_partitions_warn_threshold: 1000
auto_snapshot: false
"""
