"""What can't work is told at once: in words on stderr that say what to do, with exit code 1."""

import re
import socket
import time

import psycopg
import pytest

from tests.faults.run import Run
from tests.integration.job import TOLD_WITHIN_S, Topics, activity, event, first_failure, on_flink


@pytest.fixture(scope="module")
def topics(kafka):
    return Topics(kafka)


@pytest.fixture(scope="module")
def topic(topics):
    """A topic with a record."""
    name = topics.make()
    topics.send(name, [("ann", event(time.time_ns() // 1000))])
    return name


@pytest.fixture
def nobody():
    """An address at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def told(where, *flags, code=1):
    """Run the command to its end, which is to be a bad one; returns what it says."""
    ended = activity(where, "--kafka_until_end", *flags)
    assert ended.code == code, ended.stderr[-4000:]
    assert ended.stdout == ""
    assert ended.seconds < TOLD_WITHIN_S
    assert "Traceback" not in ended.told
    return ended.told


def refused(kafka, tmp_path, *flags, **where):
    """Return why a run in this process was refused."""
    said = told({"KAFKA_BOOTSTRAP_SERVERS": kafka, **where}, f"--output={tmp_path}", *flags)
    last = said.splitlines()[-1]
    assert last.startswith("The run failed: ")
    return last.removeprefix("The run failed: ")


# Kafka


def test_a_broker_that_is_not_there(nobody, tmp_path):
    why = refused(nobody, tmp_path, "--input=kafka:views")
    assert re.match(rf"no Kafka broker answers at {nobody} \(.*Connection refused", why)
    assert why.endswith("is it running, and is --kafka_bootstrap_servers right?")


def test_a_topic_that_does_not_exist(kafka, tmp_path):
    assert refused(kafka, tmp_path, "--input=kafka:nowhere") == (
        f"Kafka's topic 'nowhere' does not exist at {kafka}; to create it: kafka-topics.sh "
        f"--bootstrap-server {kafka} --create --topic nowhere --partitions 4 "
        "--config message.timestamp.type=LogAppendTime"
    )


def test_a_topic_to_write_to_that_does_not_exist(kafka, topic, tmp_path):
    why = refused(kafka, tmp_path, f"--input=kafka:{topic}", "--enriched=kafka:nowhere")
    assert why.startswith("Kafka's topic 'nowhere' does not exist")


@pytest.fixture
def create_time(topics):
    name = topics.make(**{"message.timestamp.type": "CreateTime"})
    topics.send(name, [("ann", event(time.time_ns() // 1000))])
    return name


def test_a_topic_without_the_brokers_time(kafka, create_time, tmp_path):
    assert refused(kafka, tmp_path, f"--input=kafka:{create_time}") == (
        f"topic {create_time} has records without the broker's time (CreateTime), which says "
        "nothing of when they arrived. Either let the broker set it for new records: "
        "kafka-configs.sh --bootstrap-server HOST:PORT --alter --entity-type topics "
        f"--entity-name {create_time} --add-config message.timestamp.type=LogAppendTime; or "
        "judge lateness by the producers' clocks: --append_time=producer"
    )


@pytest.mark.parametrize("append_time", ["producer", "none"])
def test_the_remedy_of_a_topic_without_the_brokers_time(append_time, kafka, create_time, tmp_path):
    ended = activity(
        {"KAFKA_BOOTSTRAP_SERVERS": kafka},
        *("--kafka_until_end", f"--input=kafka:{create_time}", f"--output={tmp_path}"),
        f"--append_time={append_time}",
    )
    assert ended.code == 0, ended.stderr[-4000:]


def test_a_file_of_settings_that_kafkas_client_refuses(kafka, topic, tmp_path):
    file = tmp_path / "client.properties"
    file.write_text("security.protocol=hunter2\n")
    why = refused(kafka, tmp_path, f"--input=kafka:{topic}", f"--kafka_config_file={file}")
    assert "Kafka's client refuses its settings" in why
    assert "hunter2" not in why


# Postgres


def database(kafka, topic, tmp_path, url):
    flags = (f"--input=kafka:{topic}", "--database=env:ACTIVITY_DATABASE_URL")
    return refused(kafka, tmp_path, *flags, ACTIVITY_DATABASE_URL=url)


def test_a_wrong_password(kafka, topic, postgres, tmp_path):
    why = database(kafka, topic, tmp_path, re.sub(r":[^:@]+@", ":hunter2@", postgres))
    assert 'password authentication failed for user "activity"' in why
    assert "hunter2" not in why


def test_a_missing_table(kafka, topic, postgres, tmp_path):
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA IF NOT EXISTS empty")
    why = database(kafka, topic, tmp_path, f"{postgres}?options=-csearch_path%3Dempty")
    assert re.match(r"table page_view_counts does not exist in database activity at \S+: ", why)
    assert why.endswith("run init-db.sql")


def test_a_secret_that_is_not_there(kafka, topic, tmp_path):
    flags = (f"--input=kafka:{topic}", "--database=env:NOT_THERE")
    assert "NOT_THERE" in refused(kafka, tmp_path, *flags)


# On a cluster, where a job is started again a few times before it is given up


@pytest.fixture
def run(cluster, tmp_path):
    run = Run(cluster, f"trouble_{time.time_ns()}", tmp_path)
    run.prepare()
    return run


def test_a_secret_that_is_not_there_on_the_workers(run):
    said = first_failure(run, f"--input=kafka:{run.topic}", "--database=env:NOT_THERE")
    assert "NOT_THERE" in said


@pytest.mark.faults
def test_a_job_that_can_not_work_is_given_up(run):
    ended = activity(
        run.where, f"--input=kafka:{run.topic}", *on_flink(run), "--database=env:NOT_THERE"
    )
    assert ended.code == 1
    assert "The run failed: the job failed: " in ended.told
    assert "NOT_THERE" in ended.told.splitlines()[-1]


def test_a_secret_that_is_not_there_fails_a_bounded_job(run):
    said = told(run.where, f"--input=kafka:{run.topic}", *on_flink(run), "--database=env:NOT_THERE")
    assert "NOT_THERE" in said


def test_no_flink_cluster(kafka, nobody, topic, tmp_path):
    said = told(
        {"KAFKA_BOOTSTRAP_SERVERS": kafka, "FLINK_MASTER": nobody},
        *(f"--input=kafka:{topic}", "--runner=FlinkRunner", "--database=env:ACTIVITY_DATABASE_URL"),
        *("--enriched=kafka:a", "--dead_letters=kafka:b", f"--lake={tmp_path}"),
        code=2,
    )
    assert said.startswith(f"no Flink cluster answers at http://{nobody}")
