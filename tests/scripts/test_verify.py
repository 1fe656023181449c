import json
import socket
from datetime import UTC, datetime, timedelta
from functools import partial

import pyarrow as pa
import pytest

from beam_pipelines.io.kafka.client import KafkaCluster, Topic
from beam_pipelines.kernels.ndjson import NdjsonDecoder
from beam_pipelines.model.activity import ACTIVITY
from scripts import verify
from scripts.verify import Check, Mark, Report, WrongState
from tests.rest_metrics import counting

AT = datetime(2026, 1, 5, 9, 30, 20, tzinfo=UTC)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def report(lines):
    return Report(say=lines.append)


# ── the report ──────────────────────────────────────────────────────────────


def test_a_check_that_finds_something_passes(report, lines):
    assert report.run(Check("topic a", lambda: "4 partitions", "make it"))
    assert (lines, report.failed) == (["pass  topic a: 4 partitions"], [])


def test_a_failure_shows_the_first_line_of_its_reason_and_the_remedy(report, lines):
    def look():
        raise ConnectionError("no broker answers\nat all")

    assert not report.run(Check("topic a", look, "start it"))
    assert lines == ["FAIL  topic a: no broker answers\n      → start it"]
    assert report.failed == ["topic a"]


def test_a_topic_that_producers_stamp_fails_with_both_remedies(report, lines, monkeypatch):
    topic = Topic("mine", "id", (0, 1), "CreateTime", -1)
    monkeypatch.setattr(verify, "topic_partitions", lambda cluster, topics: {"mine": topic})
    cluster = KafkaCluster("broker:9092")
    assert verify.topic_state(cluster, "mine", broker_time=False) == "2 partitions, CreateTime"
    look = partial(verify.topic_state, cluster, "mine", broker_time=True)
    report.run(Check("topic mine", look, "make it"))
    assert lines == [
        "FAIL  topic mine: its records carry CreateTime, so lateness can't be judged\n"
        "      → kafka-configs.sh --bootstrap-server broker:9092 --alter --entity-type topics "
        "--entity-name mine --add-config message.timestamp.type=LogAppendTime; "
        "or run the job with --append_time=producer"
    ]


def test_what_needs_something_that_failed_is_left_out(report, lines):
    def down():
        raise ConnectionError("down")

    assert not report.run(Check("Kafka", down, "start it"))
    assert not report.run(Check("topic a", down, "make it", needs="Kafka"))
    assert report.run(Check("Postgres", lambda: None, "start it"))
    assert lines[1:] == ["skip  topic a: needs Kafka", "pass  Postgres: is there"]
    assert report.failed == ["Kafka"]


class Clock:
    """Time that passes only where somebody sleeps."""

    now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_what_arrives_is_reported_when_it_does_and_the_rest_when_patience_ends(report, lines):
    clock = Clock()

    def after(seconds, error=None):
        def look():
            if clock() - 100 >= seconds:
                return f"row {seconds}"
            if error:
                raise error
            return None

        return look

    checks = [
        Check("slow", after(2, OSError("file was replaced")), "-"),
        Check("never", after(99), "look there"),
        Check("broken", after(99, OSError("refused")), "look here"),
        Check("fast", after(1), "-"),
    ]
    report.run_until(checks, 5, clock, clock.sleep)
    assert lines == [
        "pass  fast: row 1, after 1.0 s",
        "pass  slow: row 2, after 2.0 s",
        "FAIL  never: nothing arrived within 5 s\n      → look there",
        "FAIL  broken: refused within 5 s\n      → look here",
    ]
    assert report.failed == ["never", "broken"]
    assert clock() == pytest.approx(105.5)


# ── Flink ───────────────────────────────────────────────────────────────────


class Flink:
    """Answers like a cluster's REST."""

    def __init__(self, *jobs, exceptions=()):
        self.answers = {
            "/jobs/overview": {"jobs": list(jobs)},
            "/jobs/b/exceptions": {"exceptionHistory": {"entries": list(exceptions)}},
        }

    def get(self, path):
        return self.answers[path]


def job(jid, start, state="RUNNING", running=33, end=-1):
    return {
        "jid": jid,
        "name": f"activity-{jid}",
        "state": state,
        "start-time": start,
        "end-time": end,
        "duration": 65_400,
        "tasks": {"total": 33, "running": running, "finished": 0},
    }


def test_the_job_is_the_newest_that_has_not_ended():
    flink = Flink(job("a", 1), job("b", 2), job("c", 3, state="CANCELED", end=4))
    assert verify.job_state(flink) == "activity-b runs since 0:01:05"


