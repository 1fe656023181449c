import logging
import re

import pytest
from apache_beam.options.pipeline_options import DirectOptions, GoogleCloudOptions

from beam_pipelines.config import ActivityConfig, CassandraConfig, KafkaConfig
from beam_pipelines.model.hash_key import HashKey
from beam_pipelines.model.secret import Secret
from beam_pipelines.model.time_rule import TimeRule
from beam_pipelines.options import ActivityOptions, parse

BROKER = ("--kafka_bootstrap_servers=b:9092",)


@pytest.fixture(autouse=True)
def no_platform(monkeypatch):
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)


def config_of(*argv):
    return parse(argv)[0]


def misuse(capsys, *argv):
    """Return the first line that misuse prints."""
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.splitlines()[0]


def test_without_flags_the_demo_runs_in_process_into_out():
    assert config_of() == ActivityConfig(
        input="demo",
        format="auto",
        fields={},
        event_types={},
        output="out",
        database="duckdb:///out/activity.duckdb",
        lake="out/lake",
        enriched="out/enriched",
        dead_letters="out/dead_letters",
        kafka=KafkaConfig(),
        cassandra=None,
        time=TimeRule(120, 120, 300, None),
        window_s=60,
        users_window_s=300,
        users_period_s=60,
        session_gap_s=1800,
        early_firing_s=10,
        dedupe="auto",
        hash_key=None,
        shards=8,
        demo_events=200_000,
        seed=1,
        max_invalid=0.5,
        overwrite=False,
        in_process=True,
    )


def test_every_flag_reaches_the_config(monkeypatch):
    monkeypatch.setenv("KEY", "a key of many bytes")
    config = config_of(
        *("--input=logs/*.gz", "--format", "ndjson", "--fields=event_time=ts, user_id=uid"),
        *("--event_types=pageview=page_view,tap=click", "--output", "/data/out/"),
        *("--database=duckdb:///tables.duckdb", "--lake=/lake", "--enriched", "e"),
        *("--dead_letters=d", "--out_of_orderness_s=1", "--allowed_lateness_s=2"),
        *("--future_tolerance_s=3", "--window_s=4", "--users_window_s=6", "--users_period_s=5"),
        *("--session_gap_s=7", "--early_firing_s=8", "--dedupe=payload", "--as_of", "9"),
        "--hash_key=env:KEY",
        *("--shards=12", "--demo_events=10", "--seed=11", "--overwrite"),
        "--max_invalid=0.1",
    )
    assert config == ActivityConfig(
        input="logs/*.gz",
        format="ndjson",
        fields={"event_time": "ts", "user_id": "uid"},
        event_types={"pageview": "page_view", "tap": "click"},
        output="/data/out",
        database="duckdb:///tables.duckdb",
        lake="/lake",
        enriched="e",
        dead_letters="d",
        kafka=KafkaConfig(),
        cassandra=None,
        time=TimeRule(1, 2, 3, 9_000),
        window_s=4,
        users_window_s=6,
        users_period_s=5,
        session_gap_s=7,
        early_firing_s=8,
        dedupe="payload",
        hash_key=HashKey.look_up("env:KEY"),
        shards=12,
        demo_events=10,
        seed=11,
        max_invalid=0.1,
        overwrite=True,
        in_process=True,
    )


def test_the_output_folder_holds_what_is_not_named_otherwise():
    config = config_of("--output=/data/out", "--lake=/lake")
    assert config.database_path == "/data/out/activity.duckdb"
    assert config.folder.path == "/data/out"
    assert config.folder.owns == (
        "/data/out/activity.duckdb",
        "/data/out/activity.duckdb.wal",
        "/lake",
        "/data/out/enriched",
        "/data/out/dead_letters",
    )


@pytest.mark.parametrize(
    ("as_of", "micros"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2026-01-05T10:00:00.123456+01:00", 1_767_603_600_123_456),
        ("1767603600123", 1_767_603_600_123_000),
        ("-1", -1_000),
        ("0001-01-01T00:00:00Z", -62_135_596_800_000_000),
    ],
)
def test_as_of_is_a_time_with_an_offset_or_epoch_milliseconds(as_of, micros):
    assert config_of("--as_of", as_of).time.as_of_us == micros


@pytest.mark.parametrize(
    "as_of", ["now", "2026-01-05", "2026-01-05T10:00:00", "1.5", "9" * 18, "0001-01-01T00:00+01:00"]
)
def test_any_other_as_of_is_misuse(capsys, as_of):
    assert misuse(capsys, f"--as_of={as_of}").startswith(f"--as_of={as_of} is")


