import duckdb
import psycopg
import pytest

from beam_pipelines.activity import main
from beam_pipelines.explain import main as explain
from tests.runs import event, lines_of, written

EVENTS = [
    event(10, event_id="e-1"),
    event(40, url="/b", event_id="e-2"),
    event(40, url="/b", event_id="e-2"),  # a re-send
    event(50, user="bob", url="/b", event_id="e-3"),
    event(60, kind="click", event_id="e-4"),
    event(70, user="bob", kind="session_end", event_id="e-5"),
    event(70, user="carl", kind="session_end", event_id="e-6"),  # ends nothing
    event(3600, event_id="e-2"),  # another event that took the id
    event(86_400 * 5, event_id="e-future"),
    event(3 * 3600, user="u" * 3_000, url="/" + "é" * 3_000, event_id="e-long"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    path = written(folder / "events.ndjson", lines_of(EVENTS))
    flags = [f"--input={path}", f"--output={folder / 'out'}", "--as_of=2026-01-06T00:00:00Z"]
    assert main(flags) == 0
    return folder / "out"


def told(out, capsys, event_id, *flags, database=True):
    ends = [f"--lake={out / 'lake'}"]
    if database:
        ends.append(f"--database=duckdb:///{out / 'activity.duckdb'}")
    assert explain([event_id, *ends, *flags]) == 0
    return capsys.readouterr().out.splitlines()


def words(lines, start):
    """The lines that begin so, as words."""
    return [" ".join(line.split()) for line in lines if line.startswith(start)]


def test_a_page_view_is_told_with_all_that_it_counts_in(out, capsys):
    lines = told(out, capsys, "e-3")
    assert lines[:2] == [
        "e-3: page_view of /b by bob",
        "happened at 2026-01-05 09:00:50Z",
    ]
    assert words(lines, "page views") == [
        "page views 2026-01-05 09:00:00Z to 2026-01-05 09:01:00Z views 2"
    ]
    assert words(lines, "active users") == [
        f"active users 2026-01-05 {start}:00Z to 2026-01-05 {end}:00Z users {users}"
        for start, end, users in [
            ("08:56", "09:01", 2),
            ("08:57", "09:02", 3),
            ("08:58", "09:03", 3),
            ("08:59", "09:04", 3),
            ("09:00", "09:05", 3),
        ]
    ]
    assert words(lines, "session") == [
        "session 2026-01-05 09:00:50Z to 2026-01-05 09:01:10Z page views 1, clicks 0, session_end"
    ]
    (file,) = words(lines, "event_date=")
    assert (out / "lake" / file).is_file()


def test_the_rows_of_texts_too_long_for_a_key_are_found(out, capsys):
    lines = told(out, capsys, "e-long")
    assert words(lines, "page views") == [
        "page views 2026-01-05 12:00:00Z to 2026-01-05 12:01:00Z views 1"
    ]
    assert words(lines, "session") == [
        "session 2026-01-05 12:00:00Z to 2026-01-05 12:00:00Z page views 1, clicks 0, timeout"
    ]


def test_copies_are_told_in_the_order_they_were_stored_and_the_first_counts(out, capsys):
    lines = told(out, capsys, "e-2")
    copies = [line.split()[-5:] for line in lines if "complete input" in line]
    assert [copy[-3:] for copy in copies] == [
        ["input", "on_time", "counts"],
        ["input", "on_time", "duplicate"],
        ["input", "on_time", "counts"],
    ]
    assert [line for line in lines if line.startswith("happened")] == [
        "happened at 2026-01-05 09:00:40Z",
        "happened at 2026-01-05 10:00:00Z",
    ]


def test_a_click_counts_in_no_page_views(out, capsys):
    lines = told(out, capsys, "e-4")
    assert words(lines, "page views") == []
    assert words(lines, "session") == [
        "session 2026-01-05 09:00:10Z to 2026-01-05 09:01:00Z page views 2, clicks 1, timeout"
    ]


def test_without_a_session_row_it_says_when_one_would_come(out, capsys):
    lines = told(out, capsys, "e-6", "--session_gap_s=20")
    assert words(lines, "session") == [
        "session no row yet: it comes once 200 s went by without an event of the user"
    ]


def test_windows_are_those_of_the_flags(out, capsys):
    lines = told(out, capsys, "e-3", "--window_s=30", "--users_window_s=20", "--users_period_s=20")
    assert words(lines, "page views") + words(lines, "active users") == [
        "page views 2026-01-05 09:00:30Z to 2026-01-05 09:01:00Z no row yet",
        "active users 2026-01-05 09:00:40Z to 2026-01-05 09:01:00Z no row yet",
    ]


def test_without_a_database_the_windows_are_told(out, capsys):
    lines = told(out, capsys, "e-3", database=False)
    assert words(lines, "page views") == [
        "page views 2026-01-05 09:00:00Z to 2026-01-05 09:01:00Z not asked: no --database"
    ]


def test_a_date_reads_the_files_of_that_date_only(out, capsys):
    assert told(out, capsys, "e-3", "--date=2026-01-05")[0].startswith("e-3: ")
    assert explain(["e-3", f"--lake={out / 'lake'}", "--date=2026-01-06"]) == 1
    assert "has no event 'e-3' of 2026-01-06" in capsys.readouterr().err


def test_an_event_that_came_too_late_counts_nowhere(tmp_path, capsys):
    assert main([f"--output={tmp_path}", "--demo_events=20000"]) == 0
    capsys.readouterr()
    with duckdb.connect() as lake:
        ((late_id, late_s),) = lake.execute(
            "SELECT event_id, max(epoch_us(append_time) - epoch_us(event_time)) "
            f"FROM '{tmp_path}/lake/*/*.parquet' WHERE event_id IS NOT NULL "
            "GROUP BY event_id HAVING count(*) = 1 AND min(verdict) = 'too_late' "
            "ORDER BY event_id LIMIT 1"
        ).fetchall()
    lines = told(tmp_path, capsys, late_id, database=False)
    (copy,) = words(lines, "demo ")
    assert copy.split()[-2:] == [f"{late_s / 1e6 - 120:.3f}", "too_late"]
    assert "It counts in no table: it is a dead letter, as it came too late." in lines


@pytest.mark.parametrize("event_id", ["e-future", "none"])
def test_an_event_that_isnt_there_is_told_with_what_that_can_mean(out, capsys, event_id):
    assert explain([event_id, f"--lake={out / 'lake'}"]) == 1
    said = capsys.readouterr().err
    assert f"has no event '{event_id}'" in said
    assert "dead letter: future events" in said


def test_a_folder_without_a_lake_is_told(tmp_path, capsys):
    assert explain(["e-1", f"--lake={tmp_path}"]) == 1
    assert "holds no files of a lake" in capsys.readouterr().err


def test_a_database_that_cant_be_read_is_told(out, capsys):
    flags = ["e-1", f"--lake={out / 'lake'}", f"--database=duckdb:///{out / 'none.duckdb'}"]
    assert explain(flags) == 1
    assert "The database can't be read" in capsys.readouterr().err


def test_a_password_is_never_shown(out, capsys):
    url = "postgresql://ann:hunter2@localhost/activity"
    assert explain(["e-1", f"--lake={out / 'lake'}", f"--database={url}"]) == 2
    assert "hunter2" not in "".join(capsys.readouterr())


def test_postgres_is_asked_through_its_secret(out, capsys, monkeypatch):
    monkeypatch.setenv("DB", "postgresql://localhost/activity")
    asked = []

    class Server:
        def execute(self, sql, values):
            asked.append((sql, len(values)))
            return duckdb.execute("SELECT 42 WHERE ?", ["page_view_counts" in sql])

    def connect(autocommit, host, dbname, **settings):
        assert (autocommit, host, dbname) == (True, "localhost", "activity")
        return Server()

    monkeypatch.setattr(psycopg, "connect", connect)
    assert explain(["e-3", f"--lake={out / 'lake'}", "--database=env:DB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert words(lines, "page views")[0].endswith("views 42")
    assert [(sql.count("%s"), values) for sql, values in asked] == [(3, 3), *[(2, 2)] * 5, (3, 3)]
