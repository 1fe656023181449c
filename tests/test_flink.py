import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from apache_beam.runners.worker import worker_pool_main

from beam_pipelines import flink
from beam_pipelines.flink import (
    Cluster,
    failure,
    notes,
    options_for,
    python_error,
    wait_until_running,
)
from beam_pipelines.kernels.key_groups import MAX_PARALLELISM
from beam_pipelines.telemetry import NAMESPACE
from tests.integration.sockets import listening
from tests.rest_metrics import MetricsOfAJob, counting

JAVA = """\
org.apache.flink.runtime.JobException: Recovery is suppressed
\tat org.apache.flink.X.y(X.java:1)
Caused by: java.lang.RuntimeException: Error received: Traceback (most recent call last):
  File "common.py", line 1512, in process
  File "source.py", line 3, in check
beam_pipelines.io.kafka.fetch.SourceError: offset 5 is not there

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "sdk_worker.py", line 310, in _execute
beam_pipelines.io.kafka.fetch.SourceError: offset 5 is not there [while running 'Poll-ptransform-1']

\tat org.apache.beam.Z.z(Z.java:1)
"""


class Answers(dict):
    """The REST API of a cluster: path → what it says; lists say one thing after another."""

    url: str

    def say(self, path):
        answer = self[path]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return answer


@contextmanager
def serving(answers):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path in answers
            self.send_response(200 if known else 404)
            self.end_headers()
            if known:
                self.wfile.write(json.dumps(answers.say(self.path)).encode())

        def do_HEAD(self):
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        answers.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield answers
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def rest(monkeypatch):
    clock = SimpleNamespace(now_s=0.0)

    def sleep(seconds):
        clock.now_s += seconds

    moved = SimpleNamespace(
        monotonic=lambda: clock.now_s,
        sleep=sleep,
        strftime=lambda *_: "20260105-090000",
        gmtime=tuple,
    )
    monkeypatch.setattr(flink, "time", moved)
    answers = Answers(
        {"/overview": {"slots-total": 4, "slots-available": 4, "flink-version": "1.19.3"}}
    )
    with serving(answers):
        yield answers