def test_without_a_job_it_says_so():
    with pytest.raises(WrongState, match=r"^no job runs$"):
        verify.job_state(Flink(job("a", 1, state="FAILED", end=2)))


@pytest.mark.parametrize(("state", "running"), [("RESTARTING", 0), ("RUNNING", 32)])
def test_a_job_of_which_not_all_runs_shows_its_last_failure(state, running):
    failed = {"stacktrace": "java.lang.RuntimeException: worker lost\n\tat x"}
    flink = Flink(job("b", 2, state=state, running=running), exceptions=[failed])
    with pytest.raises(WrongState) as raised:
        verify.job_state(flink)
    assert str(raised.value) == (
        f"activity-b is {state}, {running} of 33 tasks run; "
        "its last failure: java.lang.RuntimeException: worker lost"
    )


def checkpoints(completed=None, failed=None):
    return {
        "counts": {"total": 7, "completed": 5},
        "latest": {
            "completed": completed
            and {
                "latest_ack_timestamp": completed * 1000,
                "state_size": 2_400_000,
                "end_to_end_duration": 1_700,
            },
            "failed": failed and {"failure_message": failed},
        },
    }


def test_a_fresh_checkpoint_passes_whatever_failed_before():
    found = verify.checkpoint_state(checkpoints(completed=1_000, failed="expired"), 1_060)
    assert found == "5 completed, the last one 60 s ago, 2.4 MB of state, 1.7 s"


def test_an_old_checkpoint_fails_with_the_last_reason():
    with pytest.raises(WrongState, match=r"the last one 61 s ago.*; the last failure: expired$"):
        verify.checkpoint_state(checkpoints(completed=1_000, failed="expired"), 1_061)


def test_a_job_without_a_checkpoint_fails():
    with pytest.raises(WrongState, match=r"^none of 7 completed$"):
        verify.checkpoint_state(checkpoints(), 1_000)


def test_a_job_that_dropped_nothing_passes(monkeypatch):
    cluster = counting(monkeypatch, beam_pipelines_read=9, beam_pipelines_older_than_folded=0)
    assert verify.nothing_lost(cluster) == "none since the job was started or restarted"


def test_rows_that_a_stage_or_the_runner_dropped_are_a_failure(report, lines, monkeypatch):
    dropped = {"beam_pipelines_older_than_folded": 3, "Some_Runner_droppedDueToLateness": 1_200}
    cluster = counting(monkeypatch, **dropped)
    assert not report.run(verify.loss_check(cluster))
    assert lines == [
        "FAIL  dropped rows: droppedDueToLateness 1,200, older_than_folded 3 of activity-a, "
        "since it was started or restarted\n"
        "      → the tables lack them, the lake has them: see docs/runbook.md"
    ]


def test_a_cluster_without_a_taskmanager_fails():
    with pytest.raises(WrongState, match="no TaskManager"):
        verify.slots({"slots-total": 0})


def test_a_pool_that_listens_passes_and_another_does_not():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert verify.connected(address) == f"listens at {address}"
    with pytest.raises(ConnectionRefusedError):
        verify.connected(address)


def test_a_lake_that_was_not_written_yet_passes(tmp_path):
    missing = tmp_path / "lake"
    assert verify.lake_state(str(missing)) == f"{missing} will be made by the first record"
    missing.mkdir()
    assert verify.lake_state(str(missing)) == f"{missing} has 0 files"


# ── the marked event ────────────────────────────────────────────────────────


def test_a_mark_is_a_view_then_the_end_of_the_session_and_a_bad_record():
    mark = Mark("verify-1", AT)
    view, end, bad = mark.records
    assert json.loads(view) == {
        "event_id": "verify-1",
        "event_time": "2026-01-05T09:30:20+00:00",
        "user_id": "verify-1",
        "page_url": "/verify-1",
        "event_type": "page_view",
    }
    assert json.loads(end) == {
        **json.loads(view),
        "event_id": "verify-1-end",
        "event_time": "2026-01-05T09:30:20.001000+00:00",
        "event_type": "session_end",
    }
    assert bad == mark.bad == b'{"verify": "verify-1"}'


def test_the_pipeline_takes_two_records_of_a_mark_and_rejects_the_third():
    decoder = NdjsonDecoder(ACTIVITY, {}, {})
    decoded = decoder(pa.array(Mark("verify-1", AT).records, pa.binary()), "user_activity")
    rows = decoded.rows.to_pylist()
    assert [row["event_time"] for row in rows] == [AT, AT + timedelta(milliseconds=1)]
    assert [(each.row, each.reason) for each in decoded.rejections] == [(2, "missing_field")]


