import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from stack.process import Process

# Says when it is ready to be signalled, then waits for that; nobody waits for the clock.
OBEDIENT = ["sh", "-c", "echo ready; exec sleep 600"]
DEAF = ["sh", "-c", "trap '' TERM INT; sleep 600 & echo ready; wait; wait"]
WITH_CHILD = ["sh", "-c", "sleep 600 & echo ready; wait"]


@pytest.fixture
def start(tmp_path):
    started = []

    def start_(command, environment=os.environ):
        log = tmp_path / f"log{len(started)}"
        process = Process.start(command, environment, log, tmp_path / "pid")
        started.append(process)
        until(lambda: b"ready" in log.read_bytes())
        return process

    yield start_
    for process in started:
        process.kill()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_process_is_found_again_by_its_file(start, tmp_path):
    process = start(OBEDIENT)
    assert Process.find(tmp_path / "pid") == process
    assert process.alive
    assert process.members == [process.pid]
    assert process.resident_bytes > 0
    assert 0 <= process.age_s < 60


def test_it_leads_a_session_of_its_own(start):
    assert os.getsid(start(OBEDIENT).pid) != os.getsid(0)


@pytest.mark.parametrize("text", ["", "12", "x y", "1 2 3"])
def test_a_damaged_file_tells_of_no_process(tmp_path, text):
    (tmp_path / "pid").write_text(text)
    assert Process.find(tmp_path / "pid") is None


def test_a_missing_file_tells_of_no_process(tmp_path):
    assert Process.find(tmp_path / "pid") is None


def test_a_process_that_was_given_the_same_id_later_is_left_alone(start):
    ours = start(OBEDIENT)
    earlier = replace(ours, started=ours.started - 1)
    assert not earlier.alive
    assert earlier.members == []
    assert earlier.stop(signal.SIGTERM, timeout_s=5)
    earlier.kill()
    assert ours.alive


def test_what_obeys_is_stopped_gracefully(start):
    process = start(OBEDIENT)
    assert process.stop(signal.SIGTERM, timeout_s=20)
    assert not process.alive


def test_what_does_not_obey_is_killed_with_its_children(start):
    process = start(DEAF)
    until(lambda: len(process.members) == 2)
    assert not process.stop(signal.SIGTERM, timeout_s=0.2)
    assert process.members == []


def test_children_that_survive_their_leader_are_found_and_stopped(start):
    process = start(WITH_CHILD)
    until(lambda: len(process.members) == 2)
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.alive)
    (child,) = process.members
    assert child != process.pid
    process.stop(signal.SIGTERM, timeout_s=5)
    assert process.members == []


def test_kill_ends_the_whole_group(start):
    process = start(WITH_CHILD)
    until(lambda: len(process.members) == 2)
    process.kill()
    assert process.members == []


def test_a_process_nobody_reaps_counts_as_dead():
    zombie = subprocess.Popen(["true"])
    until(lambda: f"{zombie.pid} (true) Z" in stat_line(zombie.pid))
    started = int(stat_line(zombie.pid).rpartition(")")[2].split()[19])
    assert not Process(zombie.pid, started).alive
    zombie.wait()


def test_a_process_whose_first_thread_has_ended_lives_on_in_the_others(start):
    # As a killed server does for a moment, its ports still open. SYS_exit ends one thread.
    program = (
        "import ctypes, platform, threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "print('ready', flush=True)\n"
        "ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)\n"
    )
    process = start([sys.executable, "-c", program])
    until(lambda: ") Z " in stat_line(process.pid))
    assert process.alive
    assert process.members == [process.pid]
    process.kill()
    assert not process.alive


def stat_line(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read()


def test_a_process_gets_the_environment_it_is_given(start, tmp_path):
    start(["sh", "-c", 'echo "ready $WORD"; exec sleep 600'], {**os.environ, "WORD": "here"})
    until(lambda: (tmp_path / "log0").read_text() == "ready here\n")