ENVIRONMENT = {"BEAM_WORKER_POOL": "127.0.0.1:25000"}


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A job server that was built here; Beam's own can't be had."""
    jar = tmp_path / "beam-flink-job-server.jar"
    jar.write_bytes(b"")
    monkeypatch.setattr(flink, "BUILT_JAR", jar)
    monkeypatch.setattr(flink, "OFFICIAL_URL", "http://127.0.0.1:1/{flink}/{beam}.jar")
    monkeypatch.setattr(flink.os, "cpu_count", lambda: 2)
    return jar


def chosen(rest, *argv, endless=True, **environment):
    added = options_for(argv, "activity", endless, {"FLINK_MASTER": rest.url, **environment})
    return dict(each.removeprefix("--").partition("=")[::2] for each in added)


def test_what_is_left_open_suits_the_cluster(rest, built):
    assert chosen(rest, **ENVIRONMENT) == {
        "flink_master": rest.url,
        "flink_version": "1.19",
        "flink_job_server_jar": str(built),
        "job_name": "activity-20260105-090000",
        "parallelism": "2",  # the cores, as cluster and workers share them
        "max_parallelism": str(MAX_PARALLELISM),
        "sdk_worker_parallelism": "2",
        "max_bundle_size": "50",
        "max_bundle_time_mills": "100",
        "experiments": "data_buffer_size_limit=1",
        "streaming": "",
        "checkpointing_interval": "10000",
        "externalized_checkpoints_enabled": "",
        "retain_externalized_checkpoints_on_cancellation": "",
        "fail_on_checkpointing_errors": "",
        "finish_bundle_before_checkpointing": "",
        "environment_type": "EXTERNAL",
        "environment_config": "127.0.0.1:25000",
    }


def test_what_is_given_stays(rest, built):
    added = chosen(
        rest,
        *("--parallelism=1", "--checkpointing_interval=500", "--streaming"),
        *("--environment_type", "DOCKER", "--job_endpoint=there:8099"),
        **ENVIRONMENT,
    )
    assert added["sdk_worker_parallelism"] == "1"
    given = {"parallelism", "checkpointing_interval", "streaming", "environment_type"}
    assert not added.keys() & (given | {"environment_config", "flink_job_server_jar"})


def test_input_that_ends_takes_no_checkpoints(rest, built):
    assert not chosen(rest, endless=False).keys() & {"streaming", "checkpointing_interval"}


def test_without_a_pool_workers_are_processes_of_this_machine(rest, built):
    added = chosen(rest)
    assert added["environment_type"] == "LOOPBACK"
    flags = options_for([f"--flink_master={rest.url}"], "activity", True, {})
    assert [flag for flag in flags if flag.startswith("--experiments=")] == [
        "--experiments=data_buffer_size_limit=1",
        "--experiments=use_loopback_process_worker",
    ]


def test_an_experiment_that_is_named_stays_and_the_others_are_added(rest, built):
    for given in (["--experiments=data_buffer_size_limit=9"], ["--experiments", "mine"]):
        flags = options_for([f"--flink_master={rest.url}", *given], "activity", True, ENVIRONMENT)
        added = [flag for flag in flags if "experiments" in flag]
        assert added == ["--experiments=data_buffer_size_limit=1"] * (given[-1] == "mine")


def test_the_flag_wins_over_the_environment(rest, built):
    added = options_for(
        [f"--flink_master={rest.url}"], "activity", True, {"FLINK_MASTER": "127.0.0.1:1"}
    )
    assert f"--flink_master={rest.url}" not in added
    assert "--parallelism=2" in added


def test_an_address_needs_no_scheme(rest, built):
    added = chosen(rest, **{"FLINK_MASTER": rest.url.removeprefix("http://")})
    assert added["flink_master"] == rest.url


def test_without_a_cluster_beam_starts_one_in_the_job_server(built):
    for argv, environment in (([], {}), (["--flink_master=[auto]"], {})):
        added = options_for(argv, "activity", True, environment)
        assert "--parallelism=2" in added
        assert "--flink_version=1.19" in added


def test_a_cluster_that_does_not_answer_is_told(built):
    with pytest.raises(ValueError) as raised:
        options_for([], "activity", True, {"FLINK_MASTER": "127.0.0.1:1"})
    assert str(raised.value) == (
        "no Flink cluster answers at http://127.0.0.1:1 ([Errno 111] Connection refused); is it "
        "running, and is --flink_master=HOST:PORT right?"
    )


def test_a_cluster_without_workers_is_told(rest, built):
    rest["/overview"] = {"slots-total": 0, "slots-available": 0, "flink-version": "1.19.3"}
    with pytest.raises(ValueError, match="has no TaskManager as yet"):
        chosen(rest)


def test_slots_that_another_job_has_are_told(rest, built):
    rest["/overview"] = {"slots-total": 4, "slots-available": 1, "flink-version": "1.19.3"}
    with pytest.raises(ValueError, match="has 1 of 4 slots free, and the job needs 2: stop the"):
        chosen(rest)
    assert "parallelism" not in chosen(rest, "--parallelism=1")


def test_beams_own_job_server_is_preferred_where_it_can_be_had(rest, built, monkeypatch):
    rest["/overview"] = {"slots-total": 4, "slots-available": 4, "flink-version": "2.2.0"}
    monkeypatch.setattr(flink, "OFFICIAL_URL", f"{rest.url}/{{flink}}.jar")
    rest["/2.2.jar"] = {}
    assert "flink_job_server_jar" not in chosen(rest)
    assert notes([]) == ["job server: Beam's official one"]


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("2.2.0", "for Flink 2.2: the official one can't be downloaded"),
        ("1.13.1", "publishes none for Flink 1.13"),
    ],
)
def test_no_job_server_for_this_flink_is_told_with_the_remedies(rest, built, version, why):
    rest["/overview"] = {"slots-total": 4, "slots-available": 4, "flink-version": version}
    with pytest.raises(ValueError) as raised:
        chosen(rest)
    assert why in str(raised.value)
    assert "make build-flink" in str(raised.value)
    assert "--flink_job_server_jar=PATH" in str(raised.value)


def test_a_job_server_that_was_never_built_is_told(rest, built):
    built.unlink()
    with pytest.raises(ValueError, match="make build-flink"):
        chosen(rest)


@pytest.mark.parametrize(
    ("jar", "leaks"),
    [("BUILT", False), ("/x/job-server-2.75.0.jar", True), ("/x/job-server-2.76.0.jar", False)],
)
def test_a_job_server_that_leaks_is_told(jar, leaks, built):
    jar = str(built) if jar == "BUILT" else jar
    first, *rest = notes([f"--flink_job_server_jar={jar}"])
    assert first == f"job server: {jar}"
    assert ["27648" in line for line in rest] == [True] * leaks


def test_a_job_server_that_runs_already_is_named():
    assert notes(["--job_endpoint=there:8099"]) == ["job server: the one at there:8099"]


# Whether the job came up


def jobs(*names):
    return {"jobs": [{"jid": f"id-{name}", "name": name} for name in names]}


def completed(count):
    return {"counts": {"completed": count}}


def test_a_job_runs_once_it_has_a_checkpoint(rest):
    rest["/jobs/overview"] = [jobs(), jobs("other"), jobs("other", "mine")]
    rest["/jobs/id-mine"] = {"state": "RUNNING"}
    rest["/jobs/id-mine/checkpoints"] = [{}, completed(0), completed(1)]
    rest["/jobs/id-mine/exceptions"] = {"exceptionHistory": {"entries": []}}
    told = []
    assert wait_until_running(Cluster(rest.url), "mine", told.append) == "id-mine"
    assert told == []
    assert rest["/jobs/id-mine/checkpoints"] == [completed(1)]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_job_that_ended_is_told_with_its_cause(rest, state):
    rest["/jobs/overview"] = jobs("mine")
    rest["/jobs/id-mine"] = [{"state": "RUNNING"}, {"state": "RESTARTING"}, {"state": state}]
    rest["/jobs/id-mine/checkpoints"] = {}
    rest["/jobs/id-mine/exceptions"] = {"exceptionHistory": {"entries": [{"stacktrace": JAVA}]}}
    with pytest.raises(RuntimeError) as raised:
        wait_until_running(Cluster(rest.url), "mine", print)
    assert str(raised.value) == (
        f"the job {state.lower()}: beam_pipelines.io.kafka.fetch.SourceError: offset 5 is not there"
    )


def test_each_cause_is_told_once_while_the_job_is_tried_again(rest):
    rest["/jobs/overview"] = jobs("mine")
    rest["/jobs/id-mine"] = [*[{"state": "RESTARTING"}] * 4, {"state": "RUNNING"}]
    rest["/jobs/id-mine/checkpoints"] = [*[completed(0)] * 4, completed(1)]
    first, second = ({"stacktrace": f"java.lang.{name}\n\tat x"} for name in ("First", "Second"))
    rest["/jobs/id-mine/exceptions"] = [
        {"exceptionHistory": {"entries": entries}}
        for entries in ([], [first], [first], [second, first])
    ]
    told = []
    assert wait_until_running(Cluster(rest.url), "mine", told.append) == "id-mine"
    assert told == [
        "the job failed, and Flink tries it again: java.lang.First",
        "the job failed, and Flink tries it again: java.lang.Second",
    ]


def test_a_job_that_never_comes_is_told(rest):
    rest["/jobs/overview"] = jobs("other")
    with pytest.raises(RuntimeError) as raised:
        wait_until_running(Cluster(rest.url), "mine", print, patience_s=60)
    assert str(raised.value) == (
        "after 60 s the job has no checkpoint: it never reached the cluster"
    )


def test_a_job_without_a_checkpoint_is_told(rest):
    rest["/jobs/overview"] = jobs("mine")
    rest["/jobs/id-mine"] = {"state": "RUNNING"}
    rest["/jobs/id-mine/checkpoints"] = completed(0)
    rest["/jobs/id-mine/exceptions"] = {"exceptionHistory": {"entries": []}}
    with pytest.raises(RuntimeError, match="no checkpoint: no exception is known"):
        wait_until_running(Cluster(rest.url), "mine", print, patience_s=60)


def test_the_last_failure_is_the_one_told(rest):
    entries = [{"stacktrace": "java.lang.Second\n\tat x"}, {"stacktrace": "java.lang.First"}]
    rest["/jobs/id-mine/exceptions"] = {"exceptionHistory": {"entries": entries}}
    assert failure(Cluster(rest.url), "id-mine") == "java.lang.Second"


@pytest.mark.parametrize(
    ("stacktrace", "error"),
    [
        (JAVA, "beam_pipelines.io.kafka.fetch.SourceError: offset 5 is not there"),
        (
            "java.lang.OutOfMemoryError: heap\n\tat x.y(Z.java:1)",
            "java.lang.OutOfMemoryError: heap",
        ),
        ("java.lang.A: no\n\tat x\nCaused by: java.lang.B: slots\n\tat y", "java.lang.B: slots"),
        ("", "unknown"),
        (
            "java.lang.RuntimeException: Error received from SDK harness for instruction 1: "
            'Traceback (most recent call last):\n  File "a.py", line 1, in b\n'
            "beam_pipelines.model.secret.MissingSecret: env:NAME isn't set\n\n\tat z",
            "beam_pipelines.model.secret.MissingSecret: env:NAME isn't set",
        ),
    ],
)
def test_the_line_of_pythons_error_is_found(stacktrace, error):
    assert python_error(stacktrace) == error


def test_workers_that_the_driver_starts_listen_on_this_machine_only(monkeypatch):
    monkeypatch.setattr(worker_pool_main, "grpc", worker_pool_main.grpc)  # as it was, afterwards
    monkeypatch.setattr(worker_pool_main.atexit, "register", lambda function: None)
    flink.listen_here_only()
    address, server = worker_pool_main.BeamFnExternalWorkerPoolServicer.start()
    try:
        host, _, port = address.partition(":")
        assert host == "localhost"
        found = [each for each in listening([os.getpid()]) if each.port == int(port)]
        assert [each.is_here_only for each in found] == [True]
    finally:
        server.stop(0).wait()


# ── metrics ─────────────────────────────────────────────────────────────────

PARSE, FOLD = "[2]Read/{Poll__Parse}", "[1]{Sessionize}"
DROPPED = "org_apache_beam_runners_core_LateDataDroppingDoFnRunner_droppedDueToLateness"


def test_counters_are_summed_over_operators_and_subtasks_under_their_own_names(monkeypatch):
    cluster = MetricsOfAJob(
        "a",
        {
            "1": {
                f"{PARSE}.{NAMESPACE}_read": [3, 4],
                f"{PARSE}.{NAMESPACE}_invalid": [1, 0],
                f"{PARSE}.{NAMESPACE}_invalid_bad_time": [1, 0],
                f"{PARSE}.numRecordsIn": [70, 70],
                "numRecordsIn": [70, 70],
            },
            "2": {
                f"{FOLD}.{NAMESPACE}_rows_written_active_users": [2],
                f"{FOLD}.{NAMESPACE}_read": [10],
            },
        },
        monkeypatch,
    )
    assert cluster.counters("a") == {
        "read": 17,
        "invalid": 1,
        "invalid.bad_time": 1,
        "rows_written.active_users": 2,
    }
    assert not any("numRecordsIn" in path for path in cluster.asked)


def test_what_was_dropped_is_found_by_whoever_counts_it(monkeypatch):
    cluster = counting(
        monkeypatch,
        **{
            f"{NAMESPACE}_read": 9,
            f"{NAMESPACE}_older_than_folded": 2,
            DROPPED: 3,
            DROPPED.replace("LateDataDropping", "Stateful"): 4,
            "numLateRecordsDropped": 0,
        },
    )
    assert cluster.lost("a") == {"older_than_folded": 2, "droppedDueToLateness": 7}
    assert counting(monkeypatch, **{f"{NAMESPACE}_older_than_folded": 0}).lost("a") == {}


def test_many_long_names_are_asked_for_in_several_requests(monkeypatch):
    many = {f"{NAMESPACE}_{'long &,' * 10}{number}": 1 for number in range(200)}
    cluster = MetricsOfAJob(
        "a", {"v": {f"{PARSE}.{n.replace(',', '_')}": [1] for n in many}}, monkeypatch
    )
    assert sum(cluster.counters("a").values()) == 200
    assert len(cluster.asked) > 5
