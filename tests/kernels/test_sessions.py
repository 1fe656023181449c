import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.kernels.columns import timestamps
from beam_pipelines.kernels.hashing import hash_strings
from beam_pipelines.kernels.sessions import SESSION_ROWS, SessionRule, first_names, scan

VIEW, CLICK, START, END = range(4)
GAP = 30
RULE = SessionRule(
    gap_us=GAP, start=START, end=END, end_name="bye", counted=(("views", VIEW), ("clicks", CLICK))
)
FOREVER = 1 << 60
NONE_OPEN = RULE.open_schema.empty_table()


def naive_sessions(events):
    """One event at a time, as the rule is written. Returns sessions and ignored ends."""
    sessions, ignored, current = [], 0, {}

    def close(user, reason):
        s = current.pop(user)
        sessions.append((user, s["start"], s["last"], s["views"], s["clicks"], reason))

    turn = {START: 0, VIEW: 1, CLICK: 1, END: 2}
    for user, time, kind in sorted(events, key=lambda e: (e[0], e[1], turn[e[2]])):
        session = current.get(user)
        if session and time - session["last"] >= GAP:
            close(user, "timeout")
            session = None
        if kind == END:
            if session is None:
                ignored += 1
                continue
            session["last"] = time
            close(user, "bye")
            continue
        if kind == START and session and session["start"] < time:
            close(user, "timeout")
            session = None
        if session is None:
            session = current[user] = {"start": time, "last": time, "views": 0, "clicks": 0}
        session["last"] = time
        session["views"] += kind == VIEW
        session["clicks"] += kind == CLICK
    for user in list(current):
        close(user, "timeout")
    return sorted(sessions), ignored


def session_rows(events):
    users = pa.array([user for user, _, _ in events], pa.string())
    times = np.array([time for _, time, _ in events], np.int64)
    keys = hash_strings(users)
    return pa.RecordBatch.from_arrays(
        [
            pa.array(keys),
            timestamps(times),
            pa.array([kind for _, _, kind in events], pa.int8()),
            first_names(keys, times // 60, users),
        ],
        schema=SESSION_ROWS,
    )


def as_tuples(closed):
    def us(t):
        return int(np.datetime64(t.replace(tzinfo=None), "us").astype(np.int64))

    return [
        (r["name"], us(r["start"]), us(r["end"]), r["views"], r["clicks"], r["ended_by"])
        for r in closed.to_pylist()
    ]


EVENTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(-200, 200), st.sampled_from([0, 1, 2, 3])),
    max_size=40,
)


@given(EVENTS)
def test_a_scan_agrees_with_the_rule_taken_one_event_at_a_time(events):
    scanned = scan(NONE_OPEN, session_rows(events), FOREVER, RULE)
    sessions, ignored = naive_sessions(events)
    assert sorted(as_tuples(scanned.closed)) == sessions
    assert scanned.ignored_ends == ignored
    assert len(scanned.still_open) == 0


@given(EVENTS, st.lists(st.integers(-200, 220), max_size=6))
def test_folding_in_pieces_gives_the_same_sessions(events, cuts):
    still_open, closed, ignored, before = NONE_OPEN, [], 0, -FOREVER
    for cut in [*sorted(cuts), FOREVER]:
        piece = [e for e in events if before <= e[1] < cut]
        scanned = scan(still_open, session_rows(piece), cut, RULE)
        closed += as_tuples(scanned.closed)
        still_open, ignored, before = scanned.still_open, ignored + scanned.ignored_ends, cut
    assert (sorted(closed), ignored) == naive_sessions(events)


def test_an_open_session_waits_until_the_gap_has_passed():
    rows = session_rows([("a", 100, VIEW)])
    waiting = scan(NONE_OPEN, rows, 100 + GAP - 1, RULE)
    assert (len(waiting.closed), len(waiting.still_open)) == (0, 1)
    done = scan(waiting.still_open, session_rows([]), 100 + GAP, RULE)
    assert as_tuples(done.closed) == [("a", 100, 100, 1, 0, "timeout")]
    assert done.closed["duration_s"].to_pylist() == [0.0]


def test_events_at_the_instant_of_an_end_belong_to_the_ended_session():
    rows = session_rows([("a", 10, END), ("a", 10, VIEW), ("a", 5, START), ("a", 10, CLICK)])
    assert as_tuples(scan(NONE_OPEN, rows, 11, RULE).closed) == [("a", 5, 10, 1, 1, "bye")]


def test_keys_made_to_meet_in_other_minutes_keep_their_names():
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1  # by which minutes are mixed into the key
    for key in (7, 7 ^ (10 * golden & mask) ^ (11 * golden & mask)):
        for minutes in ([10, 11], [11, 10], [10, 10]):
            keys = np.array([7, key], np.uint64)
            kept = first_names(keys, np.array(minutes), pa.array(["ann", "bob"])).to_pylist()
            once = key == 7 and minutes == [10, 10]
            assert kept == ["ann", None if once else "bob"]


def test_minutes_of_a_key_that_share_a_slot_keep_their_names():
    minutes = np.arange(100)
    kept = first_names(np.full(100, 7, np.uint64), minutes, pa.array(["ann"] * 100))
    assert kept.null_count == 0


def test_a_session_of_a_key_without_a_name_is_closed_under_the_keys_digits():
    rows = session_rows([("a", 100, VIEW), ("b", 101, CLICK), ("b", 102, CLICK)])
    nameless = rows.set_column(3, SESSION_ROWS.field("name"), pa.array(["a", None, None]))
    scanned = scan(NONE_OPEN, nameless, FOREVER, RULE)
    digits = f"{rows['key'][1].as_py():016x}"
    assert sorted(as_tuples(scanned.closed)) == sorted(
        [("a", 100, 100, 1, 0, "timeout"), (digits, 101, 102, 0, 2, "timeout")]
    )
    assert scanned.nameless == 1


def test_a_name_that_comes_later_names_an_open_session():
    rows = session_rows([("a", 100, VIEW)])
    nameless = rows.set_column(3, SESSION_ROWS.field("name"), pa.nulls(1, pa.string()))
    waiting = scan(NONE_OPEN, nameless, 101, RULE)
    assert (waiting.still_open["name"].to_pylist(), waiting.nameless) == ([None], 0)
    done = scan(waiting.still_open, session_rows([("a", 102, VIEW)]), FOREVER, RULE)
    assert as_tuples(done.closed) == [("a", 100, 102, 2, 0, "timeout")]
    assert done.nameless == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=300))
def test_every_key_and_minute_keeps_its_name(rows):
    names = pa.array([f"user-{key}" for key, _ in rows])
    minutes = np.array([minute for _, minute in rows])
    kept = first_names(hash_strings(names), minutes, names).to_pylist()
    assert {(n, m) for n, (_, m) in zip(kept, rows, strict=True) if n} == {
        (f"user-{key}", m) for key, m in rows
    }
    assert all(n in (None, f"user-{key}") for n, (key, _) in zip(kept, rows, strict=True))
