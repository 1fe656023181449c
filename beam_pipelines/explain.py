"""What became of an event: python -m beam_pipelines.explain EVENT_ID --lake=out/lake.

Shows every copy that was stored, the verdict on it, and the rows of the tables that the
event counts in. From the lake, and the tables where `--database` names them. Exit codes: 0;
1 the event isn't in the lake, or lake or database can't be read; 2 misuse, or a missing extra;
130 Ctrl-C.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from beam_pipelines.activity import Activity
from beam_pipelines.config import DUCKDB
from beam_pipelines.io.lake import open_lake
from beam_pipelines.io.publication import filesystem
from beam_pipelines.kernels.texts import MAX_KEY_BYTES, shortened
from beam_pipelines.model.activity import PAGE_VIEW
from beam_pipelines.model.records import EVENT_TIME, FUTURE, LATE, ON_TIME, VERDICTS
from beam_pipelines.model.secret import MissingSecret, Secret
from beam_pipelines.model.time_rule import SLACK_S, TimeRule
from beam_pipelines.model.windows import WindowPolicy
from beam_pipelines.terminal import printable, run_command, say, told

Ask = Callable[..., list[tuple[Any, ...]]]

_COUNTS = (VERDICTS[ON_TIME], VERDICTS[LATE])
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = (
    *(EVENT_TIME, "user_id", "page_url", "event_type", "identity"),
    *("topic", "partition", "offset", "append_time", "verdict"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what became of an event; returns the exit code."""
    flags = _parser().parse_args(argv)
    try:
        copies = _copies(flags)
        ask = None if flags.database is None else _database(flags.database)
        events = itertools.groupby(copies, lambda copy: copy["identity"])
        lines = [line for _, of_event in events for line in _told(list(of_event), flags, ask)]
    except FileNotFoundError as error:  # no files, or an open one was replaced meanwhile
        say(f"{error}. Is it the lake's folder, and is something in it? Ask again")
        return 1
    except (ValueError, MissingSecret) as error:
        say(error)
        return 2
    except _UnreadableDatabase as error:
        say(f"The database can't be read: {told(error)}")
        return 1
    if not copies:
        say(_absent(flags))
        return 1
    for line in lines:
        print(printable(line))
    return 0


def _told(copies: list[dict[str, Any]], flags: argparse.Namespace, ask: Ask | None) -> Iterator:
    event = copies[0]
    yield f"{flags.event_id}: {event['event_type']} of {event['page_url']} by {event['user_id']}"
    yield f"happened at {_text(event[EVENT_TIME])}"
    first = next((copy for copy in copies if copy["verdict"] in _COUNTS), None)
    yield ""
    yield from _aligned(
        ("copy in", "partition", "offset", "append time", "seconds late", "verdict", ""),
        *(
            (
                copy["topic"],
                str(copy["partition"]),
                str(copy["offset"]),
                "none" if copy["append_time"] is None else _text(copy["append_time"]),
                _seconds_late(copy, flags),
                copy["verdict"],
                "counts" if copy is first else "duplicate" if copy["verdict"] in _COUNTS else "",
            )
            for copy in copies
        ),
    )
    yield ""
    yield from _aligned(("lake file",), *((name,) for name in sorted({c["file"] for c in copies})))
    yield ""
    if first is None:
        yield "It counts in no table: it is a dead letter, as it came too late."
    else:
        yield from _aligned(("counts in", "", ""), *_rows(event, flags, ask))
    yield ""


def _rows(event: dict[str, Any], flags: argparse.Namespace, ask: Ask | None) -> Iterator[tuple]:
    at_s = (event[EVENT_TIME] - _EPOCH) // timedelta(seconds=1)
    if event["event_type"] == PAGE_VIEW:
        start_s = at_s - at_s % flags.window_s
        window = (_moment(start_s), _moment(start_s + flags.window_s))
        sql = (
            "SELECT views FROM page_view_counts "
            "WHERE window_start = ? AND window_end = ? AND page_url = ?"
        )
        page = _key(event["page_url"])
        yield "page views", _span(*window), _shown(ask, "views", sql, *window, page)
    policy = WindowPolicy.sliding(flags.users_window_s, flags.users_period_s)
    for end_s in policy.ends_of(at_s - at_s % policy.slice_s):
        window = (_moment(end_s - policy.size_s), _moment(end_s))
        sql = "SELECT active_users FROM active_users WHERE window_start = ? AND window_end = ?"
        yield "active users", _span(*window), _shown(ask, "users", sql, *window)
    # At the instant where one session ends and the next begins, an event is in the first.
    sql = (
        "SELECT session_start, session_end, page_views, clicks, ended_by FROM user_sessions "
        "WHERE user_id = ? AND session_start <= ? AND session_end >= ? "
        "ORDER BY session_end, session_start LIMIT 1"
    )
    found = ask(sql, _key(event["user_id"]), *[event[EVENT_TIME]] * 2) if ask else []
    for start, end, views, clicks, ended_by in found:
        yield "session", _span(start, end), f"page views {views}, clicks {clicks}, {ended_by}"
    if not found:
        wait_s = flags.session_gap_s + flags.allowed_lateness_s + SLACK_S
        pending = f"no row yet: it comes once {wait_s} s went by without an event of the user"
        yield "session", "", "not asked: no --database" if ask is None else pending


