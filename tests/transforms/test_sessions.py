import random

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from beam_pipelines.kernels.sessions import SESSION_ROWS, SessionRule
from beam_pipelines.model.batches import (
    BatchOf,
    batch_of_rows,
    one_of,
    schema_of,
    shortened_field,
    shortened_to,
)
from beam_pipelines.model.hash_key import HashKey
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.telemetry import tally
from beam_pipelines.testing import BatchStream, RowsWithPanesFn, rows_in_seconds, stream_pipeline
from beam_pipelines.transforms.sessions import Sessionize, SessionStep, _ByKeyFn
from tests.io.contract import LONG, shortened_form
from tests.murmur import hash_of, texts_of

CALLS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("caller", pa.string(), nullable=False),
        one_of("what", ("talk", "dial", "hang_up")),
    ]
)
GAP = 300
WAIT = 120 + SLACK_S


def sessionize(**changes):
    settings = dict(
        by="caller", gap_s=GAP, marker="what", start="dial", end="hang_up", counts={"talks": "talk"}
    )
    return Sessionize(**{**settings, **changes})


def call(time, what="talk", caller="ann"):
    return {EVENT_TIME: time, "caller": caller, "what": what}


def assert_sessions(stream, expected, **changes):
    with stream_pipeline() as pipeline:
        rows = pipeline | stream.end() | sessionize(**changes)
        assert_that(rows | beam.FlatMap(rows_in_seconds), equal_to(expected))


def test_a_gap_splits_sessions():
    stream = BatchStream(CALLS).add(call(0), call(GAP - 1)).add(call(2 * GAP - 1))
    assert_sessions(
        stream,
        [
            ("ann", 0, GAP - 1, GAP - 1, 2, "timeout"),
            ("ann", 2 * GAP - 1, 2 * GAP - 1, 0, 1, "timeout"),
        ],
    )


def test_markers_split_sessions():
    stream = BatchStream(CALLS).add(
        call(0, "dial"), call(5), call(9, "hang_up"), call(10), call(20, "dial"), call(30)
    )
    assert_sessions(
        stream,
        [
            ("ann", 0, 9, 9, 1, "hang_up"),
            ("ann", 10, 10, 0, 1, "timeout"),
            ("ann", 20, 30, 10, 1, "timeout"),
        ],
    )


def test_a_late_marker_splits_a_session_that_was_not_yet_folded():
    stream = (
        BatchStream(CALLS)
        .add(call(0), call(100))
        .watermark(59 + WAIT)
        .add(call(50, "hang_up"))  # behind the watermark, within the allowance
    )
    assert_sessions(stream, [("ann", 0, 50, 50, 1, "hang_up"), ("ann", 100, 100, 0, 1, "timeout")])


def test_sessions_go_on_over_folds_and_keep_their_name():
    stream = (
        BatchStream(CALLS)
        .add(call(0, "dial"), call(1))
        .watermark(61 + WAIT)
        .add(call(200), call(250))
        .watermark(301 + WAIT)
        .add(call(480, "hang_up"))
    )
    assert_sessions(stream, [("ann", 0, 480, 480, 3, "hang_up")])


def test_each_session_is_emitted_once_when_it_can_no_longer_change():
    stream = (
        BatchStream(CALLS)
        .add(call(0), call(30, caller="bob"))
        .watermark(60 + GAP + WAIT - 1)
        .processing_time(1)
        .watermark(60 + GAP + WAIT)
        .add(call(2000))
    )
    with stream_pipeline() as pipeline:
        rows = pipeline | stream.end() | sessionize()
        stamped = rows | beam.Map(
            lambda batch, at=beam.DoFn.TimestampParam: (
                at.micros // 1_000_000,
                sorted(row[:2] for row in rows_in_seconds(batch)),
            )
        )
        panes = rows | beam.ParDo(RowsWithPanesFn()) | beam.Map(lambda pane: pane[0])
        due = 60 + GAP + WAIT
        by_shard = [(due, [("ann", 0)]), (due, [("bob", 30)])]
        last = (2040 + GAP + WAIT, [("ann", 2000)])
        assert_that(stamped, equal_to([*by_shard, last]), label="when")
        assert_that(panes, equal_to(["UNKNOWN"] * 3), label="panes")


def test_a_row_older_than_what_was_folded_is_counted_and_left_out():
    before = tally().get("older_than_folded", 0)
    stream = BatchStream(CALLS).add(call(0)).watermark(61 + WAIT).add(call(30), call(70))
    assert_sessions(stream, [("ann", 0, 70, 70, 2, "timeout")])
    assert tally()["older_than_folded"] == before + 1


@pytest.mark.parametrize("twin", ["of the hash", "of hash and minute"])
def test_callers_with_made_names_have_sessions_of_their_own(twin):
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    apart = 0 if twin == "of the hash" else (10 * golden & mask) ^ (11 * golden & mask)
    (evil,) = texts_of([hash_of("ann") ^ apart])
    before = tally().get("nameless_sessions", 0)
    stream = (
        BatchStream(CALLS)
        .add(call(610), call(670, caller=evil), call(675, "hang_up", caller=evil))
        .watermark(800)
        .add(call(810))
    )
    assert_sessions(
        stream,
        [("ann", 610, 810, 200, 2, "timeout"), (evil, 670, 675, 5, 1, "hang_up")],
        shards=1,
    )
    assert tally().get("nameless_sessions", 0) == before