@pytest.mark.parametrize("flag", ["--as_of", "--kafka_start"])
def test_a_time_that_looks_like_seconds_is_misuse(capsys, flag):
    assert misuse(capsys, f"{flag}=1767603600") == (
        f"{flag}=1767603600 looks like seconds since 1970; it takes milliseconds: "
        f"{flag}=1767603600000"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--windw_s=30"], "there is no flag --windw_s; did you mean --window_s?"),
        (["--window-s", "30"], "there is no flag --window-s; did you mean --window_s?"),
        (["--temp_locaton=x"], "there is no flag --temp_locaton; did you mean --temp_location?"),
        (["--over"], "there is no flag --over; did you mean --overwrite?"),
        (["--qqq"], "there is no flag --qqq"),
        (["logs/*.gz"], "'logs/*.gz' belongs to no flag; every setting is --FLAG=VALUE"),
        (["--overwrite", "yes"], "'yes' belongs to no flag; every setting is --FLAG=VALUE"),
        (["--runner=DirectRuner"], "--runner=DirectRuner is no runner; did you mean DirectRunner?"),
        (["--window_s=0"], "--window_s must be positive, got 0"),
        (
            ["--cassandra=c:9042/k", "--cassandra_every_s=0"],
            "--cassandra_every_s must be positive, got 0",
        ),
        (["--shards=0"], "--shards is from 1 to 128, got 0"),
        (["--shards=129"], "--shards is from 1 to 128, got 129"),
        (["--session_gap_s=-1"], "--session_gap_s must be positive, got -1"),
        (["--demo_events=0"], "--demo_events must be positive, got 0"),
        (["--max_invalid=1.1"], "--max_invalid is a share from 0 to 1, got 1.1"),
        (["--max_invalid=nan"], "--max_invalid is a share from 0 to 1, got nan"),
        (["--seed=-1"], "--seed must not be negative, got -1"),
        (["--allowed_lateness_s=-1"], "allowed_lateness_s must not be negative, got -1"),
        (["--window_s=a"], "argument --window_s: invalid int value: 'a'"),
        (
            ["--users_period_s=301"],
            "--users_period_s=301 leaves holes between windows of --users_window_s=300; "
            "a period is at most a window",
        ),
        (
            ["--fields=uid=user_id"],
            "--fields names no column 'uid'; there are "
            "event_time, user_id, page_url, event_type, event_id",
        ),
        (["--fields=user_id"], "--fields is a list such as a=b,c=d; 'user_id' is no pair"),
        (["--fields=user_id=a,user_id=b"], "--fields maps 'user_id' twice"),
        (
            ["--event_types=page_view=view"],
            "--event_types names no event type 'view'; there are "
            "page_view, click, session_start, session_end",
        ),
        (
            ["--format=access_log", "--fields=user_id=ip"],
            "--format=access_log has no fields to map: --fields, --event_types",
        ),
        (
            ["--input=s3://b/*"],
            "--input takes demo, local files or kafka:TOPIC; s3:// isn't supported",
        ),
        (
            ["--enriched=s3://b/e"],
            "--enriched takes a local folder or kafka:TOPIC; s3:// isn't supported",
        ),
        (["--lake=kafka:l"], "--lake takes a folder, s3:// or gs://; kafka: isn't supported"),
        (
            ["--enriched=kafka:e"],
            "--enriched=kafka:e needs --kafka_bootstrap_servers=HOST:PORT, or the variable "
            "KAFKA_BOOTSTRAP_SERVERS",
        ),
        (
            [*BROKER, "--input=kafka:a,"],
            "--input=kafka:a, has no topic's name; e.g. kafka:user_activity",
        ),
        (
            [*BROKER, "--input=kafka:a"],
            "--input=kafka:a has no end, and the runner in this process needs one: "
            "add --runner=FlinkRunner, or --kafka_until_end",
        ),
        (
            [*BROKER, "--input=kafka:a", "--append_time=none"],
            "--append_time=none is for complete input: add --kafka_until_end",
        ),
        (
            [*BROKER, "--input=kafka:a,b", "--kafka_until_end", "--enriched=kafka:b"],
            "--enriched=kafka:b would be read as input again",
        ),
        (
            [*BROKER, "--dead_letters=kafka:a,b"],
            "--dead_letters=kafka:a,b names several topics; it takes one",
        ),
        (
            [*BROKER, "--kafka_start=monday"],
            "--kafka_start=monday is no time with an offset, such as 2026-01-31T12:00:00Z, "
            "and no number of epoch milliseconds",
        ),
        (
            ["--cassandra=c:9042/k", "--cassandra_password=hunter2"],
            "--cassandra_password: a secret is given as env:NAME or file:PATH, the environment "
            "variable or file that holds it; this is neither, and not shown, as it may be the "
            "secret itself",
        ),
        (
            ["--runner=FlinkRunner"],
            "duckdb:///out/activity.duckdb is a DuckDB file, which one process writes: use "
            "--runner=DirectRunner, or --database=env:NAME",
        ),
        (
            ["--runner=FlinkRunner", "--database=env:URL"],
            "--enriched=out/enriched is written by one process; other runners take "
            "--enriched=kafka:TOPIC",
        ),
        (["--lake="], "--lake is empty"),
        (["--lake=out"], "out can't be written to: out/activity.duckdb lies there"),
        (["--lake=x", "--enriched=x"], "x can't be written to: x lies there"),
    ],
)
def test_misuse_says_what_would_be_right(capsys, argv, message):
    assert misuse(capsys, *argv) == message


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@host/db", "duckdb:///", "duckdb:///:memory:", "out/a.duckdb"]
)
def test_a_database_is_a_file_or_a_reference_and_no_password_is_printed(capsys, url):
    assert misuse(capsys, f"--database={url}") == (
        "--database is duckdb:///PATH, a file that DuckDB keeps, or env:NAME or file:PATH, where "
        "the postgresql://USER:PASSWORD@HOST:PORT/DATABASE of a server is found"
    )


