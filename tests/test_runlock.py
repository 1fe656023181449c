import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from beam_pipelines.activity import main
from beam_pipelines.explain import main as explain
from beam_pipelines.io.publication import listed
from beam_pipelines.runlock import PlaceInUse, lock_beside, lock_in, locked
from tests.runs import digests, event, lines_of, query, summary, written

ACTIVITY = [sys.executable, "-m", "beam_pipelines.activity"]


def await_file(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the run ended with {process.wait(0.02)}")


@contextmanager
def stopped_run(out):
    """A run of the demo that has begun to write, and stands still."""
    process = subprocess.Popen(
        [*ACTIVITY, f"--output={out}", "--demo_events=5000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await_file(out / "run.json", process)
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def one_event(tmp_path):
    return written(tmp_path / "in.ndjson", lines_of([event(0, event_id="e-1")]))


def test_a_second_run_in_a_folder_is_refused_and_takes_over_once_the_first_is_killed(
    tmp_path, one_event
):
    out = tmp_path / "out"
    second = [*ACTIVITY, f"--output={out}", f"--input={one_event}", "--overwrite"]
    with stopped_run(out) as first:
        before = digests(out)
        refused = subprocess.run(second, capture_output=True, text=True)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert re.fullmatch(
            rf"another run writes to {out} \(process {first.pid} on \S+, since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ\); wait until it ends, or choose another place\n",
            refused.stderr,
        )
        assert digests(out) == before
    assert lock_in(str(out)).exists()  # the killed run couldn't remove it

    taken = subprocess.run(second, capture_output=True, text=True)
    assert taken.returncode == 0
    assert query(out, "SELECT event_id FROM events") == [("e-1",)]
    assert summary(out)["verdicts"]["accepted"] == 1
    assert [path for path in out.rglob("*.lock") if path.is_file()] == []


@pytest.mark.parametrize("place", ["lake", "enriched", "dead_letters", "database"])
def test_runs_that_share_a_place_are_kept_apart_though_their_outputs_differ(
    place, tmp_path, one_event, capsys
):
    shared = tmp_path / "shared"
    value = f"duckdb:///{shared}" if place == "database" else shared
    flags = [f"--input={one_event}", f"--output={tmp_path / 'out'}", f"--{place}={value}"]
    lock = lock_beside(str(shared)) if place == "database" else lock_in(str(shared))
    with locked([lock]):
        assert main(flags) == 2
        assert f"another run writes to {lock.parent} (process {os.getpid()} " in (
            capsys.readouterr().err
        )
        assert not (tmp_path / "out").exists()
    assert main(flags) == 0


def test_a_database_has_one_lock_under_all_its_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "tables.duckdb")
    assert lock_beside(f"{tmp_path}/link") == lock_beside(f"{tmp_path}/x/../tables.duckdb")


def test_locks_are_all_held_or_none(tmp_path):
    free, taken = lock_in(str(tmp_path / "new" / "a")), lock_in(str(tmp_path / "b"))
    with locked([taken]):
        with pytest.raises(PlaceInUse), locked([free, taken]):
            pass
        assert not (tmp_path / "new").exists()
        with locked([free]):
            assert json.loads(free.read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    lock, flock = lock_in(str(tmp_path)), fcntl.flock

    def slow_flock(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()  # its holder ended between our open and our lock
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    with locked([lock]):
        assert lock.exists()
        with pytest.raises(PlaceInUse), locked([lock]):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_where_the_filesystem_has_no_locks_a_run_says_so_and_goes_on(
    code, tmp_path, one_event, monkeypatch, capsys
):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main([f"--input={one_event}", f"--output={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr().err
    assert f"{tmp_path}/out/lake/.run.lock can't be locked ([Errno {code}]" in told
    assert "make sure that no other run writes there" in told


def test_the_lock_of_a_killed_run_is_no_result_and_nothing_foreign(tmp_path, one_event, capsys):
    out = tmp_path / "out"
    folders = [out / name for name in ("", "lake", "enriched", "dead_letters")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        lock_in(str(folder)).write_text("{}")
    assert listed(out / "lake") == []
    flags = [f"--input={one_event}", f"--output={out}"]
    assert main(flags) == 0
    for folder in folders:
        lock_in(str(folder)).write_text("{}")
    assert [name.rpartition(".")[2] for name in listed(out / "lake")] == ["json", "parquet"]
    capsys.readouterr()
    assert explain(["e-1", f"--lake={out / 'lake'}"]) == 0
    assert main([*flags, "--session_gap_s=5", "--overwrite"]) == 0


def test_a_run_leaves_no_lock_and_no_folder_it_did_not_need(tmp_path, one_event):
    out = tmp_path / "out"
    assert main([f"--input={one_event}", f"--output={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("activity.duckdb", "enriched", "lake", "run.json", "summary.json")
    ]