def test_with_a_key_sessions_are_the_same_and_their_keys_are_others(monkeypatch):
    keys = []
    for secret in ("one key of many bytes", "another of as many"):
        monkeypatch.setenv("HASH_KEY", secret)
        hash_key = HashKey.look_up("env:HASH_KEY")
        stream = BatchStream(CALLS).add(call(0), call(1, caller="bob")).watermark(100)
        expected = [("ann", 0, 2, 2, 2, "timeout"), ("bob", 1, 1, 0, 1, "timeout")]
        assert_sessions(stream.add(call(2)), expected, hash_key=hash_key)
        stage = _ByKeyFn((EVENT_TIME, "caller"), 1, CALLS.field("caller"), hash_key)
        stage.setup()
        rows = batch_of_rows([call(0)], CALLS).select([EVENT_TIME, "caller"])
        keys += [part["key"].to_pylist() for (_, part), _ in stage.work(rows, 0)]
    assert keys[0] != keys[1]


def test_a_nameless_row_in_state_ends_its_session_and_not_the_job():
    before = tally().get("nameless_sessions", 0)
    rule = SessionRule(GAP * 1_000_000)
    step = SessionStep(CALLS.field("caller"), rule)
    rows = batch_of_rows([{"key": 0xAB, EVENT_TIME: 0, "kind": 0}], SESSION_ROWS)
    folded = step(rule.open_schema.empty_table(), rows, 10**12)
    assert rows_in_seconds(folded.output) == [("00000000000000ab", 0, 0, 0.0, "timeout")]
    assert tally()["nameless_sessions"] == before + 1


def test_an_end_without_a_session_is_ignored():
    stream = BatchStream(CALLS).add(call(0, "hang_up"), call(10), call(10 + GAP, "hang_up"))
    assert_sessions(stream, [("ann", 10, 10, 0, 1, "timeout")])


def test_a_row_whose_marker_is_null_marks_nothing():
    maybe = CALLS.set(2, CALLS.field("what").with_nullable(True))
    stream = BatchStream(maybe).add(
        call(0, None), call(10, "dial"), call(20, None), call(30), call(40, "hang_up")
    )
    assert_sessions(stream, [("ann", 0, 0, 0, 0, "timeout"), ("ann", 10, 40, 30, 1, "hang_up")])


def test_sessions_of_nobody_are_refused():
    maybe = CALLS.set(1, CALLS.field("caller").with_nullable(True))
    batches = beam.Pipeline() | beam.Create([]).with_output_types(BatchOf(maybe))
    with pytest.raises(ValueError, match="caller may be null, and rows of nobody make no session"):
        batches | sessionize()


def test_without_markers_only_gaps_count():
    stream = BatchStream(CALLS).add(call(0), call(1, "hang_up"), call(2))
    with stream_pipeline() as pipeline:
        rows = pipeline | stream.end() | Sessionize("caller", gap_s=GAP)
        assert_that(rows | beam.FlatMap(rows_in_seconds), equal_to([("ann", 0, 2, 2, "timeout")]))


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_arrival_on_bounded_input_gives_the_same_sessions(seed):
    day = 86_400
    rows = [
        call(
            (day * (i % 7) + i * 61 % 4000) * 1_000_000,
            ("talk", "dial", "hang_up")[i % 3],
            f"c{i % 11}",
        )
        for i in range(300)
    ]
    ordered = sessions_of([batch_of_rows(sorted(rows, key=lambda r: r[EVENT_TIME]), CALLS)])
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    whole = batch_of_rows(shuffled, CALLS)
    batches = [whole.slice(start, 17) for start in range(0, 300, 17)]
    assert sessions_of(batches, shards=5) == ordered
    assert sum(row[4] for row in ordered) == 100


def test_a_long_key_is_named_shortened_once_and_the_column_says_so():
    short = shortened_form(LONG[0])
    calls = [call(5, caller=LONG[0]), call(6, caller=short), call(7, caller=LONG[0])]
    sessions = [
        (short, 5, 7, 2, 2, "timeout"),
        (shortened_form(short), 6, 6, 0, 1, "timeout"),
    ]
    assert_sessions(BatchStream(CALLS).add(*calls), sessions)

    marked = CALLS.set(1, shortened_field(CALLS.field("caller"), 2_000))
    stream = BatchStream(marked).add(call(5, caller=short))
    assert_sessions(stream, [(short, 5, 5, 0, 1, "timeout")])
    rows = beam.Pipeline() | BatchStream(CALLS).end() | sessionize()
    assert shortened_to(schema_of(rows).field("caller")) == 2_000


def sessions_of(batches, shards=16):
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        rows = (
            pipeline
            | beam.Create(batches, reshuffle=False).with_output_types(BatchOf(CALLS))
            | sessionize(shards=shards)
            | beam.FlatMap(rows_in_seconds)
        )
        collected = []
        _COLLECTED.clear()
        rows | beam.Map(_collect)
    collected = sorted(_COLLECTED)
    return collected


_COLLECTED: list = []


def _collect(row):
    _COLLECTED.append(row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gap_s": 0}, "gap_s must be positive"),
        ({"marker": None}, "values of a marker column"),
        ({"end": "wave"}, "what is one of talk, dial, hang_up, never 'wave'"),
        ({"by": "callee"}, "no column 'callee'"),
    ],
)
def test_misuse_is_refused_when_the_pipeline_is_built(changes, message):
    batches = beam.Pipeline() | beam.Create([]).with_output_types(BatchOf(CALLS))
    with pytest.raises(ValueError, match=message):
        batches | sessionize(**changes)
