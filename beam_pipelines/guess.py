"""What records that can't be used look like, and the flag or command that would help."""

import csv
import difflib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from beam_pipelines.model.activity import (
    ACTIVITY,
    CLICK,
    EVENT_TYPES,
    PAGE_VIEW,
    SESSION_END,
    SESSION_START,
)
from beam_pipelines.model.records import MAX_PAYLOAD_BYTES

_NAMES_SHOWN = 12
_NAME_CHARACTERS = 40
_MOST = 0.8
"""Share of the records that must look alike."""

_FIELDS = {
    "event_time": "ts time timestamp datetime date at created_at occurred_at",
    "user_id": "uid user visitor_id visitor customer_id client_id anonymous_id distinct_id",
    "page_url": "url page uri path href link location",
    "event_type": "type event event_name action kind name",
    "event_id": "uuid guid eid message_id insert_id",
}
"""Column → what others call it, the likeliest first."""

_TYPES = {
    PAGE_VIEW: "pageview view pv page visit",
    CLICK: "click tap press",
    SESSION_START: "sessionstart start login open",
    SESSION_END: "sessionend end logout close",
}

_PRETTY_LINE = re.compile(rb'\s*([\[\]{}]+,?|"([^"\\]|\\.)*"\s*:.*|[^:]*,?)\s*')
_MEMBER = re.compile(rb'\s*"([^"\\]|\\.)*"\s*:')
_LOGGED = re.compile(rb'[^\[{"]*\[[^\]]+\] "')


def guessed(
    payloads: Sequence[bytes],
    format: str,
    fields: Mapping[str, str],
    event_types: Mapping[str, str],
) -> str | None:
    """Guess what is wrong with records, and what would help; None: no idea.

    Names in the records may be anybody's: those that a shell or `--fields` would take apart
    are quoted or left out.

    Args:
      payloads: The first of the records that can't be used, in their order.
      format: That they were read as.
      fields: Column → name in the record, as told so far.
      event_types: Foreign event type → ours, as told so far.
    """
    lines = [payload for payload in payloads if payload.strip()]
    if not lines:
        return None
    objects = [value for value in map(_json, lines) if isinstance(value, dict)]
    if _most(len(objects), lines):
        if format == "access_log":
            return "the records are JSON objects: --format=ndjson"
        return _of_fields(_common(objects), fields) or _of_types(objects, fields, event_types)
    if _most(sum(_LOGGED.match(line) is not None for line in lines), lines):
        return (
            None
            if format == "access_log"
            else "the records look like lines of an access log: --format=access_log"
        )
    return _of_json_over_lines(lines) or _of_csv(lines, fields)


def _most(count: int, lines: Sequence[Any]) -> bool:
    return count >= max(1, _MOST * len(lines))


