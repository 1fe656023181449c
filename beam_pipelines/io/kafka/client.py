"""How to reach a Kafka cluster, and what its topics are like."""

import logging
import re
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

# The module re-exports these two, but doesn't say so to type checkers.
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._topic import TopicDescription

from beam_pipelines.io.kafka.sizes import DEFAULT_MAX_BYTES

CLIENT_ID = "beam_pipelines"

ANSWER_S = 20
"""Seconds that the brokers have to answer a question about topics."""

REPEAT_LOG_S = 30.0
"""Seconds between two reports of the same trouble in the log."""

_POLL_S = 0.1


class KafkaUnreachable(ConnectionError):  # noqa: N818 - it is how things are
    """No broker answered in time."""


class OnceInAWhile(logging.Filter):
    """Lets a message pass once in `REPEAT_LOG_S`, whatever numbers are in it.

    librdkafka reports every attempt to connect: ten a second while a broker is away.
    """

    def __init__(self) -> None:
        super().__init__()
        self._passed_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to pass a record on."""
        text = re.sub(r"\d+", "N", record.getMessage())
        passed_at = self._passed_at.get(text, float("-inf"))
        if record.created - passed_at < REPEAT_LOG_S:
            return False
        self._passed_at = {
            text: at for text, at in self._passed_at.items() if record.created - at < REPEAT_LOG_S
        } | {text: record.created}
        return True


def _without_values(record: logging.LogRecord) -> bool:
    """Take the values of settings out of a message: one may be a password in a wrong place."""
    record.msg = re.sub(r"set to `.*?`", "set to a value", record.getMessage(), flags=re.DOTALL)
    record.args = None
    return True


_LOGGER = logging.getLogger(__name__)
_LIBRDKAFKA = logging.getLogger(f"{__name__}.librdkafka")
_LIBRDKAFKA.addFilter(_without_values)
_LIBRDKAFKA.addFilter(OnceInAWhile())


@dataclass(frozen=True)
class KafkaCluster:
    """How to reach a cluster.

    Args:
      bootstrap_servers: HOST:PORT of brokers, separated by commas.
      config_file: File of librdkafka properties (TLS, SASL, tuning), which every worker
        reads for itself: what it holds is in no option, log or `repr`.

    Raises:
      ValueError: no server is named.
    """

    bootstrap_servers: str
    config_file: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.bootstrap_servers.strip(", "):
            raise ValueError(
                "no Kafka broker is named; e.g. --kafka_bootstrap_servers=127.0.0.1:29092"
            )

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the settings of a confluent_kafka client.

        Args:
          **more: Settings that the file can't override, by librdkafka's names.

        Raises:
          ValueError: the file can't be read, or holds something else.
        """
        return {
            "client.id": CLIENT_ID,
            "reconnect.backoff.ms": 500,
            "reconnect.backoff.max.ms": 2000,  # a broker that is back is found soon
            **self._properties(),
            "bootstrap.servers": self.bootstrap_servers,
            "logger": _LIBRDKAFKA,  # else it prints to stderr
            **more,
        }

    def client(self, make: Callable[[dict[str, Any]], Any], **more: Any) -> Any:
        """Make a confluent_kafka client with `settings(**more)`.

        Raises:
          ValueError: it refuses a setting.
        """
        try:
            return make(self.settings(**more))
        except KafkaException as error:
            raise ValueError(
                "Kafka's client refuses its settings (--kafka_bootstrap_servers="
                f"{self.bootstrap_servers}, --kafka_config_file={self.config_file}): "
                f"{_reason(error)}"
            ) from None  # the cause may show a secret

    def _properties(self) -> dict[str, str]:
        if self.config_file is None:
            return {}
        try:
            return parse_properties(Path(self.config_file).read_text("utf-8"))
        except OSError as error:
            raise ValueError(
                f"--kafka_config_file={self.config_file} can't be read: {error.strerror}; "
                "every worker needs it"
            ) from error
        except UnicodeDecodeError:  # the cause would show bytes of the file
            raise ValueError(f"--kafka_config_file={self.config_file} isn't UTF-8") from None
        except ValueError as error:
            raise ValueError(f"--kafka_config_file={self.config_file}: {error}") from error


def parse_properties(text: str) -> dict[str, str]:
    """Read lines of `name=value`; empty ones and those that begin with `#` say nothing.

    Raises:
      ValueError: a line is something else; the message has its number, not its text, which
        may be part of a secret.
    """
    properties = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not (name and equals):
            raise ValueError(f"line {number} is no name=value")
        properties[name] = value
    return properties


@dataclass(frozen=True)
class Topic:
    """A topic as its brokers describe it.

    Args:
      name: Its name.
      topic_id: Its identity: one that is deleted and made again has another.
      partitions: Their numbers, ascending.
      timestamp_type: `LogAppendTime` or `CreateTime`.
      retention_ms: Milliseconds that records are kept; -1: for ever.
    """

    name: str
    topic_id: str
    partitions: tuple[int, ...]
    timestamp_type: str
    retention_ms: int


