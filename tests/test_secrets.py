"""A marked password, driven through whatever reads a secret: it is shown nowhere."""

import importlib
import logging
import pickle
import socket
import sys
import traceback

import psycopg
import pytest
from apache_beam.internal.cloudpickle import cloudpickle
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.activity import main
from beam_pipelines.connectors import open_sinks, open_source
from beam_pipelines.explain import main as explain
from beam_pipelines.io.cassandra.cluster import check_cassandra, parse_cluster
from beam_pipelines.io.kafka import client as kafka_client
from beam_pipelines.io.kafka.client import KafkaCluster, check_topics
from beam_pipelines.io.patience import Patience
from beam_pipelines.io.postgres import PostgresTable, check_postgres, open_postgres
from beam_pipelines.io.publication import listed
from beam_pipelines.model.activity import PAGE_VIEW_COUNTS, TABLES
from beam_pipelines.model.batches import empty_batch
from beam_pipelines.model.secret import Secret
from beam_pipelines.options import parse
from scripts import producer, verify
from tests.runs import event, lines_of, written
from tests.scripts.test_break import FLAGS

breaking = importlib.import_module("scripts.break")

MARK = "hunter2"
DATABASE = Secret("env:MARKED")
IMPATIENT = Patience(limit_s=0)

URLS = [  # what people write; r17 has the first three
    f"postgresql://activity:{MARK}/2@127.0.0.1:5432/activity",
    f"postgresql:/activity:{MARK}@127.0.0.1/activity",
    f"postgresql://activity:a@{MARK}@127.0.0.1/activity",
    f"postgres://activity:{MARK}",
    f"postgresql://activity:{MARK}?@127.0.0.1/activity",
    f"postgresql://activity:%{MARK}@127.0.0.1/activity",
    f"postgresql://activity@127.0.0.1/activity?passwort={MARK}",
    f"mysql://activity:{MARK}@127.0.0.1/activity",
    f"host=127.0.0.1 user=activity password={MARK} nonsense",
    f'"{MARK}"',
]


@pytest.fixture(scope="module")
def closed_port():
    with socket.socket() as taken:  # bound, and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    file = written(folder / "in", lines_of([event(0, event_id="e-1")]))
    assert main([f"--input={file}", f"--output={folder / 'out'}"]) == 0
    return folder / "out"


@pytest.fixture(params=[*URLS, "a closed port"])
def marked(request, monkeypatch, closed_port):
    """A variable that holds a URL with the password: one misspelt, or of no server."""
    right = f"postgresql://activity:{MARK}@127.0.0.1:{closed_port}/activity"
    monkeypatch.setenv("MARKED", right if request.param == "a closed port" else request.param)


@pytest.fixture
def shown(capsys, caplog):
    """All that was printed or logged so far; `shown(call)` adds what a call raises."""
    caplog.set_level(logging.DEBUG)

    def shown(call=None):
        raised = ""
        if call is not None:
            with pytest.raises(BaseException) as error:
                call()
            raised = "".join(traceback.format_exception(error.value)) + repr(error.value)
        printed = "".join(capsys.readouterr())
        logs = "".join(
            f"{record.getMessage()}{record.exc_text or ''}{vars(record)}"
            for record in caplog.records
        )
        return printed + logs + raised

    return shown


# ── Postgres ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "use",
    [
        lambda: open_postgres(DATABASE),
        lambda: check_postgres(DATABASE, TABLES),
        lambda: PostgresTable(PAGE_VIEW_COUNTS, DATABASE, IMPATIENT).upsert(
            empty_batch(PAGE_VIEW_COUNTS.schema)
        ),
        lambda: verify.asked(DATABASE, "SELECT 1", ()),
        lambda: breaking._rows(DATABASE, "active_users", ("active_users",)),
        lambda: breaking._connected(DATABASE),
    ],
    ids=["open", "check", "sink", "verify", "break", "break, before it kills"],
)
def test_no_way_to_postgres_shows_the_password(use, marked, shown):
    text = shown(use)
    assert MARK not in text
    assert "env:MARKED" in text or "127.0.0.1" in text


def test_explain_shows_no_password(marked, out, shown):
    assert explain(["e-1", f"--lake={out / 'lake'}", "--database=env:MARKED"]) in (1, 2)
    text = shown()
    assert MARK not in text
    assert "env:MARKED" in text or "The database can't be read: connection failed" in text


