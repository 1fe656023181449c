import contextlib
import io
import json
import re
from pathlib import Path

import duckdb
import pytest

from beam_pipelines import query
from beam_pipelines.activity import main
from tests.runs import event, lines_of, written
from tests.runs import query as query_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report") / "out"


@pytest.fixture(scope="module")
def shown(folder):

    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([f"--output={folder}", "--demo_events=60000"]) == 0
    return out.getvalue()


def test_every_verdict_is_shown_as_the_summary_has_it(shown, folder):
    summary = json.loads((folder / "summary.json").read_bytes())
    assert f"{summary['read']:>12,}  events read\n" in shown
    for verdict in ("on_time", "late", "too_late", "future", "invalid"):
        assert f"{summary['verdicts'][verdict]:>12,}  {verdict}\n" in shown
    for reason, count in summary["invalid"].items():
        assert f"{reason} {count:,}" in " ".join(shown.split())
    assert f"result {summary['result_sha256']}\n" in shown


def test_a_late_event_is_told_with_the_count_it_corrected(shown, folder):
    told = re.search(
        r"event (\S+) came (\d+) s late: (\S+) (\d\d:\d\d) corrected from (\d+) to (\d+)", shown
    )
    event, late_s, page, minute, before, after = told.groups()
    assert int(after) == int(before) + 1
    assert 0 < int(late_s) <= 120
    with duckdb.connect(str(folder / "activity.duckdb"), read_only=True) as database:
        database.execute("SET TimeZone = 'UTC'")
        views = database.execute(
            "SELECT views FROM page_view_counts "
            "WHERE page_url = ? AND strftime(window_start, '%H:%M') = ?",
            [page, minute],
        ).fetchone()
        accepted = database.execute("SELECT count(*) FROM events WHERE event_id = ?", [event])
        assert accepted.fetchone() == (1,)
    assert views[0] >= int(after)


def test_the_query_it_offers_runs_as_pasted(shown, capsys):
    path, sql = re.search(r'beam_pipelines\.query (\S+) "(.*)"', shown).groups()
    assert query.main([path, sql]) == 0
    assert "/pricing" in capsys.readouterr().out


def test_top_pages_users_and_sessions_are_shown(shown):
    assert re.search(r"Top pages\n +[\d,]+  /\n", shown)
    assert re.search(r"2026-01-05 09:0\d +[\d,]+  █+\n", shown)
    assert re.search(r"[\d,]+ sessions, median \d+ s, [\d,]+ ended by timeout\n", shown)


def test_the_demo_gives_the_result_that_the_readme_promises(tmp_path, capsys):
    assert main([f"--output={tmp_path / 'demo'}"]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_bytes())
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"result {summary['result_sha256']}" in readme
    verdicts = capsys.readouterr().out.split("Top pages")[0].strip("\n")
    assert verdicts in readme


@pytest.mark.parametrize("name", ["out[1]", "out{1}", "out'1", "out*"])
def test_a_folder_of_any_name_shows_its_own_lake_and_no_siblings(name, tmp_path, capsys):
    assert main([f"--output={tmp_path / 'out1'}", "--demo_events=20000", "--seed=3"]) == 0
    assert "A late event" in capsys.readouterr().out

    events = written(tmp_path / "in.ndjson", lines_of([event(0)]))
    flags = [f"--input={events}", f"--output={tmp_path / name}"]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "A late event" not in shown  # files are complete; the sibling's came late
    assert query_of(tmp_path / name, "SELECT count(*) FROM events") == [(1,)]


def test_a_late_event_is_told_from_a_folder_with_brackets(tmp_path, capsys):
    assert main([f"--output={tmp_path / 'out[1]'}", "--demo_events=20000", "--seed=3"]) == 0
    assert "A late event\n  event " in capsys.readouterr().out