@pytest.mark.parametrize(
    ("runner", "in_process"),
    [
        ("DirectRunner", True),
        ("direct", True),
        ("FnApiRunner", True),
        ("FlinkRunner", False),
        ("PrismRunner", False),
        ("apache_beam.runners.portability.flink_runner.FlinkRunner", False),
    ],
)
def test_the_direct_runner_is_the_one_in_this_process(runner, in_process):
    servers = ("--database=env:URL", "--enriched=kafka:e", "--dead_letters=kafka:d", *BROKER)
    assert config_of("--runner", runner, *servers).in_process is in_process


def test_flags_of_the_job_server_are_taken_only_where_there_is_one(capsys):
    flags = ["--checkpointing_interval=500", "--database=env:URL", *BROKER]
    flags += ["--enriched=kafka:e", "--dead_letters=kafka:d"]
    _, options = parse([*flags, "--runner=FlinkRunner"])
    assert "--checkpointing_interval=500" in options._flags
    assert misuse(capsys, *flags).startswith("there is no flag --checkpointing_interval")


def test_kafka_and_cassandra_flags_reach_the_config(monkeypatch):
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "variable:9092")
    config = config_of(
        "--input=kafka:a, b", "--kafka_until_end", "--kafka_start=2026-01-31T12:00:00Z",
        "--append_time=producer", "--kafka_group=g", "--kafka_config_file=/run/kafka",
        "--cassandra=c:9042/k", "--cassandra_consistency=ONE", "--cassandra_user=u",
        "--cassandra_password=env:P", "--cassandra_every_s=3",
    )  # fmt: skip
    assert config.topics == ("a", "b")
    assert not config.endless
    assert config.kafka == KafkaConfig(
        "variable:9092", "/run/kafka", 1769860800000000, True, "producer", "g"
    )
    assert config.cassandra == CassandraConfig("c:9042/k", "ONE", "u", Secret("env:P"), 3)
    given = config_of("--kafka_bootstrap_servers=flag:9092")
    assert given.kafka.bootstrap_servers == "flag:9092"


def test_beam_gets_its_own_flags_and_warns_of_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        _, options = parse(
            ["--temp_location=/tmp/x", "--direct_num_workers", "2", "--window_s=30", "--overwrite"]
        )
        everything = options.get_all_options(drop_default=True)
    assert options.view_as(GoogleCloudOptions).temp_location == "/tmp/x"
    assert options.view_as(DirectOptions).direct_num_workers == 2
    assert options.view_as(ActivityOptions).window_s == 30
    assert everything == {
        "temp_location": "/tmp/x",
        "direct_num_workers": 2,
        "window_s": 30,
        "overwrite": True,
    }
    assert caplog.messages == []


