"""Sessions by one scan of sorted rows against a table of open sessions."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.kernels.columns import hashes, micros, timestamps
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP

TIMEOUT = "timeout"
_OPEN = -1  # kind of the row that stands for a session still open


@dataclass(frozen=True)
class SessionRule:
    """When sessions begin and end.

    A key's rows are taken by time; at one instant, starts come first and ends last.
    (Rows of other kinds at one instant may come in any order: no result depends on it.)

    - A start opens a session, unless the open one began at that very instant.
    - Otherwise a session begins when `gap_us` or more passed since the previous row.
    - An end closes the open session, and is its last row. Without an open session it is
      ignored and counted.
    - A session that is not closed by an end times out, and ends at its last row.

    Args:
      gap_us: Inactivity that ends a session.
      start: Kind (int8 code) that opens a session; None: there are no such markers.
      end: Kind that closes a session; None likewise.
      end_name: What `ended_by` says of a session closed by an end.
      counted: Output column → kind counted in it.
    """

    gap_us: int
    start: int | None = None
    end: int | None = None
    end_name: str = "session_end"
    counted: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.gap_us <= 0:
            raise ValueError(f"the gap must be positive, got {self.gap_us} us")

    @property
    def open_schema(self) -> pa.Schema:
        """Open sessions: key, its name, start, last (µs) and the counts so far."""
        return pa.schema(
            [
                ("key", pa.uint64()),
                ("name", pa.string()),
                ("start", pa.int64()),
                ("last", pa.int64()),
                *((column, pa.int64()) for column, _ in self.counted),
            ]
        )


SESSION_ROWS = pa.schema(
    [
        pa.field("key", pa.uint64(), nullable=False),
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("kind", pa.int8(), nullable=False),
        # Set on at least one row of a key and minute: strings are not sent with every row.
        pa.field("name", pa.string()),
    ]
)


class Scanned(NamedTuple):
    """What a scan gives: sessions closed and still open, and what it counted."""

    closed: pa.Table  # name, start, end (timestamps), duration_s, counts, ended_by
    still_open: pa.Table
    ignored_ends: int  # ends that closed nothing
    nameless: int  # closed sessions whose key came without a name


def scan(still_open: pa.Table, rows: pa.RecordBatch, until_us: int, rule: SessionRule) -> Scanned:
    """Continue open sessions with the rows that follow, and close what is over.

    Args:
      still_open: Columns of `rule.open_schema`, one row per key, each older than every
        row of `rows`.
      rows: SESSION_ROWS in any order, every one before `until_us`; together with
        `still_open` they name every key. A session of a key without a name is closed like
        any other, under the key's 16 hex digits.
      until_us: No row before this time will follow: a session whose last row is at least
        the gap older is closed.
      rule: When sessions begin and end.
    """
    opened = len(still_open)
    carried = still_open.combine_chunks()
    column = {name: _array(carried[name]) for name in carried.schema.names}
    keys = np.concatenate([hashes(column["key"]), hashes(rows["key"])])
    times = np.concatenate([micros(column["last"]), micros(rows[EVENT_TIME])])
    kinds = np.concatenate([np.full(opened, _OPEN, np.int8), rows["kind"].to_numpy()])
    names = pa.concat_arrays([column["name"], rows["name"]])

    order = _order(keys, times, kinds, rule)
    key, time, kind = keys[order], times[order], kinds[order]
    continues = np.zeros(len(order), bool)  # the previous row has the same key
    np.equal(key[1:], key[:-1], out=continues[1:])
    ends = kind == rule.end if rule.end is not None else np.zeros(len(order), bool)
    starts = kind == rule.start if rule.start is not None else np.zeros(len(order), bool)
    previous = np.concatenate([time[:1], time[:-1]])

    # A row finds a session open exactly if the previous row of its key is no end and not
    # the gap away: an end closes its session or finds none, any other row is in one.
    finds_open = continues & ~_shifted(ends) & (time - previous < rule.gap_us)
    ignored = ends & ~finds_open
    begun_now = continues & _shifted(starts) & (time == previous)
    begins = ~ignored & (~finds_open | (starts & ~begun_now))

    member = np.flatnonzero(~ignored)
    first = np.flatnonzero(begins[member])
    last = np.concatenate([first[1:], [len(member)]])[: len(first)] - 1
    first_row, last_row = member[first], member[last]
    source = order[first_row]
    resumed = np.flatnonzero(kind[first_row] == _OPEN)

    began = time[first_row].copy()
    began[resumed] = micros(column["start"])[source[resumed]]
    ended = time[last_row]
    counts = {}
    for name, code in rule.counted:
        count = _sums(kind[member] == code, first)
        count[resumed] += micros(column[name])[source[resumed]]
        counts[name] = count

    by_end = ends[last_row]
    session_keys = key[first_row]
    followed = np.zeros(len(first), bool)
    np.equal(session_keys[1:], session_keys[:-1], out=followed[:-1])
    over = by_end | followed | (ended + rule.gap_us <= until_us)

    name_of = _names(order, key, names, first_row)
    closed, kept = np.flatnonzero(over), np.flatnonzero(~over)
    closed_names = name_of.take(pa.array(closed))
    return Scanned(
        pa.table(
            {
                "name": _named(closed_names, session_keys[closed]),
                "start": timestamps(began[closed]),
                "end": timestamps(ended[closed]),
                "duration_s": pa.array((ended - began)[closed] / 1e6),
                **{name: pa.array(count[closed]) for name, count in counts.items()},
                "ended_by": pa.array(np.where(by_end[closed], rule.end_name, TIMEOUT)).cast(
                    pa.string()
                ),
            }
        ),
        pa.table(
            {
                "key": pa.array(session_keys[kept]),
                "name": name_of.take(pa.array(kept)),
                "start": pa.array(began[kept]),
                "last": pa.array(ended[kept]),
                **{name: pa.array(count[kept]) for name, count in counts.items()},
            },
            schema=rule.open_schema,
        ),
        int(ignored.sum()),
        closed_names.null_count,
    )


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _shifted(flags: np.ndarray) -> np.ndarray:
    """Give each row the flag of the row before it."""
    return np.concatenate([[False], flags[:-1]])


def _sums(flags: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Count the flags of each run that starts at `first`."""
    if len(first) == 0:
        return np.zeros(0, np.int64)
    return np.add.reduceat(flags.astype(np.int64), first)


