"""The fold in event time, with a step that numbers the rows in the order it is given them."""

from collections import defaultdict

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.typehints import typehints
from apache_beam.utils.timestamp import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_pipelines.model.batches import BatchOf, batch_of_rows
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.telemetry import tally
from beam_pipelines.testing import BatchStream, rows_in_seconds, stream_pipeline
from beam_pipelines.transforms import fold
from beam_pipelines.transforms.fold import Folded, FoldFn

TICKS = pa.schema(
    [
        pa.field(EVENT_TIME, TIMESTAMP, nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
KEYED = typehints.Tuple[int, BatchOf(TICKS)]
LATENESS_S = 120
WAIT_S = LATENESS_S + SLACK_S
SECOND_US = 1_000_000


class Number:
    """Gives each row its number in event time: state is how many there were."""

    state_schema = pa.schema([pa.field("rows", pa.int64())])
    row_schema = TICKS
    output_schema = pa.schema([*TICKS, pa.field("number", pa.int64())])

    def __init__(self, quiet_s=0):
        self.quiet_us = quiet_s * SECOND_US

    def __call__(self, state, rows, until_us):
        before = state["rows"][0].as_py() if len(state) else 0
        rows = rows.sort_by([(EVENT_TIME, "ascending"), ("text", "ascending")])
        numbers = pa.array(range(before, before + len(rows)), pa.int64())
        after = pa.table({"rows": [before + len(rows)]}, schema=self.state_schema)
        numbered = rows.append_column(pa.field("number", pa.int64()), numbers)
        return Folded(after, numbered if len(rows) else None)


def tick(at_s, text="tick"):
    return {EVENT_TIME: at_s, "text": text}


def batch(ticks):
    return batch_of_rows(
        [{**t, EVENT_TIME: round(t[EVENT_TIME] * SECOND_US)} for t in ticks], TICKS
    )


def numbered(*times_s):
    return [(float(at_s), "tick", number) for number, at_s in enumerate(times_s)]


def assert_folded(stream, expected, quiet_s=0):
    step = Number(quiet_s)
    with stream_pipeline() as pipeline:
        keyed = pipeline | stream.end() | beam.WithKeys(0).with_output_types(KEYED)
        folded = keyed | beam.ParDo(FoldFn(step, LATENESS_S, False)).with_output_types(
            BatchOf(step.output_schema)
        )
        assert_that(folded | beam.FlatMap(rows_in_seconds), equal_to(expected))


MANY = [tick(at_s) for at_s in range(30)]  # beside them, one row or two are few


def test_a_straggler_is_folded_in_its_own_minute():
    stream = BatchStream(TICKS).add(*MANY, tick(100)).watermark(60 + WAIT_S)
    assert_folded(stream, numbered(*range(30), 100))


def test_of_a_page_that_is_folded_in_part_the_rest_is_folded_later():
    stream = BatchStream(TICKS).add(*MANY, tick(100), tick(200)).watermark(60 + WAIT_S)
    stream.watermark(120 + WAIT_S).watermark(180 + WAIT_S)
    assert_folded(stream, numbered(*range(30), 100, 200))


def test_of_a_bag_that_is_folded_in_part_the_pages_that_are_left_are_folded_later():
    """Slots take turns every six minutes: two pages of one bag are of different times."""
    stream = BatchStream(TICKS).add(tick(10)).add(tick(370)).watermark(60 + WAIT_S)
    assert_folded(stream, numbered(10, 370))


@pytest.mark.parametrize("gap_s", [300, 330, 359, 360, 389, 390, 700, 7200])
def test_rows_that_follow_after_minutes_without_any_are_folded(gap_s):
    stream = BatchStream(TICKS).add(tick(0)).watermark(60 + WAIT_S)
    stream.add(tick(60 + gap_s), tick(61 + gap_s)).watermark(120 + gap_s + WAIT_S)
    assert_folded(stream, numbered(0, 60 + gap_s, 61 + gap_s))


def test_a_row_is_not_folded_before_its_minute_is_complete():
    stream = BatchStream(TICKS).add(tick(59)).watermark(59.9 + WAIT_S).add(tick(0))
    assert_folded(stream, numbered(0, 59))


# What happens to state is seen best where it is kept here.


class Bag:
    def __init__(self):
        self.pages = []

    def add(self, page):
        self.pages.append(page)

    def read(self):
        return list(self.pages)

    def clear(self):
        self.pages = []


class Value:
    value = None

    def read(self):
        return self.value

    def write(self, value):
        self.value = value

    def clear(self):
        self.value = None


class Shard:
    """A shard's state and timers, and what came of it."""

    def __init__(self, quiet_s=0, bounded=False):
        self.fn = FoldFn(Number(quiet_s), LATENESS_S, bounded)
        self.bags = [Bag() for _ in range(13)]
        self.state, self.until = Value(), Value()
        self.due_us = set()
        self.out = []

    def set(self, due, dynamic_timer_tag=""):
        self.due_us.add(due.micros)

    def add(self, ticks):
        self.fn.process((0, batch(ticks)), self.until, self, *self.bags)

    def fire(self, due_us):
        self.due_us.discard(due_us)
        folded = self.fn.fold(Timestamp(micros=due_us), self.state, self.until, *self.bags)
        for rows in folded:
            self.out += rows_in_seconds(rows)

    @property
    def pages(self):
        return [page for bag in self.bags for page in bag.pages]


class Naive:
    """The same by lists: what is folded is what any timer that fired has passed."""

    def __init__(self, quiet_s):
        self.quiet_s = -(-quiet_s // 60) * 60
        self.waiting, self.out = [], []
        self.older = self.until_s = 0
        self.untils_s = set()

    def add(self, ticks):
        for each in ticks:
            if each[EVENT_TIME] < self.until_s:
                self.older += 1
                continue
            self.waiting.append((each[EVENT_TIME], each["text"]))
            minute_s = each[EVENT_TIME] // 60 * 60 + 60
            self.untils_s |= {minute_s, minute_s + self.quiet_s}

    def fire(self, until_s):
        self.untils_s.discard(until_s)
        self.until_s = max(self.until_s, until_s)
        ripe = sorted(row for row in self.waiting if row[0] < self.until_s)
        self.waiting = [row for row in self.waiting if row[0] >= self.until_s]
        self.out += [(float(at_s), text, len(self.out) + i) for i, (at_s, text) in enumerate(ripe)]


CROWDS = st.tuples(st.integers(0, 30), st.integers(1, 20))  # (slot, rows in it)
ELEMENTS = st.lists(CROWDS, min_size=1, max_size=6)
MOVES = st.one_of(
    st.tuples(st.just("add"), ELEMENTS),
    st.tuples(st.just("watermark"), st.integers(1, 16)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(MOVES, min_size=2, max_size=20), st.sampled_from([0, 90, 600]), st.randoms())
def test_a_fold_is_that_of_lists_whatever_comes_when(moves, quiet_s, random):
    shard, naive = Shard(quiet_s), Naive(quiet_s)
    older_before = tally().get("older_than_folded", 0)
    watermark_s = texts = 0

    def fire_all():
        """Fire what is due, in any order."""
        due = [us for us in shard.due_us if us <= (watermark_s + WAIT_S) * SECOND_US]
        random.shuffle(due)
        for due_us in due:
            shard.fire(due_us)
            naive.fire(due_us // SECOND_US - WAIT_S)

    for move, value in moves:
        if move == "add":
            ticks = []
            for slot, rows in value:
                for number in range(rows):
                    texts += 1
                    ticks.append(tick(watermark_s + slot * 30 - 60 + number, f"{texts:06}"))
            shard.add(ticks := [each for each in ticks if each[EVENT_TIME] >= 0] or [tick(0)])
            naive.add(ticks)
        else:
            watermark_s += value * 30
            fire_all()
        assert {us // SECOND_US - WAIT_S for us in shard.due_us} == naive.untils_s
        assert shard.out == naive.out
    watermark_s += 1_000_000
    fire_all()
    assert shard.out == naive.out
    assert naive.waiting == []
    assert tally().get("older_than_folded", 0) - older_before == naive.older
    assert shard.pages == []


@pytest.mark.parametrize("bounded", [False, True])
def test_no_page_is_larger_than_a_page_may_be(monkeypatch, bounded):
    monkeypatch.setattr(fold, "PAGE_BYTES", 20_000)
    shard = Shard(bounded=bounded)
    long = [tick(number, "x" * 1_900) for number in range(60)]
    few = [tick(600 + 60 * number, "y" * 1_900) for number in range(11)]
    shard.add(long + few)
    assert max(map(len, shard.pages)) < 20_000 + 2_000
    assert len(shard.pages) >= 71 * 1_900 // 20_000
    due_us = sorted(shard.due_us)
    if not bounded:
        shard.fire(due_us.pop(0))
        assert len(shard.out) == 60
        assert max(map(len, shard.pages)) < 20_000 + 2_000
    for each in due_us:
        shard.fire(each)
    expected = [(float(t[EVENT_TIME]), t["text"]) for t in long + few]
    assert [row[:2] for row in shard.out] == expected


def test_a_row_larger_than_a_page_is_a_page(monkeypatch):
    monkeypatch.setattr(fold, "PAGE_BYTES", 100)
    shard = Shard()
    shard.add([tick(0), tick(1, "x" * 1_000), tick(2)])
    pages = defaultdict(int)
    for page in shard.pages:
        pages[len(page) > 1_000] += 1
    assert pages == {False: 2, True: 1}
