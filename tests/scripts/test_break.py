import importlib
import itertools
from types import SimpleNamespace

import duckdb
import pyarrow as pa
import pytest

from beam_pipelines.model.records import TIMESTAMP
from beam_pipelines.model.secret import Secret
from scripts.job import JobError
from tests.io.contract import LONG, shortened_form
from tests.oracle.oracle import Rules, write_raw
from tests.runs import NINE, event, lines_of

breaking = importlib.import_module("scripts.break")  # its name is a keyword

SECOND_US = 1_000_000

FLAGS = {
    "input": "kafka:clicks",
    "appendTime": "broker",
    "database": "env:TABLES",
    "dedupe": "auto",
    "outOfOrdernessS": "3",
    "allowedLatenessS": "4",
    "futureToleranceS": "5",
    "windowS": "6",
    "usersWindowS": "14",
    "usersPeriodS": "7",
    "sessionGapS": "8",
}


@pytest.fixture
def sql():
    with duckdb.connect() as connection:
        yield connection


def relation(sql, name, columns, rows):
    """Create a table with these columns from a string of rows: "a 1, b 2"."""
    sql.execute(f"CREATE TABLE {name} ({columns})")
    for row in filter(None, rows.split(", ")):
        sql.execute(f"INSERT INTO {name} VALUES ({', '.join(map(repr, row.split()))})")


def views(sql, least, most, found):
    for name, rows in (("least_views", least), ("views", most), ("found_views", found)):
        relation(sql, name, "page VARCHAR, n BIGINT", rows)
    compared = breaking.compared_growing(sql, "views", ("page",), "n")
    return compared.equal, compared.moving, compared.behind, compared.wrong


def test_a_row_that_nothing_came_for_lately_must_be_exact(sql):
    assert views(sql, "a 5, b 5, c 5", "a 5, b 5, c 5", "a 5, b 4, c 6") == (1, 0, 1, 1)


def test_a_row_in_motion_lies_between(sql):
    least, most = "a 5, b 5, c 5, d 5", "a 7, b 7, c 7, d 7"
    assert views(sql, least, most, "a 5, b 7, c 4, d 8") == (0, 2, 1, 1)


def test_a_missing_row_is_behind_unless_all_of_it_is_new(sql):
    assert views(sql, "old 2", "old 2, new 1", "") == (0, 1, 1, 0)


def test_a_row_that_no_truth_has_is_wrong(sql):
    assert views(sql, "", "", "a 1") == (0, 0, 0, 1)


def sessions(sql, least, most, found, due_before_us=100):
    """Give sessions as "user start end"."""
    of = "user_id VARCHAR, session_start BIGINT, session_end BIGINT, duration_s DOUBLE, "
    of += "page_views BIGINT, clicks BIGINT, ended_by VARCHAR"
    names = ("least_user_sessions", "user_sessions", "found_user_sessions")
    for name, rows in zip(names, (least, most, found), strict=True):
        spelled = ", ".join(f"{row} 1 1 1 timeout" for row in filter(None, rows.split(", ")))
        relation(sql, name, of, spelled)
    compared = breaking.compared_sessions(sql, due_before_us)
    return compared.equal, compared.moving, compared.behind, compared.wrong


def test_a_session_is_due_once_nothing_can_change_it(sql):
    both = "a 10 99, b 10 100"
    assert sessions(sql, both, both, "") == (0, 1, 1, 0)


def test_a_session_that_late_events_changed_lately_is_in_motion(sql):
    assert sessions(sql, "a 10 20", "a 10 30", "") == (0, 1, 0, 0)


def test_a_stored_session_is_exactly_the_truth_and_there_once(sql):
    truth = "a 10 20, b 10 20"
    assert sessions(sql, truth, truth, "a 10 20, b 10 30, b 10 20, b 10 20") == (2, 0, 0, 2)


def test_rows_of_texts_too_long_for_a_key_equal_the_truth(monkeypatch, tmp_path):
    user, page = LONG
    [payload] = lines_of([event(1, user=user, url=page)])
    at_us = int(NINE.timestamp()) * SECOND_US
    window = (at_us, at_us + 60 * SECOND_US)
    tables = {
        "page_view_counts": [(*window, shortened_form(page), 1)],
        "active_users": [],
        "user_sessions": [
            (shortened_form(user), at_us + SECOND_US, at_us + SECOND_US, 0.0, 1, 0, "timeout")
        ],
    }

    def dump(servers, topic, path):
        append_time = pa.array([at_us + 2 * SECOND_US]).cast(TIMESTAMP)
        record = {"payload": [payload], "offset": [0], "append_time": append_time}
        write_raw(path, [(topic, pa.RecordBatch.from_pydict(record))])

    def rows(database, table, columns):
        types = {"page_url": pa.string(), "user_id": pa.string(), "ended_by": pa.string()}
        types["duration_s"] = pa.float64()
        schema = pa.schema([(name, types.get(name, pa.int64())) for name in columns])
        made = [dict(zip(columns, row, strict=True)) for row in tables[table]]
        return pa.Table.from_pylist(made, schema=schema)

    monkeypatch.setattr(breaking, "dump", dump)
    monkeypatch.setattr(breaking, "_rows", rows)
    settings = breaking.Settings("clicks", "k:1", "postgresql://", Rules(at_us))
    pages, _, users = breaking.compare(settings, tmp_path)
    assert pages == breaking.Compared("page_view_counts", equal=1, moving=0, behind=0, wrong=0)
    assert users == breaking.Compared("user_sessions", equal=1, moving=0, behind=0, wrong=0)