def _order(keys: np.ndarray, times: np.ndarray, kinds: np.ndarray, rule: SessionRule) -> np.ndarray:
    """Sort by key, time, and at one instant starts first, ends last.

    Ranks of 32 bits are packed into one integer, since sorting integers takes a third of
    a sort by two columns. Years 1 to 9999 in µs leave room for the two bits.
    """
    turn = np.full(len(kinds), 1, np.int64)
    if rule.start is not None:
        turn[kinds == rule.start] = 0
    if rule.end is not None:
        turn[kinds == rule.end] = 2
    by_time = np.argsort(times * 4 + turn)
    by_key = np.argsort(keys)
    in_order = keys[by_key]
    group = np.zeros(len(keys), np.int64)
    np.cumsum(in_order[1:] != in_order[:-1], out=group[1:])
    packed = np.empty(len(keys), np.int64)
    packed[by_key] = group << 32
    packed[by_time] |= np.arange(len(keys))
    packed.sort()
    return by_time[packed & 0xFFFFFFFF]


def _names(order: np.ndarray, key: np.ndarray, names: pa.Array, rows: np.ndarray) -> pa.Array:
    """Return the name of the key of each sorted row, from any row of the key that has one.

    Null where none has. That would be a fault, but it is in state: to raise here would end
    the job at every attempt.
    """
    group = np.zeros(len(key), np.int64)
    np.cumsum(key[1:] != key[:-1], out=group[1:])
    named = np.flatnonzero(names.is_valid().to_numpy(zero_copy_only=False)[order])
    source = np.full(int(group[-1]) + 1 if len(group) else 0, -1, np.int64)
    source[group[named]] = order[named]
    wanted = source[group[rows]]
    return names.take(pa.array(wanted, mask=wanted < 0))


def _named(names: pa.Array, keys: np.ndarray) -> pa.Array:
    """Put a key's 16 hex digits where its name is missing."""
    if names.null_count == 0:
        return names
    filled = zip(names.to_pylist(), keys.tolist(), strict=True)
    return pa.array([f"{key:016x}" if name is None else name for name, key in filled], names.type)


def first_names(keys: np.ndarray, minutes: np.ndarray, names: pa.Array) -> pa.Array:
    """Keep a name on at least one row of each key and minute, and null on most others.

    Args:
      keys: uint64 hash of each name. What they are made to be decides how many names are
        kept too many, never which are missing.
      minutes: int64, one per row.
      names: Strings without nulls.
    """
    if len(keys) == 0:
        return names
    mixed = keys ^ (minutes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    slots = (mixed >> np.uint64(17)).astype(np.int64) & ((1 << len(keys).bit_length()) - 1)
    owner = np.empty(1 << len(keys).bit_length(), np.int64)
    owner[slots[::-1]] = np.arange(len(keys))[::-1]  # the first row of a slot owns it
    owner = owner[slots]
    kept = owner == np.arange(len(keys))
    kept |= (keys[owner] != keys) | (minutes[owner] != minutes)
    return pc.if_else(pa.array(kept), names, pa.scalar(None, names.type))
