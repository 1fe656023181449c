"""What a finished run shows in the terminal."""

import glob
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb

from beam_pipelines.config import ActivityConfig
from beam_pipelines.terminal import printable

_BAR_CHARACTERS = 40
_LINES = 12
_TEXT_CHARACTERS = 80


def show(config: ActivityConfig, summary: Mapping[str, Any]) -> None:
    """Print verdicts, tables and where they lie."""
    with duckdb.connect(config.database_path, read_only=True) as database:
        database.execute("SET TimeZone = 'UTC'")
        for line in _lines(config, summary, database):
            print(printable(line))


def _lines(
    config: ActivityConfig, summary: Mapping[str, Any], database: duckdb.DuckDBPyConnection
) -> Iterator[str]:
    verdicts, read = summary["verdicts"], summary["read"]
    yield ""
    yield f"{read:>12,}  events read"
    for name in ("on_time", "late", "too_late", "future", "invalid"):
        yield f"{verdicts[name]:>12,}  {name}"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary["invalid"].items())
    yield from textwrap.wrap(reasons, 86, initial_indent=" " * 14, subsequent_indent=" " * 14)
    yield f"{verdicts['accepted']:>12,}  accepted, {verdicts['duplicate']:,} duplicates"

    yield from _titled("Top pages", _top_pages(database))
    yield from _titled(f"Active users, last {config.users_window_s} s", _users(database))
    yield from _titled("Sessions", _sessions(database))
    yield from _titled("A late event", _late_event(config, database))

    rate = read / summary["seconds"] if summary["seconds"] else 0
    yield ""
    yield f"{rate:,.0f} events/s ({read:,} in {summary['seconds']:.1f} s)"
    yield f"result {summary['result_sha256']}"
    yield ""
    yield f"tables        {config.database_path}"
    yield f"lake          {config.lake}   (in the database: the view events)"
    yield f"enriched      {config.enriched}"
    yield f"dead letters  {config.dead_letters}"
    yield ""
    sql = "SELECT page_url, sum(views) AS views FROM page_view_counts GROUP BY 1 ORDER BY 2 DESC"
    if Path(config.database_path) == Path("out/activity.duckdb"):
        yield f'  make query SQL="{sql} LIMIT 5"'
    else:
        yield f'  python -m beam_pipelines.query {config.database_path} "{sql} LIMIT 5"'


def _titled(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield title
        yield from (f"  {line}" for line in lines)


def _top_pages(database: duckdb.DuckDBPyConnection) -> list[str]:
    rows = database.execute(
        "SELECT page_url, sum(views)::BIGINT FROM page_view_counts "
        "GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 5"
    ).fetchall()
    return [f"{views:>10,}  {page[:_TEXT_CHARACTERS]}" for page, views in rows]


def _users(database: duckdb.DuckDBPyConnection) -> list[str]:
    rows = database.execute(
        "SELECT strftime(window_end, '%Y-%m-%d %H:%M'), active_users FROM active_users "
        "ORDER BY window_end"
    ).fetchall()
    if not rows:
        return []
    step = -(-len(rows) // _LINES)
    most = max(users for _, users in rows)
    return [
        f"{until}  {users:>8,}  {'█' * round(users * _BAR_CHARACTERS / most)}"
        for until, users in rows[step - 1 :: step]
    ]


def _sessions(database: duckdb.DuckDBPyConnection) -> list[str]:
    row = database.execute(
        "SELECT count(*), median(duration_s), count(*) FILTER (ended_by = 'timeout') "
        "FROM user_sessions"
    ).fetchone()
    if row is None or not row[0]:
        return []
    sessions, median_s, timed_out = row
    return [f"{sessions:,} sessions, median {median_s:.0f} s, {timed_out:,} ended by timeout"]


_LATE_VIEW = """
WITH views AS (
    SELECT
        coalesce(event_id, 'without an id') AS event, identity,
        page_url, event_time, append_time, verdict,
        time_bucket(to_seconds({window_s}), event_time) AS window_start
    FROM read_parquet('{lake}', hive_partitioning = true)
    WHERE verdict IN ('on_time', 'late') AND event_type = 'page_view'
        AND append_time IS NOT NULL
    QUALIFY row_number() OVER (
        PARTITION BY event_date, identity ORDER BY append_time, topic, partition, "offset"
    ) = 1
), counted AS (
    SELECT
        *,
        row_number() OVER (
            PARTITION BY page_url, window_start ORDER BY append_time, identity
        ) - 1 AS views_before
    FROM views
)
SELECT
    event, event_time, page_url, epoch(append_time - event_time) - {behind_s}, views_before
FROM counted
WHERE verdict = 'late'
ORDER BY views_before DESC, append_time, identity
LIMIT 1
"""


def _late_event(config: ActivityConfig, database: duckdb.DuckDBPyConnection) -> list[str]:
    """Tell what one late event changed: one that was new when it came, to a busy window."""
    if next(Path(config.lake).glob("**/*.parquet"), None) is None:
        return []
    lake = f"{glob.escape(config.lake)}/**/*.parquet".replace("'", "''")
    names = {"lake": lake, "window_s": config.window_s, "behind_s": config.time.out_of_orderness_s}
    row = database.execute(_LATE_VIEW.format(**names)).fetchone()
    if row is None:
        return []
    event, event_time, page, late_s, before = row
    return [
        f"event {event[:_TEXT_CHARACTERS]} came {late_s:.0f} s late: {page[:_TEXT_CHARACTERS]} "
        f"{event_time:%H:%M} corrected from {before:,} to {before + 1:,}"
    ]