def test_sessions_are_due_after_minute_gap_lateness_and_slack():
    rules = Rules(0, out_of_orderness_s=3, allowed_lateness_s=4, session_gap_s=61)
    waits_s = 60 + 120 + 3 + 4 + 60 + 5 + 30
    now_us = 10_000 * SECOND_US
    assert breaking.due_before_us(rules, now_us) == now_us - waits_s * SECOND_US


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setenv("TABLES", "postgresql://u:p@host/db")


@pytest.mark.parametrize(
    ("flags", "environment", "servers"),
    [
        ({"kafkaBootstrapServers": "a:1"}, {"KAFKA_BOOTSTRAP_SERVERS": "b:2"}, "a:1"),
        ({}, {"KAFKA_BOOTSTRAP_SERVERS": "b:2"}, "b:2"),
    ],
)
def test_the_settings_are_those_of_the_running_job(tables, flags, environment, servers):
    settings = breaking.settings_of({**FLAGS, **flags}, environment)
    assert (settings.topic, settings.bootstrap_servers) == ("clicks", servers)
    assert settings.database == Secret("env:TABLES")
    assert settings.rules == Rules(
        as_of_us=0,
        out_of_orderness_s=3,
        allowed_lateness_s=4,
        future_tolerance_s=5,
        window_s=6,
        users_window_s=14,
        users_period_s=7,
        session_gap_s=8,
        dedupe="event_id",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"appendTime": "producer"}, "--append_time=producer can't be compared"),
        ({"input": "kafka:a,b"}, "--input=kafka:a,b"),
        ({"database": "env:NOT_HERE"}, "NOT_HERE is not set"),
    ],
)
def test_a_job_that_can_not_be_compared_is_refused_before_it_is_broken(tables, flags, message):
    with pytest.raises(JobError, match=message):
        breaking.settings_of({**FLAGS, **flags}, {"KAFKA_BOOTSTRAP_SERVERS": "b:2"})


def test_another_pipeline_is_left_alone():
    with pytest.raises(JobError, match=r"none of beam_pipelines\.activity"):
        breaking.settings_of({"input": "kafka:a"}, {})


class FakeJobs:
    """Tells of a job that is restored at the third look."""

    def __init__(self, state_size, restored_at_ms):
        self.cluster = self
        self.looks = itertools.count(1)
        self.state_size = state_size
        self.restored_at_ms = restored_at_ms

    def checkpoints(self, job):
        restored = {"id": 5, "restore_timestamp": self.restored_at_ms}
        return {"latest": {"restored": restored if next(self.looks) > 2 else None}}

    def get(self, path):
        assert path == "/jobs/j/checkpoints/details/5"
        return {"id": 5, "state_size": self.state_size}


def test_the_job_must_go_on_from_state(monkeypatch):
    monkeypatch.setattr(breaking, "_POLL_S", 0)
    restored = breaking._await_restored(FakeJobs(123, 2000), "j", since_ms=1000)
    assert restored == {"id": 5, "restore_timestamp": 2000, "state_size": 123}
    with pytest.raises(JobError, match="checkpoint 5, that the job goes on from, is empty"):
        breaking._await_restored(FakeJobs(0, 2000), "j", since_ms=1000)


def test_an_earlier_restore_does_not_count(monkeypatch):
    monkeypatch.setattr(breaking, "_POLL_S", 0)
    monkeypatch.setattr(breaking, "RESTORE_S", 0.05)
    with pytest.raises(JobError, match=r"has not gone on from a checkpoint within 0\.05 s"):
        breaking._await_restored(FakeJobs(123, 999), "j", since_ms=1000)


@pytest.fixture
def broken(monkeypatch):
    """Break a job that recovers at once; what it dropped before and after is given."""

    def run(before, after, wrong=0):
        lost = iter((before, after))
        flags = {**FLAGS, "kafkaBootstrapServers": "a:1"}
        cluster = SimpleNamespace(
            lost=lambda job: next(lost),
            get=lambda path: {"execution-config": {"user-config": flags}},
        )
        checkpoint = {"id": 4, "state_size": 100}
        jobs = SimpleNamespace(
            one=lambda wanted: "j",
            cluster=cluster,
            checkpoints=lambda job: {"latest": {"completed": checkpoint}},
        )
        restored = {"id": 5, "state_size": 100, "restore_timestamp": 0}
        database = SimpleNamespace(close=lambda: None)
        monkeypatch.setattr(breaking, "_connected", lambda secret: database)
        monkeypatch.setattr(breaking, "_kill_a_worker", lambda stack: 1)
        monkeypatch.setattr(breaking, "_await_restored", lambda *given: restored)
        monkeypatch.setattr(breaking, "SETTLE_S", 0)
        compared = breaking.Compared("views", 1, 0, 0, wrong)
        monkeypatch.setattr(breaking, "compare", lambda *given: [compared])
        return breaking.run(jobs, None)

    return run


def test_equal_tables_and_nothing_dropped_pass(tables, broken, capsys):
    assert broken({}, {}) == 0
    assert capsys.readouterr().err == ""


def test_rows_that_were_dropped_before_or_after_the_kill_are_a_failure(tables, broken, capsys):
    assert broken({"older_than_folded": 1}, {"droppedDueToLateness": 2_000}) == 1
    assert broken({"older_than_folded": 1}, {"older_than_folded": 2}) == 1
    assert capsys.readouterr().err.splitlines() == [
        "The job dropped rows: droppedDueToLateness is 2,000, not 0.",
        "The job dropped rows: older_than_folded is 1, not 0.",
        "The job dropped rows: older_than_folded is 3, not 0.",
    ]


def test_wrong_rows_are_a_failure(tables, broken, capsys):
    assert broken({}, {}, wrong=1) == 1
    assert capsys.readouterr().err == "The tables differ from the truth.\n"