def _json(line: bytes) -> Any:
    if len(line) > MAX_PAYLOAD_BYTES:
        return None
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _common(objects: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return names of fields, the commonest first."""
    return [name for name, _ in Counter(name for o in objects for name in o).most_common()]


def _of_fields(names: Sequence[str], fields: Mapping[str, str]) -> str | None:
    """Propose `--fields`, where required ones aren't among the names."""
    given = {column.name: fields.get(column.name, column.name) for column in ACTIVITY}
    missing = [column.name for column in ACTIVITY if given[column.name] not in names]
    if not any(not ACTIVITY.field(column).nullable for column in missing):
        return None
    free = [name for name in names if name not in given.values() and _is_plain(name)]
    pairs = {column: name for column, name in fields.items() if column not in missing}
    for column in missing:
        likely = _likeliest(column, _FIELDS[column].split(), free)
        if likely is not None:
            free.remove(likely)
            pairs[column] = likely
        elif not ACTIVITY.field(column).nullable:
            pairs[column] = "FIELD"
    flag = "--fields=" + ",".join(f"{column}={name}" for column, name in pairs.items())
    return f"the records have {_listed(names)}: {shlex.quote(flag)}"


def _of_types(
    objects: Sequence[Mapping[str, Any]], fields: Mapping[str, str], known: Mapping[str, str]
) -> str | None:
    """Propose `--event_types`, where the records have others."""
    field = fields.get("event_type", "event_type")
    values = (each[field] for each in objects if isinstance(each.get(field), str))
    theirs = [value for value in dict.fromkeys(values) if value not in (*EVENT_TYPES, *known)]
    if not theirs:
        return None
    pairs = dict(known)
    for value in filter(_is_plain, theirs):
        ours = (t for t, words in _TYPES.items() if _plain(value) in map(_plain, words.split()))
        pairs[value] = next(ours, "")
    pairs = {value: ours for value, ours in pairs.items() if ours} or {"THEIRS": "OURS"}
    flag = "--event_types=" + ",".join(f"{value}={ours}" for value, ours in pairs.items())
    return (
        f"the event types are {_listed(theirs)}, and {', '.join(EVENT_TYPES)} are known: "
        f"{shlex.quote(flag)}"
    )


def _of_json_over_lines(lines: Sequence[bytes]) -> str | None:
    if all(re.match(rb"\s*\[\s*[{\]]", line) for line in lines):
        return (
            "a record is a JSON array of objects, where an object on a line of its own is "
            "needed: jq -c '.[]' FILE > FILE.ndjson"
        )
    members = sum(_MEMBER.match(line) is not None for line in lines)
    pretty = sum(_PRETTY_LINE.fullmatch(line) is not None for line in lines)
    begins = lines[0].strip()[:1]
    if not members or not _most(pretty, lines) or begins not in (b"[", b"{", b'"'):
        return None
    what, how = ("array", ".[]") if begins == b"[" else ("object", ".")
    return (
        f"a JSON {what} over several lines (pretty-printed), where a record is one line: "
        f"jq -c '{how}' FILE > FILE.ndjson"
    )


def _of_csv(lines: Sequence[bytes], fields: Mapping[str, str]) -> str | None:
    for separator in (",", ";", "\t", "|"):
        try:
            texts = [line.decode() for line in lines]
            rows = list(csv.reader(texts, delimiter=separator, strict=True))
        except (UnicodeDecodeError, csv.Error):
            continue
        header = [rows[0][0].removeprefix("\ufeff"), *rows[0][1:]]
        alike = sum(len(row) == len(header) for row in rows)
        if len(header) < 2 or len(rows) < 2 or not _most(alike, rows):
            continue
        mapped = _of_fields(header, fields)
        then = f"; then {mapped.rpartition(': ')[2]}" if mapped else ""
        return (
            f"CSV with the columns {_listed(header)}, which isn't read; as NDJSON: python -c "
            "\"import duckdb; duckdb.sql(\\\"COPY (FROM read_csv('FILE', all_varchar = true)) "
            f"TO 'FILE.ndjson' (FORMAT json)\\\")\"{then}"
        )
    return None


def _likeliest(column: str, others: Sequence[str], names: Sequence[str]) -> str | None:
    by_plain = {_plain(name): name for name in reversed(names)}
    for word in (column, *others):
        if _plain(word) in by_plain:
            return by_plain[_plain(word)]
    near = difflib.get_close_matches(_plain(column), by_plain, n=1, cutoff=0.75)
    return by_plain[near[0]] if near else None


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _is_plain(name: str) -> bool:
    """Tell whether a name may stand in a flag that is a list of pairs."""
    return name.isprintable() and name.strip() == name != "" and not set(name) & set(",=")


def _listed(names: Sequence[str]) -> str:
    cut = [n if len(n) <= _NAME_CHARACTERS else f"{n[:_NAME_CHARACTERS]}…" for n in names]
    more = len(cut) - _NAMES_SHOWN
    return ", ".join([*cut[:_NAMES_SHOWN], *([f"and {more} more"] if more > 0 else [])])
