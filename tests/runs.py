"""Input for runs of the activity pipeline, and what they left in their folder."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

TABLES = ("page_view_counts", "active_users", "user_sessions")
NINE = datetime(2026, 1, 5, 9, tzinfo=UTC)


def event(
    at_s: float, user: str = "ann", url: str = "/a", kind: str = "page_view", **more: Any
) -> dict[str, Any]:
    """Return an event of the morning of 2026-01-05; `at_s` in seconds after nine."""
    time = (NINE + timedelta(seconds=at_s)).isoformat(timespec="microseconds")
    return {"event_time": time, "user_id": user, "page_url": url, "event_type": kind} | more


def lines_of(records: Iterable[Mapping[str, Any]]) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


def written(path: Path, lines: Iterable[bytes], end: bytes = b"\n") -> Path:
    text = b"".join(line + end for line in lines)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def query(output: Path, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(output / "activity.duckdb"), read_only=True) as database:
        database.execute("SET TimeZone = 'UTC'")
        return database.execute(sql).fetchall()


def tables(output: Path) -> dict[str, list[tuple[Any, ...]]]:
    return {name: query(output, f"FROM {name} ORDER BY ALL") for name in TABLES}


def digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def summary(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


def verdicts(output: Path) -> dict[str, int]:
    return {name: count for name, count in summary(output)["verdicts"].items() if count}


def dead_letters(output: Path) -> list[dict[str, Any]]:
    paths = sorted((output / "dead_letters").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def enriched(output: Path) -> list[dict[str, Any]]:
    paths = sorted((output / "enriched").glob("*.ndjson"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
