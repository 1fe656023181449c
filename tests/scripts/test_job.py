import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from scripts import job
from scripts.job import main
from tests.rest_metrics import counting


class FakeFlink:
    """Answers as a JobManager would, and keeps what it was sent."""

    def __init__(self):
        self.jobs = {}  # id → (name, state, latest checkpoint)
        self.settings = {}
        self.savepoints = []  # answers to come
        self.sent = []
        flink = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(flink.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                flink.sent.append((self.command, self.path, body))
                self.answer({"request-id": "trigger"})

            do_PATCH = do_POST  # noqa: N815

            def answer(self, value):
                body = json.dumps(value).encode()
                self.send_response(404 if value is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def get(self, path):
        if path == "/jobs/overview":
            return {
                "jobs": [
                    {"jid": jid, "name": name, "state": state, "start-time": 1000 * i}
                    for i, (jid, (name, state, _)) in enumerate(self.jobs.items())
                ]
            }
        if path == "/jobmanager/config":
            return [{"key": key, "value": value} for key, value in self.settings.items()]
        match path.split("/")[2:]:
            case [jid, "checkpoints"]:
                completed = self.jobs[jid][2]
                counts = {"completed": 0 if completed is None else 7}
                return {"counts": counts, "latest": {"completed": completed}}
            case [_, "savepoints", "trigger"]:
                return self.savepoints.pop(0)
        return None


@pytest.fixture
def flink():
    flink = FakeFlink()
    thread = threading.Thread(target=flink.server.serve_forever, args=(0.01,))
    thread.start()
    yield flink
    flink.server.shutdown()
    thread.join()
    flink.server.server_close()


@pytest.fixture
def run(flink, tmp_path, capsys):
    """Run a command; returns exit code, stdout, stderr."""

    def run(*arguments):
        code = main([f"--flink_master={flink.address}", f"--store={tmp_path}/of/last", *arguments])
        return code, *capsys.readouterr()

    return run


def checkpoint(path, size=0):
    return {"external_path": path, "state_size": size}


def in_progress():
    return {"status": {"id": "IN_PROGRESS"}}


def completed(**operation):
    return {"status": {"id": "COMPLETED"}, "operation": operation}


def test_the_list_shows_the_youngest_first_and_the_checkpoints_of_those_that_run(flink, run):
    flink.jobs = {
        "a1": ("activity-1", "CANCELED", checkpoint("file:/c/1")),
        "b2": ("activity-2", "RUNNING", checkpoint("file:/c/2", 12_345)),
        "c3": ("activity-3", "RESTARTING", None),
    }
    assert run("list") == (
        0,
        "c3  RESTARTING activity-3  since 1970-01-01 00:00:02Z  checkpoints 0\n"
        "b2  RUNNING    activity-2  since 1970-01-01 00:00:01Z  checkpoints 7, "
        "the last one 12,345 bytes\n"
        "a1  CANCELED   activity-1  since 1970-01-01 00:00:00Z\n",
        "",
    )


def test_stop_waits_for_the_savepoint_and_keeps_its_path_to_resume_from(flink, run):
    flink.jobs = {"a1": ("old", "FINISHED", None), "b2": ("activity", "RUNNING", None)}
    flink.savepoints = [in_progress(), completed(location="file:/s/savepoint-1")]
    assert run("stop") == (0, "file:/s/savepoint-1\n", "")
    assert flink.sent == [("POST", "/jobs/b2/stop", {"drain": False})]
    assert run("resume-path") == (0, "file:/s/savepoint-1\n", "")


def test_a_failed_savepoint_says_why_and_leaves_the_path_of_the_one_before(flink, run):
    flink.jobs = {"b2": ("activity", "RUNNING", None)}
    flink.savepoints = [completed(location="file:/s/1")]
    assert run("stop")[0] == 0
    flink.savepoints = [completed(**{"failure-cause": {"stack-trace": "Disk is full\n\tat x"}})]
    assert run("stop") == (1, "", "the savepoint failed: Disk is full\n")
    assert run("resume-path") == (0, "file:/s/1\n", "")


def test_without_a_stop_there_is_nothing_to_resume_from(run, tmp_path):
    assert run("resume-path") == (
        1,
        "",
        f"no job was stopped from here: there is no {tmp_path}/of/last\n",
    )


def test_cancel_takes_the_job_that_is_named(flink, run):
    flink.jobs = {"a1": ("activity-1", "RUNNING", None), "b2": ("activity-2", "RUNNING", None)}
    assert run("cancel", "activity-1") == (0, "", "")
    assert run("cancel", "b2") == (0, "", "")
    assert flink.sent == [
        ("PATCH", "/jobs/a1?mode=cancel", {}),
        ("PATCH", "/jobs/b2?mode=cancel", {}),
    ]


@pytest.mark.parametrize(
    ("jobs", "arguments", "message"),
    [
        ({}, ["stop"], "no job runs on the Flink cluster at http://{}"),
        ({"a": ("x", "FAILED", None)}, ["cancel"], "no job runs on the Flink cluster at http://{}"),
        (
            {"a": ("x", "RUNNING", None)},
            ["stop", "y"],
            "no job y runs on the Flink cluster at http://{}",
        ),
        (
            {"a": ("x", "RUNNING", None), "b": ("y", "RUNNING", None)},
            ["stop"],
            "several jobs run: y, x; say which one",
        ),
    ],
)
def test_nothing_is_stopped_where_it_is_not_clear_what(flink, run, jobs, arguments, message):
    flink.jobs = jobs
    assert run(*arguments) == (1, "", message.format(flink.address) + "\n")
    assert flink.sent == []


def test_the_last_checkpoint_of_a_job_that_runs_is_what_the_cluster_says(flink, run):
    flink.jobs = {"b2": ("activity", "RUNNING", checkpoint("file:/c/b2/chk-9"))}
    assert run("last-checkpoint") == (0, "file:/c/b2/chk-9\n", "")
    flink.jobs = {"b2": ("activity", "RUNNING", None)}
    assert run("last-checkpoint") == (1, "", "the job b2 has no complete checkpoint as yet\n")


def write_checkpoint(folder, time_s, complete=True):
    folder.mkdir(parents=True)
    if complete:
        (folder / "_metadata").touch()
        os.utime(folder / "_metadata", (time_s, time_s))


@pytest.mark.parametrize("prefix", ["", "file:", "file://"])
def test_after_a_crash_the_last_checkpoint_is_the_newest_complete_one_on_disk(
    flink, run, tmp_path, prefix
):
    flink.settings = {"state.checkpoints.dir": f"{prefix}{tmp_path}/c"}
    write_checkpoint(tmp_path / "c/a1/chk-30", 100)
    write_checkpoint(tmp_path / "c/b2/chk-9", 200)
    write_checkpoint(tmp_path / "c/b2/chk-10", 300)
    write_checkpoint(tmp_path / "c/b2/chk-11", 400, complete=False)
    assert run("last-checkpoint") == (0, f"file://{tmp_path}/c/b2/chk-10\n", "")
    assert run("last-checkpoint", "a1") == (0, f"file://{tmp_path}/c/a1/chk-30\n", "")
    code, _, message = run("last-checkpoint", "c3")
    assert (code, message) == (
        1,
        f"there is no complete checkpoint of the job c3 in {tmp_path}/c\n",
    )


def test_checkpoints_on_an_object_store_are_not_looked_for_here(flink, run):
    flink.settings = {"state.checkpoints.dir": "s3://bucket/c"}
    code, output, message = run("last-checkpoint")
    assert (code, output) == (1, "")
    assert message.startswith("the cluster keeps checkpoints at s3://bucket/c, which can't be")


def test_a_cluster_that_does_not_answer_is_named(capsys):
    assert main(["--flink_master=127.0.0.1:1", "list"]) == 1
    assert capsys.readouterr().err.startswith("no Flink cluster answers at http://127.0.0.1:1: ")


def test_the_store_lies_in_the_platform_folder(monkeypatch, capsys, flink):
    monkeypatch.setenv("STACK_HOME", "/nowhere/at/all")
    monkeypatch.setenv("FLINK_MASTER", flink.address)
    assert main(["resume-path"]) == 1
    assert capsys.readouterr().err == (
        f"no job was stopped from here: there is no {Path('/nowhere/at/all/savepoint')}\n"
    )


def test_counters_are_printed_by_name(monkeypatch, capsys):
    names = {"beam_pipelines_read": 9, "beam_pipelines_rows_written_lake": 8, "numRecordsIn": 7}
    cluster = counting(monkeypatch, X_droppedDueToLateness=1, **names)
    monkeypatch.setattr(job, "Cluster", lambda url: cluster)
    assert main(["counters"]) == 0
    assert capsys.readouterr().out == "droppedDueToLateness 1\nread 9\nrows_written.lake 8\n"