def test_checks_of_verify_show_no_password(marked, shown):
    report = verify.Report()
    assert not report.run(verify.Check("table", lambda: check_postgres(DATABASE, TABLES), "-"))
    assert not report.run(verify.Check("row", lambda: verify.asked(DATABASE, "SELECT 1", ()), "-"))
    assert MARK not in shown()


@pytest.mark.parametrize("url", URLS[:3])
def test_a_run_whose_secret_is_no_url_shows_no_password(url, out, tmp_path, monkeypatch, shown):
    monkeypatch.setenv("MARKED", url)
    flags = [f"--input={out.parent / 'in'}", "--database=env:MARKED"]
    places = [f"--{end}={tmp_path / end}" for end in ("lake", "enriched", "dead_letters")]
    assert main([*flags, *places]) == 1
    text = shown()
    assert "env:MARKED holds no URL such as" in text
    assert MARK not in text


JUNK = st.text(st.sampled_from("@/:?#%[]&= \\'\"é;"), max_size=3)


@given(
    st.sampled_from(["postgresql://", "postgres://", "postgresql:/", "postgresql:", ""]),
    JUNK,
    JUNK,
    st.sampled_from(["@127.0.0.1:5432/db", "@127.0.0.1", "@/db", "", "/db", "@h?sslmode=require"]),
)
def test_a_password_is_taken_for_one_or_the_url_is_refused(scheme, before, after, rest):
    """For any password that was not encoded: its mark is in no other parameter."""
    if "@" not in rest:  # what follows a lone @ is the host, for anybody
        before, after = before.replace("@", ""), after.replace("@", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARKED", f"{scheme}activity:{before}{MARK}{after}{rest}")
        given_to_libpq = {}
        patch.setattr(psycopg, "connect", lambda **settings: given_to_libpq.update(settings))
        try:
            open_postgres(DATABASE)
        except ValueError as error:
            assert MARK not in "".join(traceback.format_exception(error))
        given_to_libpq.pop("password", None)
        assert MARK not in repr(given_to_libpq)


def test_settings_of_a_running_job_show_no_password(monkeypatch):
    monkeypatch.setenv("TABLES", f"postgresql://u:{MARK}@host/db")
    settings = breaking.settings_of(FLAGS, {"KAFKA_BOOTSTRAP_SERVERS": "b:2"})
    assert MARK not in repr(settings)
    assert MARK.encode() not in pickle.dumps(settings)


# ── Kafka, Cassandra, object stores ─────────────────────────────────────────

PROPERTIES = [
    f"sasl.mechanism={MARK}",
    f"security.protocol={MARK}",
    f"sasl.password={MARK}\nacks={MARK}",
    f"sasl.password={MARK}\nlinger.ms={MARK}",
    f"sasl.password={MARK}\nsecurity.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN",
    f"sasl.password={MARK}\n{MARK}",
    f"sasl.password={MARK}\nno.such.setting={MARK}",
    f"sasl.password={MARK}\nsasl.mechanism=PLAIN\nsecurity.protocol=SASL_PLAINTEXT\n"
    f"ssl.key.password={MARK}\nsasl.username=activity",
]


@pytest.fixture(params=PROPERTIES)
def config_file(request, tmp_path):
    path = tmp_path / "client.properties"
    path.write_text(request.param)
    return path


def test_no_way_to_kafka_shows_the_config_file(config_file, closed_port, monkeypatch, shown):
    monkeypatch.setattr(kafka_client, "ANSWER_S", 0.2)
    servers = f"127.0.0.1:{closed_port}"
    cluster = KafkaCluster(servers, str(config_file))
    assert MARK not in repr(cluster) and MARK.encode() not in pickle.dumps(cluster)
    assert MARK not in shown(lambda: check_topics(cluster, ["clicks"]))
    flags = [f"--kafka_bootstrap_servers={servers}", f"--kafka_config_file={config_file}"]
    assert producer.main(flags) == 2
    assert MARK not in shown()
    if "no.such" in config_file.read_text() or "mechanism=h" in config_file.read_text():
        report = verify.Report()
        for look in (
            lambda: verify.brokers(cluster),
            lambda: verify.send(cluster, "clicks", verify.Mark()),
            lambda: verify.Tail(cluster, "clicks"),
        ):
            assert not report.run(verify.Check("Kafka", look, "-"))
        assert MARK not in shown()


def test_no_way_to_cassandra_shows_the_password(monkeypatch, closed_port, shown):
    monkeypatch.setenv("MARKED", MARK)
    cluster = parse_cluster(f"127.0.0.1:{closed_port}/k", user="activity", password=DATABASE)
    assert MARK not in repr(cluster) and MARK.encode() not in pickle.dumps(cluster)
    assert MARK not in shown(lambda: check_cassandra(cluster, ()))
    assert MARK not in shown(lambda: parse_cluster(f"activity:{MARK}@127.0.0.1:9042/k"))


LAKES = [
    f"s3://AKIA:{MARK}@bucket/lake",
    f"s3://AKIA:{MARK[:3]}/{MARK}@bucket/lake",
    f"s3://{MARK}@bucket",
    f"s3://bucket/lake?region=eu-central-1&secret_key={MARK}",
    f"gs://me:{MARK}@bucket/lake",
]


@pytest.mark.parametrize("lake", LAKES)
def test_a_lake_whose_uri_holds_credentials_is_refused_without_showing_it(lake, shown):
    assert MARK not in shown(lambda: parse([f"--lake={lake}"]))
    assert explain(["e-1", f"--lake={lake}"]) == 2
    assert not verify.Report().run(verify.Check("lake", lambda: verify.lake_state(lake), "-"))
    text = shown(lambda: listed(lake))
    assert "holds credentials" in text
    assert MARK not in text


@pytest.mark.parametrize(
    "lake",
    [
        "s3://bucket/users@home/lake?region=eu-central-1&endpoint_override=127.0.0.1:9000",
        "gs://bucket.of.many-parts/a:b",
    ],
)
def test_a_lake_without_credentials_is_taken(lake):
    config, _ = parse([f"--lake={lake}"])
    assert config.lake == lake


# ── the command line, its options and its graph ─────────────────────────────


@pytest.mark.parametrize(
    "flags",
    [
        [f"--database=postgresql://u:{MARK}@h/db"],
        [f"--database={MARK}"],
        [f"--databse=postgresql://u:{MARK}@h/db"],
        ["--database_password", MARK],
        [f"--cassandra_password={MARK}", "--cassandra=h:1/k", "--cassandra_user=u"],
        [f"--cassandra=u:{MARK}@h:1/k"],
        [f"--input=postgresql://u:{MARK}@h/db"],
        [f"--output=s3://u:{MARK}@bucket"],
        [f"--enriched=s3://u:{MARK}@bucket"],
        [f"--dead_letters=kafka://u:{MARK}@h/t", "--kafka_bootstrap_servers=h:1"],
        ["--dead_letters=kafka:t", f"--kafka_bootstrap_servers=u:{MARK}@h:1"],
    ],
)
def test_misuse_of_a_flag_shows_no_password(flags, tmp_path, shown):
    places = [] if any(f.startswith("--output") for f in flags) else [f"--output={tmp_path}/out"]

    text = shown(lambda: sys.exit(main([*places, *flags])))
    assert MARK not in text
    assert text.endswith("SystemExit(2)")


def test_neither_options_nor_graph_hold_a_password(monkeypatch, tmp_path):
    properties = tmp_path / "client.properties"
    properties.write_text(f"sasl.password={MARK}")
    monkeypatch.setenv("MARKED", f"postgresql://u:{MARK}@h/db")
    config, options = parse(
        [
            *("--input=kafka:clicks", "--kafka_bootstrap_servers=h:1", "--kafka_until_end"),
            *(f"--kafka_config_file={properties}", "--database=env:MARKED"),
            *("--enriched=kafka:enriched", "--dead_letters=kafka:dlq", f"--lake={tmp_path}/lake"),
            *("--cassandra=h:1/k", "--cassandra_user=u", "--cassandra_password=env:MARKED"),
        ]
    )
    assert MARK not in repr(options.get_all_options()) + repr(config)
    sinks = open_sinks(config)
    graph = [open_source(config), sinks, *map(sinks.write_table, TABLES)]
    assert MARK.encode() not in cloudpickle.dumps(graph)
    assert b"env:MARKED" in cloudpickle.dumps(graph)