def test_two_marks_differ():
    assert Mark().name != Mark().name


def test_a_session_is_due_when_its_minute_can_get_no_more_events():
    # The minute ends at 9:31; lateness and slack of 3 min; the watermark is 2 min 5 s behind.
    due = verify.session_due(AT, out_of_orderness_s=120, allowed_lateness_s=120)
    assert due == datetime(2026, 1, 5, 9, 36, 5, tzinfo=UTC)
    at_the_border = verify.session_due(AT.replace(second=0), 0, 0)
    assert at_the_border == datetime(2026, 1, 5, 9, 32, 5, tzinfo=UTC)
    assert due - AT > timedelta(minutes=5)


# ── the command ─────────────────────────────────────────────────────────────

VARIABLES = {
    "KAFKA_BOOTSTRAP_SERVERS": "broker:9092",
    "ACTIVITY_DATABASE_URL": "postgresql://me:secret@db/activity",
    "FLINK_MASTER": "flink:8081",
    "LAKE": "/lake",
}


@pytest.fixture
def variables(monkeypatch):
    for name in (*VARIABLES, "CASSANDRA", "BEAM_WORKER_POOL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


def places(*argv):
    return verify.places_of(verify._parser().parse_args(argv))


def test_places_come_from_the_environment(variables):
    found = places()
    assert found.kafka.bootstrap_servers == "broker:9092"
    assert (found.flink.url, found.lake) == ("http://flink:8081", "/lake")
    assert (found.cassandra, found.pool) == (None, None)


def test_flags_go_before_the_environment(variables):
    found = places("--cassandra=c:9042/activity", "--flink_master=https://other", "--input=mine")
    assert found.cassandra.address == "c:9042/activity"
    assert (found.flink.url, found.input) == ("https://other", "mine")


def test_what_is_not_used_is_not_checked(variables):
    names = [check.name for check in verify.platform_checks(places())]
    assert names == [
        "Kafka",
        "topic user_activity",
        "topic enriched_activity",
        "topic user_activity.dlq",
        "Postgres",
        "table page_view_counts",
        "table active_users",
        "table user_sessions",
        "Flink",
        "lake",
    ]
    more = verify.platform_checks(places("--cassandra=c:1/k", "--worker_pool=w:2"))
    assert [check.name for check in more if check.name not in names] == [
        "Cassandra",
        "table k.events_by_user",
        "table k.page_views_by_page",
        "worker pool",
    ]


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("LAKE", "neither --lake nor the variable LAKE is given"),
        ("FLINK_MASTER", "neither --flink_master nor the variable FLINK_MASTER is given"),
        ("ACTIVITY_DATABASE_URL", "the environment variable ACTIVITY_DATABASE_URL is not set"),
    ],
)
def test_a_place_that_is_not_named_is_misuse(variables, monkeypatch, capsys, variable, said):
    monkeypatch.delenv(variable)
    assert verify.main([]) == 2
    assert said in capsys.readouterr().err


def run_main(monkeypatch, platform, job, lost=False):
    sent = []

    def state(passes):
        def look():
            if not passes:
                raise WrongState("is down")

        return [Check("it", look, "-")]

    monkeypatch.setattr(verify, "platform_checks", lambda places: state(platform))
    monkeypatch.setattr(verify, "job_checks", lambda flink: state(job))
    monkeypatch.setattr(verify, "loss_check", lambda flink: state(not lost)[0])
    monkeypatch.setattr(verify, "verify_arrivals", lambda *given: sent.append(given))
    return verify.main([]), len(sent)


def test_an_event_is_sent_where_all_is_there(variables, monkeypatch, capsys):
    assert run_main(monkeypatch, True, True) == (0, 1)
    assert capsys.readouterr().out.splitlines()[-1] == "all passed"


def test_a_job_that_drops_rows_is_a_failure_though_the_event_arrives(
    variables, monkeypatch, capsys
):
    assert run_main(monkeypatch, True, True, lost=True) == (1, 1)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "FAIL  it: is down",
        "      → -",
        "1 failed",
    ]


@pytest.mark.parametrize(("platform", "job"), [(False, True), (True, False)])
def test_no_event_is_sent_where_something_is_missing(variables, monkeypatch, capsys, platform, job):
    assert run_main(monkeypatch, platform, job) == (1, 0)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "skip  no event was sent: something that it needs is missing",
        "pass  it: is there",
        "1 failed",
    ]
