"""Kafka: one broker that is its own controller (KRaft)."""

import base64
import logging
import socket
import uuid
from pathlib import Path

from stack.downloads import release, run
from stack.java import java
from stack.service import Service
from stack.settings import HOST

_LOG4J = """\
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d{ISO8601} %p %c{1} %m%n
rootLogger.level=INFO
rootLogger.appenderRef.console.ref=console
"""

# The client tells of every refused connection while the broker starts.
_QUIET = logging.getLogger("stack.kafka")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False


class Kafka(Service):
    """The broker, and the topics in it."""

    name = "kafka"

    @property
    def ports(self) -> dict[str, int]:
        return {
            "broker": self.settings.port("kafka", "broker"),
            "controller": self.settings.port("kafka", "controller"),
        }

    def fetch(self) -> None:
        self._classpath = f"{release('kafka', self.settings)}/*"

    def prepare(self) -> list[str]:
        properties = self.folder / "server.properties"
        properties.write_text(broker_properties(self.ports, self.folder / "data"))
        log4j = self.folder / "log4j2.properties"
        log4j.write_text(_LOG4J)
        if not (self.folder / "data/meta.properties").exists():
            cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
            run(
                [
                    *(java(), "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", self._classpath),
                    *("kafka.tools.StorageTool", "format", "--config", str(properties)),
                    f"--cluster-id={cluster}",  # one word: an id may begin with a hyphen
                ],
                what="formatting Kafka's storage",
            )
        heap_mb = self.settings.of("kafka")["heap_mb"]
        return [
            *(java(), f"-Xms{heap_mb}m", f"-Xmx{heap_mb}m", "-XX:+UseSerialGC"),
            *("-XX:MaxDirectMemorySize=256m", f"-Dlog4j2.configurationFile={log4j}"),
            *("-cp", self._classpath, "kafka.Kafka", str(properties)),
        ]

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.ports["broker"]), timeout=1):
            from confluent_kafka import KafkaException

            try:
                return bool(self._admin().list_topics(timeout=5).brokers)
            except KafkaException:
                return False

    def furnish(self) -> None:
        from confluent_kafka import KafkaError, KafkaException
        from confluent_kafka.admin import NewTopic

        part = self.settings.of("kafka")
        topics = [
            NewTopic(topic, part["partitions"], 1, config=part["topic_config"])
            for topic in part["topics"]
        ]
        admin = self._admin()  # held: its futures end with it
        for created in admin.create_topics(topics).values():
            try:
                created.result(timeout=30)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise

    def _admin(self):
        from confluent_kafka.admin import AdminClient

        return AdminClient({"bootstrap.servers": f"{HOST}:{self.ports['broker']}"}, logger=_QUIET)


def broker_properties(ports: dict[str, int], data: Path) -> str:
    """Return the configuration of a broker that is alone."""
    return f"""\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{HOST}:{ports["controller"]}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{HOST}:{ports["broker"]},CONTROLLER://{HOST}:{ports["controller"]}
advertised.listeners=PLAINTEXT://{HOST}:{ports["broker"]}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# After a crash the broker is let in again only when the session of the dead one is over.
broker.session.timeout.ms=6000
broker.heartbeat.interval.ms=1000
log.cleaner.dedupe.buffer.size=16777216
"""