def test_help_prints_our_groups_then_beams(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[:10] == [
        "options:",
        "input:",
        "output:",
        "kafka:",
        "cassandra:",
        "time rule:",
        "windows:",
        "state:",
        "demo:",
        "Beam: StandardOptions:",
    ]


def test_the_help_of_every_flag_of_ours_names_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    ours = capsys.readouterr().out.split("\ninput:\n")[1].split("\nBeam: ")[0]
    assert ours.count("  --") == ours.count("(default:") == 36


CLUSTER = (
    *("--runner=FlinkRunner", "--input=kafka:views", "--kafka_bootstrap_servers=b:9092"),
    *("--database=env:URL", "--lake=/lake", "--enriched=kafka:e", "--dead_letters=kafka:d"),
)


@pytest.mark.parametrize(
    ("flags", "shards", "window_shards"),
    [
        (["--parallelism=1"], 2, 1),
        (["--parallelism=6"], 12, 6),
        (["--parallelism=100"], 128, 64),
        (["--parallelism=6", "--shards=3"], 3, 1),
        (["--shards=1"], 1, 1),
    ],
)
def test_state_is_divided_for_the_parallelism_unless_told_otherwise(flags, shards, window_shards):
    config = config_of(*CLUSTER, *flags)
    assert (config.shards, config.window_shards) == (shards, window_shards)


def test_in_this_process_windows_are_not_divided():
    assert config_of("--shards=4").window_shards == 1


def test_state_can_go_on_with_the_flags_it_was_made_with_only():
    same = config_of(*CLUSTER, "--shards=4", "--early_firing_s=1", "--kafka_start=latest")
    assert same.state_settings == (
        "--shards=4 --dedupe=auto --out_of_orderness_s=120 --allowed_lateness_s=120 "
        "--window_s=60 --users_window_s=300 --users_period_s=60 --session_gap_s=1800"
    )
    for flag in (
        *("--shards=5", "--dedupe=none", "--out_of_orderness_s=1", "--allowed_lateness_s=1"),
        *("--window_s=1", "--users_window_s=60", "--users_period_s=1", "--session_gap_s=1"),
    ):
        assert config_of(*CLUSTER, flag).state_settings != config_of(*CLUSTER).state_settings, flag


def test_state_results_and_a_key_belong_together(monkeypatch):
    fingerprints = set()
    monkeypatch.setenv("OTHER", "another of many bytes")
    monkeypatch.setenv("KEY", "a key of many bytes")
    for flag in ("--hash_key=env:KEY", "--hash_key=env:OTHER"):
        config = config_of(*CLUSTER, flag)
        fingerprint = config.settings_identity()["hash_key"]
        assert re.fullmatch("[0-9a-f]{8}", fingerprint)
        assert config.state_settings.endswith(f" --hash_key of fingerprint {fingerprint}")
        assert "many bytes" not in repr(config)
        fingerprints.add(fingerprint)
    assert len(fingerprints) == 2
    assert "hash_key" not in config_of(*CLUSTER).settings_identity()
    assert "hash_key" not in config_of(*CLUSTER).state_settings


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        (None, "--hash_key: the environment variable KEY is not set in this process"),
        ("", "--hash_key: the secret env:KEY is empty"),
        ("fifteen bytes..", "--hash_key: the key in env:KEY has 15 bytes, fewer than 16"),
    ],
)
def test_a_key_that_is_missing_or_short_is_refused(secret, message, monkeypatch, capsys):
    if secret is None:
        monkeypatch.delenv("KEY", raising=False)
    else:
        monkeypatch.setenv("KEY", secret)
    with pytest.raises(SystemExit) as exit:
        parse(["--hash_key=env:KEY"])
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(message)
    assert "fifteen" not in shown


def test_a_key_that_is_given_itself_is_not_shown(capsys):
    with pytest.raises(SystemExit):
        parse(["--hash_key=0123456789abcdef"])
    shown = capsys.readouterr().err
    assert shown.startswith("--hash_key: a secret is given as env:NAME or file:PATH")
    assert "0123456789abcdef" not in shown


def test_what_decides_the_results_is_their_identity():
    same = config_of("--output=elsewhere", "--early_firing_s=1", "--overwrite")
    assert same.settings_identity() == config_of().settings_identity()
    for flag in (
        *("--format=avro", "--fields=user_id=uid", "--event_types=a=click", "--dedupe=none"),
        *("--out_of_orderness_s=1", "--allowed_lateness_s=1", "--future_tolerance_s=1"),
        *("--as_of=1", "--window_s=1", "--users_window_s=60", "--users_period_s=1"),
        "--session_gap_s=1",
    ):
        assert config_of(flag).settings_identity() != config_of().settings_identity(), flag