def _key(text: str) -> str:
    """Return what the tables hold for a text."""
    return str(shortened(pa.array([text]), MAX_KEY_BYTES)[0])


def _shown(ask: Ask | None, what: str, sql: str, *values: Any) -> str:
    if ask is None:
        return "not asked: no --database"
    rows = ask(sql, *values)
    return f"{what} {rows[0][0]}" if rows else "no row yet"


def _copies(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the records of the event in the lake, those of one identity by first sight."""
    wanted = ds.field("event_id") == flags.event_id
    if flags.date is not None:
        wanted &= ds.field("event_date") == flags.date
    found = open_lake(flags.lake).to_table([*_COLUMNS, "__filename"], wanted).to_pylist()
    root = filesystem(flags.lake)[1]
    for copy in found:
        copy["file"] = copy["__filename"].removeprefix(f"{root}/")
    return sorted(
        found,
        key=lambda copy: (
            *(copy[EVENT_TIME], copy["identity"]),
            *(copy["append_time"] or _EPOCH, copy["topic"], copy["partition"], copy["offset"]),
        ),
    )


class _UnreadableDatabase(Exception):  # noqa: N818 (no fault of ours, so not an Error)
    """A database that can't be opened or asked, and why."""


def _database(url: str) -> Ask:
    if url.startswith(DUCKDB):
        with _told_as_unreadable(duckdb.Error):
            file = duckdb.connect(url.removeprefix(DUCKDB), read_only=True)
            file.execute("SET TimeZone = 'UTC'")
        return _asking(duckdb.Error, lambda sql, values: file.execute(sql, values).fetchall())
    secret = Secret(url)
    import psycopg  # only here: who asks a file needs no driver

    from beam_pipelines.io.postgres import open_postgres

    with _told_as_unreadable(psycopg.Error):
        server = open_postgres(secret)
    return _asking(
        psycopg.Error,
        lambda sql, values: server.execute(sql.replace("?", "%s"), values).fetchall(),
    )


def _asking(errors: type[Exception], execute: Callable[..., list[tuple[Any, ...]]]) -> Ask:
    def ask(sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with _told_as_unreadable(errors):
            return execute(sql, values)

    return ask


@contextmanager
def _told_as_unreadable(errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise _UnreadableDatabase(str(error)) from error


def _absent(flags: argparse.Namespace) -> str:
    return (
        f"{flags.lake} has no event {flags.event_id!r}"
        f"{'' if flags.date is None else f' of {flags.date}'}. "
        "It may not have been read yet (a lake shows records some ten seconds later), or it "
        f"is a dead letter: {VERDICTS[FUTURE]} events and records that can't be read are kept "
        "there only. Records without an event_id can't be asked for."
    )


def _seconds_late(copy: dict[str, Any], flags: argparse.Namespace) -> str:
    if copy["append_time"] is None:
        return "complete input"
    behind = copy["append_time"] - timedelta(seconds=flags.out_of_orderness_s) - copy[EVENT_TIME]
    return f"{behind.total_seconds():.3f}" if behind > timedelta(0) else "in time"


def _moment(seconds: int) -> datetime:
    return _EPOCH + timedelta(seconds=seconds)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(sep=" ").replace("+00:00", "Z")


def _span(start: datetime, end: datetime) -> str:
    return f"{_text(start)} to {_text(end)}"


def _aligned(*rows: tuple[str, ...]) -> Iterator[str]:
    rows = tuple(tuple(map(printable, row)) for row in rows)  # as wide as they are shown
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()


def _parser() -> argparse.ArgumentParser:
    rule = TimeRule()
    parser = argparse.ArgumentParser(
        prog="python -m beam_pipelines.explain",
        description="Show what became of an event. Give it the windows and times of the run.",
        allow_abbrev=False,
    )
    parser.add_argument("event_id", metavar="EVENT_ID")
    parser.add_argument("--lake", required=True, metavar="FOLDER", help="folder or s3://… URI")
    parser.add_argument(
        "--database", metavar="URL", help="duckdb:///PATH, or env:NAME or file:PATH for Postgres"
    )
    parser.add_argument(
        "--date", type=date.fromisoformat, help="UTC date of the event: reads only that one's files"
    )
    for flag, seconds in {
        "--window_s": Activity.window_s,
        "--users_window_s": Activity.users_window_s,
        "--users_period_s": Activity.users_period_s,
        "--session_gap_s": Activity.session_gap_s,
        "--out_of_orderness_s": rule.out_of_orderness_s,
        "--allowed_lateness_s": rule.allowed_lateness_s,
    }.items():
        parser.add_argument(flag, type=int, default=seconds, metavar="N", help="of the run")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
