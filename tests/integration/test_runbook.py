"""What docs/runbook.md says to do, done on a server."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.integration.job import REPOSITORY
from tests.integration.test_postgres import INIT_SQL, Space

RUNBOOK = (REPOSITORY / "docs/runbook.md").read_text()


def record(user, minute, kind="page_view"):
    return {
        "event_id": f"{user}-{minute}",
        "event_time": f"2026-01-05T09:{minute:02}:00Z",
        "user_id": user,
        "page_url": "/",
        "event_type": kind,
    }


# In the order in which they were stored. Retention removes GONE; LATER comes after the first job.
GONE = [
    record("spans", 0),
    record("over", 0),
    record("hole", 6),
    record("ends", 0),
    record("ends", 4, "session_end"),
    record("open", 28),
]
LEFT = [
    record("hole", 2),  # out of order
    record("spans", 10),
    record("ends", 10),
    record("hole", 12),
    record("spans", 20),
]
LATER = [record("open", 40), record("new", 45)]
UNFINISHED = ("open", "new")  # not stored when the first job ended

FINAL = [
    ("ends", "09:00", "09:04", 1, "session_end"),
    ("ends", "09:10", "09:10", 1, "timeout"),
    ("hole", "09:02", "09:12", 3, "timeout"),
    ("over", "09:00", "09:00", 1, "timeout"),
    ("spans", "09:00", "09:20", 3, "timeout"),
]
OF_WHAT_IS_LEFT = [
    ("new", "09:45", "09:45", 1, "timeout"),
    ("open", "09:40", "09:40", 1, "timeout"),  # its first record is gone
]


@pytest.fixture
def tables(postgres, monkeypatch, tmp_path):
    """Tables of their own, and a command that fills them from records."""
    space = Space(postgres)
    space.execute(INIT_SQL.read_text())
    monkeypatch.setenv("TABLES", space.url)

    def run(records, name):
        (tmp_path / name).write_text("".join(f"{json.dumps(each)}\n" for each in records))
        command = [sys.executable, "-m", "beam_pipelines.activity", "--database=env:TABLES"]
        subprocess.run(
            [*command, f"--input={tmp_path / name}", f"--output={tmp_path / name}-out"],
            cwd=REPOSITORY,
            env=os.environ,
            check=True,
            capture_output=True,
        )

    return space, run


def sessions(space):
    return space.execute(
        "SELECT user_id, to_char(session_start AT TIME ZONE 'UTC', 'HH24:MI'), "
        "to_char(session_end AT TIME ZONE 'UTC', 'HH24:MI'), page_views, ended_by "
        "FROM user_sessions ORDER BY 1, 2"
    )


def statements():
    """Return the SQL of the runbook: before the new job, and after."""
    before, after = re.findall(r"```sql\n(.+?)```", RUNBOOK, re.DOTALL)
    return before, after


def test_after_retention_a_new_job_leaves_final_sessions_as_they_were(tables):
    space, run = tables
    before, after = statements()
    run([*GONE, *LEFT], "first")
    space.execute(f"DELETE FROM user_sessions WHERE user_id IN {UNFINISHED}")
    assert sessions(space) == FINAL
    views = space.execute("SELECT sum(views) FROM page_view_counts")
    assert views == [(10,)]
    space.execute(before)
    of_one = "SELECT ctid, xmin FROM user_sessions WHERE user_id = 'over'"
    untouched = space.execute(of_one)
    run([*LEFT, *LATER], "second")
    meanwhile = sessions(space)
    assert ("spans", "09:10", "09:20", 2, "timeout") in meanwhile  # beside the one from 09:00
    assert ("hole", "09:02", "09:12", 2, "timeout") in meanwhile  # in place of the true one
    for _ in range(2):
        space.execute(after)
        assert sessions(space) == sorted(FINAL + OF_WHAT_IS_LEFT)
    assert space.execute("SELECT sum(views) FROM page_view_counts") == [(12,)]
    assert space.execute(of_one) == untouched  # rows that are right are not written again
