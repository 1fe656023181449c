import logging

import pytest

from beam_pipelines.io.kafka import client
from beam_pipelines.io.kafka.client import (
    REPEAT_LOG_S,
    KafkaCluster,
    KafkaUnreachable,
    OnceInAWhile,
    check_topics,
    largest_taken,
    parse_properties,
)

SECRET = "hunter2"


def config(tmp_path, text):
    file = tmp_path / "client.properties"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return KafkaCluster("b1:9092,b2:9092", str(file))


def test_properties_are_lines_of_name_and_value():
    text = "# TLS\nsecurity.protocol=SASL_SSL\n\n  sasl.password = a=b#c \r\nempty=\n"
    assert parse_properties(text) == {
        "security.protocol": "SASL_SSL",
        "sasl.password": "a=b#c",
        "empty": "",
    }


@pytest.mark.parametrize("line", [SECRET, f"={SECRET}"])
def test_a_line_that_is_no_property_is_named_by_its_number_only(line):
    with pytest.raises(ValueError) as raised:
        parse_properties(f"a=b\n{line}\n")
    assert str(raised.value) == "line 2 is no name=value"


def test_what_a_client_requires_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    cluster = config(tmp_path, "acks=1\nclient.id=mine\nbootstrap.servers=elsewhere:1\nx=y\n")
    settings = cluster.settings(acks="all")
    assert settings.pop("logger").name == "beam_pipelines.io.kafka.client.librdkafka"
    assert settings == {
        "client.id": "mine",
        "reconnect.backoff.ms": 500,
        "reconnect.backoff.max.ms": 2000,
        "acks": "all",
        "bootstrap.servers": "b1:9092,b2:9092",
        "x": "y",
    }


def test_a_cluster_shows_nothing_of_its_file(tmp_path):
    cluster = config(tmp_path, f"sasl.password={SECRET}\n")
    assert repr(cluster) == "KafkaCluster(bootstrap_servers='b1:9092,b2:9092')"


class FakeAdmin:
    """Describes any topic; `configs` is what it says of them, or why it doesn't."""

    def __init__(self, configs):
        self._configs = configs

    def describe(self, topics):
        return dict.fromkeys(topics)

    def configs(self, topics):
        if isinstance(self._configs, Exception):
            raise self._configs
        return dict.fromkeys(topics, self._configs)


def test_a_topic_that_takes_too_little_is_refused_with_the_command_that_changes_it(monkeypatch):
    described = FakeAdmin({"max.message.bytes": "39999"})
    monkeypatch.setattr(client, "_Admin", lambda cluster: described)
    assert largest_taken(KafkaCluster("b:1"), "out", 39_999) == 39_999
    with pytest.raises(ValueError) as raised:
        largest_taken(KafkaCluster("b:1"), "out", 40_000)
    assert str(raised.value) == (
        "Kafka's topic 'out' takes records of 39,999 bytes, and one of ours may have 40,000; to "
        "change it: kafka-configs.sh --bootstrap-server b:1 --alter --entity-type topics "
        "--entity-name out --add-config max.message.bytes=1048588"
    )


def test_a_user_who_may_not_ask_how_large_a_record_may_be_is_warned(monkeypatch, caplog):
    described = FakeAdmin(PermissionError("this user may not describe Kafka's topic 'out'"))
    monkeypatch.setattr(client, "_Admin", lambda cluster: described)
    assert largest_taken(KafkaCluster("b:1"), "out", 40_000) is None
    assert "this user may not describe Kafka's topic 'out'" in caplog.text


def test_no_server_is_refused():
    with pytest.raises(ValueError, match="no Kafka broker is named"):
        KafkaCluster(" ,")


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "none.properties"
    with pytest.raises(
        ValueError, match=f"--kafka_config_file={path} can't be read: No such file or directory"
    ):
        KafkaCluster("b1:9092", str(path)).settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [(f"{SECRET}\n", "line 1 is no name=value"), (SECRET.encode() + b"\xff", "isn't UTF-8")],
)
def test_a_file_that_holds_something_else_is_refused_without_showing_it(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"client\.properties:? {message}") as raised:
        config(tmp_path, text).settings()
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense=hunter2", 'No such configuration property: "nonsense"'),
        ("security.protocol=hunter2", 'invalid value for configuration property "security.pro'),
    ],
)
def test_a_property_that_librdkafka_refuses_is_named_without_its_value(tmp_path, line, message):
    with pytest.raises(ValueError, match=r"client\.properties\): ") as raised:
        check_topics(config(tmp_path, f"{line}\n"), ["t"])
    assert message in str(raised.value)
    assert SECRET not in str(raised.value)


def test_brokers_that_do_not_answer_are_named_with_the_reason(monkeypatch):
    monkeypatch.setattr("beam_pipelines.io.kafka.client.ANSWER_S", 1)
    with pytest.raises(
        KafkaUnreachable,
        match=r"no Kafka broker answers at 127\.0\.0\.1:1 \(.*Connection refused.*\); "
        "is it running, and is --kafka_bootstrap_servers right",
    ):
        check_topics(KafkaCluster("127.0.0.1:1"), ["t"])


def test_the_same_trouble_is_logged_once_in_a_while():
    once = OnceInAWhile()

    def passes(at_s, text):
        record = logging.LogRecord("kafka", logging.ERROR, "", 0, text, None, None)
        record.created = at_s
        return once.filter(record)

    assert passes(0.0, "FAIL after 1ms")
    assert passes(1.0, "another")
    assert not passes(REPEAT_LOG_S - 0.1, "FAIL after 23ms")
    assert passes(REPEAT_LOG_S, "FAIL after 1ms")
    assert not passes(REPEAT_LOG_S + 0.5, "another")
    assert passes(REPEAT_LOG_S + 1.0, "another")
