"""What a run of the activity pipeline must have left behind, worked out from its raw input.

DuckDB SQL and Python's json module, nothing of ours: the rules are written a second time, as
plainly as possible, in `judge_ndjson.sql` and `judge_access_log.sql` (what a record says),
`results.sql` (what follows) and `naive_sketch.py` (active users). Tables, files and counts are
compared both ways, as multisets.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb.func import SPECIAL

from tests.oracle.naive_sketch import STANDARD_ERROR, estimate

SIGMAS = 3.5
"""Standard errors that an estimate of active users may be off by."""

MAX_PAYLOAD_BYTES = 1 << 20
MAX_DEPTH = 100

RAW = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("append_us", pa.int64()),  # null: a record of a file
        ("payload", pa.binary()),
    ]
)
"""The raw input: where each record was read, when it was stored, and its bytes."""


@dataclass(frozen=True)
class Rules:
    """The settings of a run; the defaults are those of its flags.

    Args:
      as_of_us: The clock of the run (µs since 1970).
      dedupe: `event_id`, `payload`, `coordinates` or `none`.
    """

    as_of_us: int
    out_of_orderness_s: int = 120
    allowed_lateness_s: int = 120
    future_tolerance_s: int = 300
    window_s: int = 60
    users_window_s: int = 300
    users_period_s: int = 60
    session_gap_s: int = 1800
    dedupe: str = "event_id"


class Oracle:
    """Knows the results of one input under some rules.

    Args:
      raw: Parquet file of RAW (see `write_raw`).
      format: `ndjson` or `access_log`.
      rules: The settings of the run.
    """

    def __init__(self, raw: Path, format: str, rules: Rules) -> None:
        self.sql = duckdb.connect()
        self.sql.execute("SET TimeZone = 'UTC'")
        for name, value in vars(rules).items():
            if name.endswith("_s"):
                name, value = f"{name[:-2]}_us", value * 1_000_000
            self.sql.execute(f"SET VARIABLE {name} = {value!r}")
        self.sql.create_function(
            "syntax_reason", syntax_reason, ["BLOB"], "VARCHAR", null_handling=SPECIAL
        )
        # Clocks step back, yet a record counts as stored no earlier than those before it.
        self.sql.execute(f"""
            CREATE VIEW raw AS
            SELECT * REPLACE (
                max(append_us) OVER (
                    PARTITION BY topic, partition ORDER BY "offset" ROWS UNBOUNDED PRECEDING
                ) AS append_us
            )
            FROM read_parquet('{raw}')
        """)
        for script in (f"judge_{format}.sql", "results.sql"):
            self.sql.execute(Path(__file__).with_name(script).read_text())
        self._count_active_users()

    def differences(self, output: Path) -> list[str]:
        """Compare everything a run left in its folder; returns what differs, in words."""
        self.sql.execute(f"ATTACH '{output}/activity.duckdb' AS run (READ_ONLY)")
        try:
            return [
                *(found for name in _TABLES for found in self._table(name, f"run.{name}")),
                *self._compared("events", f"SELECT {_EVENT} FROM run.events"),
                *self._files("lake", f"{output}/lake/**/*.parquet", _LAKE),
                *self._files("enriched", f"{output}/enriched/*.ndjson", _ENRICHED),
                *self._files("dead_letters", f"{output}/dead_letters/*.parquet", _DEAD_LETTERS),
                *self.miscounted(json.loads((output / "summary.json").read_text())),
                *self._inaccurate_users(),
            ]
        finally:
            self.sql.execute("DETACH run")

    def miscounted(self, summary: dict[str, Any]) -> list[str]:
        """Compare what a run counted; returns what differs, in words."""
        verdicts = dict(self.rows("SELECT verdict, count(*) FROM records GROUP BY ALL"))
        ((accepted,),) = self.rows("SELECT count(*) FROM accepted")
        usable = verdicts.get("on_time", 0) + verdicts.get("late", 0)
        names = ("invalid", "future", "too_late", "on_time", "late")
        written = ("page_view_counts", "active_users", "user_sessions")
        expected = {
            "read": sum(verdicts.values()),
            "verdicts": {name: verdicts.get(name, 0) for name in names}
            | {"accepted": accepted, "duplicate": usable - accepted},
            "invalid": dict(
                self.rows(
                    "SELECT reason, count(*) FROM records WHERE verdict = 'invalid' GROUP BY ALL"
                )
            ),
            "ignored_session_ends": self._count("placed WHERE session = 0"),
            "rows_written": {
                name: self._count(name) for name in (*written, "lake", "enriched", "dead_letters")
            },
            "broken_laws": [],
        }
        return [
            f"summary.json: {name} is {summary[name]}, not {value}"
            for name, value in expected.items()
            if summary[name] != value
        ]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Query what is expected: the tables and views of the SQL files."""
        return self.sql.execute(query).fetchall()

    def _count_active_users(self) -> None:
        windows = self.rows(
            "SELECT window_start, window_end, list(user_id), sum(events) FROM users_of_windows "
            "GROUP BY ALL"
        )
        counts = [
            (start, end, min(estimate(users), events), len(users))
            for start, end, users, events in windows
        ]
        columns = ("window_start", "window_end", "active_users", "truly_active")
        values = zip(*counts, strict=True) if counts else [()] * len(columns)
        arrays = [pa.array(column, pa.int64()) for column in values]
        self.sql.register("counted", pa.table(arrays, names=columns))
        self.sql.execute("CREATE TABLE active_users_and_truth AS FROM counted")
        self.sql.execute(
            "CREATE VIEW active_users AS SELECT * EXCLUDE (truly_active) "
            "FROM active_users_and_truth"
        )

    def _inaccurate_users(self) -> list[str]:
        # Of a few users one shares a register with another, or not: that rounds to one.
        inaccurate = self.rows(
            "SELECT window_start, active_users, truly_active FROM active_users_and_truth "
            f"WHERE abs(active_users - truly_active) > 1 + {SIGMAS * STANDARD_ERROR} * truly_active"
        )
        return [f"active_users: {users} at {at}, truly {truth}" for at, users, truth in inaccurate]

    def _table(self, name: str, found: str) -> list[str]:
        columns = [
            f"epoch_us({column}) AS {column}" if type_.startswith("TIMESTAMP") else column
            for column, type_, *_ in self.rows(f"DESCRIBE {found}")
        ]
        return self._compared(name, f"SELECT {', '.join(columns)} FROM {found}")

    def _files(self, name: str, pattern: str, query: str) -> list[str]:
        if not self.rows(f"FROM glob('{pattern}')"):
            ((rows,),) = self.rows(f"SELECT count(*) FROM {name}")
            return [f"{name}: no files, {rows} rows expected"] if rows else []
        return self._compared(name, query.format(files=pattern))

    def _compared(self, name: str, query: str) -> list[str]:
        self.sql.execute(f"CREATE OR REPLACE TEMP TABLE found AS {query}")
        names = ", ".join(f'"{column}"' for column, *_ in self.rows(f"DESCRIBE {name}"))
        expected, found = f"SELECT {names} FROM {name}", f"SELECT {names} FROM found"
        different = []
        for what, these, those in (
            ("missing", expected, found),
            ("unexpected", found, expected),
        ):
            rows = self.rows(f"({these}) EXCEPT ALL ({those}) ORDER BY ALL")
            if rows:
                different.append(f"{name}: {len(rows)} rows {what}, the first: {rows[0]}")
        return different

    def _count(self, relation: str) -> int:
        ((rows,),) = self.rows(f"SELECT count(*) FROM {relation}")
        return int(rows)


