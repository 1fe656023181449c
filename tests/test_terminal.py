import io
import json
import logging
from contextlib import redirect_stdout

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines import query
from beam_pipelines.activity import main
from beam_pipelines.explain import main as explain
from beam_pipelines.telemetry import JsonFormatter
from beam_pipelines.terminal import printable
from scripts.verify import Check, Report
from tests.runs import event, lines_of, written

STEERING = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\r\u202egnp\u2066\u200f\x85"
"""ANSI and C1 sequences, DEL, a carriage return, and marks that turn the writing direction."""


def steers(text):
    """The characters of a text that do something to a terminal, newlines aside."""
    return [c for c in text if not c.isprintable() and c != "\n"]


@given(st.text(st.characters(codec=None)))
def test_whatever_is_printed_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["/café?q=日本", "a \\ b", "u-00042", "█ · …", ""])
def test_graphic_characters_stay_as_they_are(text):
    assert printable(text) == text


def test_what_is_kept_is_not_escaped():
    assert printable("a\n\tb", keep="\n") == "a\n\\tb"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run over events whose texts steer terminals; its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("hostile")
    records = [
        event(second, user=f"ann{STEERING}", url=f"/{STEERING}", event_id=f"e{STEERING}")
        for second in range(3)
    ]
    path = written(folder / "in.ndjson", lines_of(records))
    with redirect_stdout(io.StringIO()) as shown:
        assert main([f"--input={path}", f"--output={folder / 'out'}"]) == 0
    return folder / "out", shown.getvalue()


def test_the_report_of_a_run_steers_no_terminal(hostile):
    _, shown = hostile
    assert "/\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\x7f\\r\\u202egnp" in shown
    assert steers(shown) == []


def test_explain_steers_no_terminal(hostile, capsys):
    out, _ = hostile
    flags = [f"--lake={out}/lake", f"--database=duckdb:///{out}/activity.duckdb"]
    assert explain([f"e{STEERING}", *flags]) == 0
    shown = capsys.readouterr().out
    assert "page_view of /\\x1b[2J" in shown
    assert steers(shown) == []
    assert explain([f"none{STEERING}", *flags]) == 1
    assert steers(capsys.readouterr().err) == []


def test_query_steers_no_terminal(hostile, capsys):
    out, _ = hostile
    database = f"{out}/activity.duckdb"
    assert query.main([database, "SELECT user_id, page_url FROM events"]) == 0
    shown = capsys.readouterr().out
    assert "\\x9b31m\\x7f" in shown
    assert steers(shown) == []
    with duckdb.connect(database, read_only=True) as connection:
        assert connection.execute("SELECT any_value(user_id) FROM events").fetchone() == (
            f"ann{STEERING}",
        )
    assert query.main([database, f"SELECT '{STEERING}'::INTEGER"]) == 1
    assert steers(capsys.readouterr().err) == []


def test_a_line_of_the_log_is_json_that_steers_no_terminal():
    record = logging.makeLogRecord({"msg": STEERING, "levelname": "ERROR", "topic": STEERING})
    line = JsonFormatter().format(record)
    assert line.isprintable()
    assert json.loads(line)["message"] == json.loads(line)["topic"] == STEERING


def test_verify_steers_no_terminal(capsys):
    report = Report()
    report.run(Check("topic", lambda: f"found {STEERING}", "-"))
    report.run(Check("table", lambda: 1 / 0, f"remedy {STEERING}"))
    shown = capsys.readouterr().out
    assert "found \\x1b[2J" in shown and "remedy \\x1b[2J" in shown
    assert steers(shown) == []
