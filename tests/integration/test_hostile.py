"""Whatever a stranger sends, the run goes on, and all else comes out as if it weren't there."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.faults.run import RULES, Run
from tests.hostile import HOSTILE, VICTIM, Record, honest
from tests.integration.job import Topics, activity
from tests.integration.test_activity_endless import number_of_restarts
from tests.oracle.oracle import Oracle, Rules, write_raw
from tests.oracle.topic import dump
from tests.runs import query

OUT_OF_ORDERNESS_S = 65
"""Some hostile records lie a minute apart, and all of them must count."""


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Args:
      differences: Of its ends from the truth.
      restarts: How often it was started again.
      sessions: The victim's: page views and what ended it.
      truth: What must come of the records.
    """

    differences: list[str]
    restarts: int
    sessions: list[tuple[Any, ...]]
    truth: Oracle


def records(now_us: int) -> list[Record]:
    """Return the victim's events, each hostile list between them."""
    first, *rest = honest(now_us)
    return [first, *(record for make in HOSTILE.values() for record in make(now_us)), *rest]


def through_files(tmp_path: Path, request: Any) -> Outcome:
    """Send them as lines of a file, through the runner in this process."""
    now_us = time.time_ns() // 1_000_000 * 1000
    text = b"\n".join(record for record in records(now_us) if record is not None)
    source = tmp_path / "hostile.ndjson"
    source.write_bytes(text + b"\n")
    ended = text.split(b"\n")
    starts = [0, *itertools.accumulate(len(line) + 1 for line in ended[:-1])]
    lines = [line.removesuffix(b"\r") for line in ended]
    batch = pa.RecordBatch.from_pydict(
        {
            "payload": pa.array(lines, pa.binary()),
            "offset": pa.array(starts, pa.int64()),
            "append_time": pa.nulls(len(lines), pa.timestamp("us", "UTC")),
        }
    )
    write_raw(tmp_path / "raw.parquet", [(str(source), batch)])
    truth = Oracle(tmp_path / "raw.parquet", "ndjson", Rules(now_us))
    out = tmp_path / "out"
    ended = activity({}, f"--input={source}", f"--output={out}", f"--as_of={now_us // 1000}")
    assert ended.code == 0, ended.stderr[-4000:]
    sessions = query(
        out, f"SELECT page_views, ended_by FROM user_sessions WHERE user_id = '{VICTIM}'"
    )
    # Whoever chooses users by their hashes aims the estimate, up to the events of its window.
    differences = [found for found in truth.differences(out) if ", truly " not in found]
    return Outcome(differences, 0, sessions, truth)


def through_flink(tmp_path: Path, request: Any) -> Outcome:
    """Send them to a topic, through the endless graph on Flink."""
    import psycopg

    run = Run(request.getfixturevalue("cluster"), "hostile", tmp_path)
    run.prepare()
    topics = Topics(run.ends.bootstrap_servers)
    run.submit(f"--out_of_orderness_s={OUT_OF_ORDERNESS_S}")
    try:
        now_us = time.time_ns() // 1000
        sent = [(VICTIM, record) for record in records(now_us)]
        assert topics.send(run.topic, sent) == len(sent)
        dump(run.ends.bootstrap_servers, run.topic, tmp_path / "raw.parquet")
        rules = replace(RULES, out_of_orderness_s=OUT_OF_ORDERNESS_S)
        truth = Oracle(tmp_path / "raw.parquet", "ndjson", rules)
        differences = run.settled_differences(truth)
        with psycopg.connect(run.ends.database) as connection:
            sessions = connection.execute(
                "SELECT page_views, ended_by FROM user_sessions WHERE user_id = %s", [VICTIM]
            ).fetchall()
        return Outcome(differences, number_of_restarts(run), sessions, truth)
    finally:
        run.close()


@pytest.mark.parametrize("through", [through_files, through_flink])
def test_no_record_ends_a_run_or_changes_what_is_said_of_others(
    through: Callable[[Path, Any], Outcome], tmp_path: Path, request: pytest.FixtureRequest
):
    outcome = through(tmp_path, request)
    assert outcome.differences == []
    assert outcome.restarts == 0
    assert outcome.sessions == [(4, "timeout")]
    ((accepted, invalid),) = outcome.truth.rows(
        "SELECT count(*) FILTER (verdict IN ('on_time', 'late')), "
        "count(*) FILTER (verdict = 'invalid') FROM records"
    )
    assert accepted > 6_000  # the hostile lists are there
    assert invalid > 20