def write_raw(path: Path, records: Iterable[tuple[str, pa.RecordBatch]]) -> None:
    """Write raw input to a Parquet file.

    Args:
      path: The file.
      records: Pairs of a topic and a batch with the columns payload, offset and append_time.
    """
    with pq.ParquetWriter(path, RAW) as file:
        for topic, batch in records:
            columns = {
                "topic": pa.array([topic] * len(batch), pa.string()),
                "partition": pa.array([0] * len(batch), pa.int32()),
                "offset": batch["offset"],
                "append_us": batch["append_time"].cast(pa.int64()),
                "payload": batch["payload"],
            }
            file.write_batch(pa.RecordBatch.from_pydict(columns, schema=RAW))


class _RefusedError(Exception):
    """A token that JSON doesn't have."""


def syntax_reason(payload: bytes | None) -> str | None:
    """Tell why bytes are no JSON object in which every key occurs once; None: they are."""
    if payload is None or not payload.strip(b" \t\r\n"):
        return "empty_payload"
    if len(payload) > MAX_PAYLOAD_BYTES:
        return "too_large"
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return "bad_text"
    try:
        record = json.loads(
            text, object_pairs_hook=_Pairs, parse_constant=_refuse, parse_int=len, parse_float=len
        )
    except RecursionError:
        return "too_deep"
    except _RefusedError:
        return "bad_number"
    except ValueError:
        return "not_json"
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(record) > MAX_DEPTH:
        return "too_deep"
    if not isinstance(record, _Pairs):
        return "not_an_object"
    keys = [key for key, _ in record]
    if len(set(keys)) < len(keys):
        return "duplicate_key"
    try:
        json.dumps(dict(record), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "bad_text"  # half of a surrogate pair
    return None


class _Pairs(list[tuple[str, Any]]):
    """The members of an object, repeated ones too."""


def _refuse(token: str) -> None:
    raise _RefusedError(token)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += any(isinstance(each, list) for each in level)
        level = [
            inner[1] if isinstance(each, _Pairs) else inner
            for each in level
            if isinstance(each, list)
            for inner in each
        ]
    return depth


_TABLES = ("page_view_counts", "active_users", "user_sessions")

_EVENT = "epoch_us(event_time) AS event_us, user_id, page_url, event_type, event_id"

_LAKE = f"""
    SELECT
        topic, partition, "offset", epoch_us(append_time) AS append_us, verdict, {_EVENT},
        event_date::VARCHAR AS event_date
    FROM read_parquet('{{files}}', hive_partitioning = true)
"""

_ENRICHED = """
    SELECT
        epoch_us(event_time) AS event_us, user_id, page_url, event_type, event_id,
        epoch_us(processing_time) AS processing_us
    FROM read_ndjson('{files}', columns = {{
        event_time: 'TIMESTAMPTZ', user_id: 'VARCHAR', page_url: 'VARCHAR',
        event_type: 'VARCHAR', event_id: 'VARCHAR', processing_time: 'TIMESTAMPTZ'
    }})
"""

_DEAD_LETTERS = """
    SELECT
        topic, partition, "offset", epoch_us(append_time) AS append_us, payload, stage, reason,
        seconds_late
    FROM read_parquet('{files}')
"""
