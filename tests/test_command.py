"""How the commands end early: a line on stderr, an exit code, no traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from beam_pipelines import query as ask
from beam_pipelines.activity import main
from beam_pipelines.explain import main as explain
from beam_pipelines.terminal import run_command
from tests.runs import event, lines_of, query, written

ACTIVITY = [sys.executable, "-m", "beam_pipelines.activity"]


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C does what it usually does, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def told(err):
    return [line for line in err.splitlines() if not line.startswith("read ")]


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "file", lines_of([event(0)]))


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--output={file}", "{file}: Not a directory"),
        ("--output={file}/out", "{file}/out: Not a directory"),
        ("--lake={file}/lake", "{file}/lake: Not a directory"),
        ("--database=duckdb:///{file}/a.duckdb", "{file}: Not a directory"),
    ],
)
def test_a_place_that_cant_be_written_is_misuse_told_in_a_line(flag, why, file, capsys):
    flags = [f"--input={file}", f"--output={file.parent / 'out'}", flag.format(file=file)]
    assert main(flags) == 2
    assert told(capsys.readouterr().err) == [why.format(file=file)]
    assert list(file.parent.iterdir()) == [file]


def test_input_that_may_not_be_read_is_misuse_told_in_a_line(file, monkeypatch, capsys):
    def refused(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("beam_pipelines.io.files.open_decompressed", refused)
    assert main([f"--input={file}", f"--output={file.parent / 'out'}"]) == 2
    assert told(capsys.readouterr().err) == [f"{file}: Permission denied"]
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    ("module", "flags", "extra"),
    [
        ("psycopg", ["--database=env:DB"], "postgres"),
        (
            "confluent_kafka",
            ["--enriched=kafka:a", "--kafka_bootstrap_servers=b:1"],
            "kafka",
        ),
        ("cassandra", ["--cassandra=h:1/k"], "cassandra"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_written(module, flags, extra, file):
    without = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from beam_pipelines import activity, terminal\n"
        "sys.exit(terminal.run_command(activity.main))"
    )
    flags = [f"--input={file}", f"--output={file.parent / 'out'}", *flags]
    command = [sys.executable, "-c", without, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert told(done.stderr) == [
        f"{module} isn't installed, and this needs it: pip install 'beam-pipelines[{extra}]'"
    ]
    assert list(file.parent.iterdir()) == [file]


def test_an_import_that_fails_for_another_reason_is_a_bug():
    def broken():
        from beam_pipelines import nothing  # noqa: F401

    with pytest.raises(ImportError):
        run_command(broken)


def test_a_lake_that_is_no_folder_is_told_in_a_line(file, capsys):
    assert run_command(lambda: explain(["e", f"--lake={file}"])) == 1
    (line,) = told(capsys.readouterr().err)
    assert str(file) in line and "Not a directory" in line


def test_ctrl_c_in_a_tool_is_told_in_a_line(capsys):
    def waiting():
        signal.raise_signal(signal.SIGINT)

    assert run_command(waiting) == 130
    assert told(capsys.readouterr().err) == ["stopped by Ctrl-C"]


def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert run_command(lambda: signal.raise_signal(signal.SIGINT) or 0) == 0


def test_ctrl_c_ends_a_run_at_once_and_the_next_one_is_free_to_begin(file):
    out = file.parent / "out"
    process = subprocess.Popen(
        [*ACTIVITY, f"--output={out}", "--demo_events=5000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(out.glob("lake/_tmp/*")):  # it is in the midst of it
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told(err) == ["stopped by Ctrl-C: what was written so far is no result; run it again"]
    assert main([f"--input={file}", f"--output={out}", "--overwrite"]) == 0
    assert query(out, "SELECT count(*) FROM events") == [(1,)]


def test_a_reader_that_leaves_early_is_told_in_a_line(file):
    out = file.parent / "out"
    flags = [f"--input={file}", f"--output={out}"]
    report = [*ACTIVITY, *flags]
    answer = [sys.executable, "-m", ask.__name__, f"{out}/activity.duckdb", "FROM events"]
    for command in (report, answer):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert told(done.stderr) == ["not all was printed: what read the output has closed it"]
        assert done.returncode == 1
    assert query(out, "SELECT count(*) FROM events") == [(1,)]  # the run itself was over