def check_topics(cluster: KafkaCluster, topics: Collection[str]) -> None:
    """Make sure that the cluster answers and that these topics exist.

    Raises:
      KafkaUnreachable: no broker answered within `ANSWER_S`.
      PermissionError: the brokers refuse this user.
      ValueError: a topic doesn't exist (the message has the command that creates it), or
        the settings can't be used.
    """
    _Admin(cluster).describe(topics)


def largest_taken(cluster: KafkaCluster, topic: str, least_bytes: int) -> int | None:
    """Return the largest record that a topic to write to takes; None: this user may not ask.

    Args:
      cluster: How to reach it.
      topic: The topic.
      least_bytes: What it must take, before compression.

    Raises:
      ValueError: it takes less (the message has the command that changes it); else what
        `check_topics` raises.
    """
    admin = _Admin(cluster)
    admin.describe([topic])
    try:
        limit_bytes = int(admin.configs([topic])[topic]["max.message.bytes"])
    except PermissionError as error:
        _LOGGER.warning("How large a record may be isn't known: %s", error)
        return None
    if limit_bytes < least_bytes:
        raise ValueError(
            f"Kafka's topic {topic!r} takes records of {limit_bytes:,} bytes, and one of ours may "
            f"have {least_bytes:,}; to change it: kafka-configs.sh --bootstrap-server "
            f"{cluster.bootstrap_servers} --alter --entity-type topics --entity-name {topic} "
            f"--add-config max.message.bytes={DEFAULT_MAX_BYTES}"
        )
    return limit_bytes


def topic_partitions(cluster: KafkaCluster, topics: Collection[str]) -> dict[str, Topic]:
    """Look up topics; raises what `check_topics` raises."""
    admin = _Admin(cluster)
    described = admin.describe(topics)
    configs = admin.configs(topics)
    return {
        name: Topic(
            name=name,
            topic_id=str(topic.topic_id),
            partitions=tuple(sorted(partition.id for partition in topic.partitions)),
            timestamp_type=configs[name]["message.timestamp.type"],
            retention_ms=int(configs[name]["retention.ms"]),
        )
        for name, topic in described.items()
    }


class _Admin:
    """A conversation with the brokers, and what went wrong meanwhile."""

    def __init__(self, cluster: KafkaCluster) -> None:
        self._cluster = cluster
        self._errors: list[KafkaError] = []
        self._client = cluster.client(AdminClient, error_cb=self._errors.append)

    def describe(self, topics: Collection[str]) -> dict[str, TopicDescription]:
        ask = self._client.describe_topics
        futures = ask(TopicCollection(list(topics)), request_timeout=ANSWER_S)
        return {topic: self._answer(topic, future) for topic, future in futures.items()}

    def configs(self, topics: Collection[str]) -> dict[str, dict[str, str]]:
        resources = [ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics]
        futures = self._client.describe_configs(resources, request_timeout=ANSWER_S)
        return {
            resource.name: {k: v.value for k, v in self._answer(resource.name, future).items()}
            for resource, future in futures.items()
        }

    def _answer(self, topic: str, future: "Future[Any]") -> Any:
        while not future.done():
            self._client.poll(_POLL_S)  # serves the callback that keeps errors
            self._raise_if_refused()
        try:
            return future.result()
        except KafkaException as error:
            raise self._explained(topic, error) from error

    def _raise_if_refused(self) -> None:
        for error in self._errors:
            if error.code() == KafkaError._AUTHENTICATION:  # asking again won't help
                raise PermissionError(
                    f"Kafka at {self._cluster.bootstrap_servers} refuses this client: "
                    f"{error.str()}; are the user, password and mechanism in "
                    "--kafka_config_file right?"
                )

    def _explained(self, topic: str, exception: KafkaException) -> Exception:
        servers = self._cluster.bootstrap_servers
        error = exception.args[0]
        if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return ValueError(
                f"Kafka's topic {topic!r} does not exist at {servers}; to create it: "
                f"{creates(topic, servers)}"
            )
        if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            return PermissionError(
                f"this user may not describe Kafka's topic {topic!r}: the ACLs must allow "
                "DESCRIBE and, to read it, DESCRIBE_CONFIGS"
            )
        if error.code() in (KafkaError._TIMED_OUT, KafkaError._TRANSPORT):
            return KafkaUnreachable(
                f"no Kafka broker answers at {servers} ({self._latest(error)}); is it running, "
                "and is --kafka_bootstrap_servers right?"
            )
        return RuntimeError(f"Kafka at {servers} can't describe {topic!r}: {error.str()}")

    def _latest(self, error: KafkaError) -> str:
        """Return why the brokers can't be reached: the timeout itself says little."""
        causes = [e for e in self._errors if e.code() != KafkaError._ALL_BROKERS_DOWN]
        return str((causes or [error])[-1].str())


def creates(topic: str, servers: str) -> str:
    """Return the command that creates a topic as these pipelines want it."""
    return (
        f"kafka-topics.sh --bootstrap-server {servers} --create --topic {topic} --partitions 4 "
        "--config message.timestamp.type=LogAppendTime"
    )


def _reason(error: KafkaException) -> str:
    """Return what librdkafka says, without the value it was given."""
    text: str = error.args[0].str()
    return re.sub(r'^Invalid value ".*" for', "invalid value for", text, flags=re.DOTALL)
