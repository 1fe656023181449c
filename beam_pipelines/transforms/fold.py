"""A fold in event time: rows are scanned in order, once no earlier one can come.

Rows wait in state, by minute. When the watermark has passed a minute's end by the allowed
lateness and a slack, a pure function takes the minute's rows together with the shard's
state and returns the new state and what came of it. Each row is folded once, in event-time
order, whatever order it arrived in; each result is emitted once.

- Timers are set on arrival: for every minute that has rows, one when it is complete and
  one `quiet_us` later, when what it opened may be over. None is set in a callback, so
  time in which nothing happens costs nothing.
- The timers of a key may fire in any order: a timer folds all minutes that are complete at
  its time, and one that comes after a later one finds nothing to do.
- What a bundle brings is kept as few pages: each has its price, whatever is in it. The rows of
  a slot of time that many rows are in make a page in that slot's bag; the few others (late
  ones, mostly) go into a page of stragglers, which every fold looks through.
- A row older than what was folded is counted as `older_than_folded` and left out. The time
  rule routes such rows aside long before, so the count is zero; runs assert it.
- Bounded input is folded once, at its end.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.coders import BytesCoder, VarIntCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.kernels.columns import divided, in_pieces, micros
from beam_pipelines.model.batches import BatchCoder, Rows, concatenated
from beam_pipelines.model.records import EVENT_TIME, MAX_EVENT_TIME_US, MIN_EVENT_TIME_US
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.telemetry import Counter
from beam_pipelines.transforms.bags import taking_bags
from beam_pipelines.transforms.worker import tune_worker

MINUTE_US = 60_000_000
_SECOND_US = 1_000_000
_SLOT_US = 30_000_000
_SLOTS = 12  # six minutes: what is pending by default, so that a fold reads few rows too many

PAGE_BYTES = 4 << 20
"""Of the rows in a page: a runner sends each page of state, and reads it, as a whole."""

_FEW = 8  # one part in so many of an element's rows is no page of its own

_WITH_PENDING = taking_bags(
    "pending",
    [
        *(BagStateSpec(f"pending_{slot}", BytesCoder()) for slot in range(_SLOTS)),
        BagStateSpec("stragglers", BytesCoder()),
    ],
)


class Folded(NamedTuple):
    """What a step gives: the new state, and the output (None: nothing)."""

    state: pa.Table
    output: pa.RecordBatch | None


class Step(Protocol):
    """A pure function over a shard's state and its next rows in event time."""

    state_schema: pa.Schema
    row_schema: pa.Schema  # has event_time
    quiet_us: int  # what rows open is over this long after them, at the latest

    def __call__(self, state: pa.Table, rows: pa.RecordBatch, until_us: int) -> Folded:
        """Take in rows (any order), all of those before `until_us` not taken in yet."""


class FoldFn(beam.DoFn):
    """Folds (shard, batch of `step.row_schema`) elements in event time.

    Args:
      step: What is done with the rows.
      allowed_lateness_s: Seconds behind the watermark that a row still counts.
      bounded: Whether the input is.
    """

    STATE = ReadModifyWriteStateSpec("state", BytesCoder())
    FOLDED_UNTIL = ReadModifyWriteStateSpec("folded_until", VarIntCoder())
    COMPLETE = TimerSpec("complete", TimeDomain.WATERMARK)

    def __init__(self, step: Step, allowed_lateness_s: int, bounded: bool) -> None:
        self.step = step
        self.bounded = bounded
        self.wait_us = (allowed_lateness_s + SLACK_S) * _SECOND_US
        self.end_us = MAX_EVENT_TIME_US + 1 + step.quiet_us  # all that is open is over by then
        self.rows = BatchCoder(step.row_schema)
        self.state = BatchCoder(step.state_schema)
        self.older = Counter("older_than_folded")

    def setup(self) -> None:
        tune_worker()

    @_WITH_PENDING
    def process(
        self,
        element: tuple[int, Rows],
        pending: Any,
        folded_until: Any = beam.DoFn.StateParam(FOLDED_UNTIL),
        complete: Any = beam.DoFn.TimerParam(COMPLETE),
    ) -> None:
        _, rows = element
        *slots, stragglers = pending
        until = folded_until.read()
        if until is not None:
            rows = self._younger(rows, until)
        if len(rows) == 0:
            return
        if self.bounded:
            # Any bag will do, and none may grow too large: all are read at the end.
            for piece in in_pieces(rows, PAGE_BYTES):
                slots[random.randrange(_SLOTS)].add(self.rows.encode(piece))
            complete.set(GlobalWindow().max_timestamp())
            return
        few = []
        for slot, part in divided(rows, micros(rows[EVENT_TIME]) // _SLOT_US):
            if len(part) * _FEW > len(rows):
                self._add(slots[slot % _SLOTS], part)
            else:
                few.append(part)
        if few:
            self._add(stragglers, concatenated(few, self.step.row_schema))
        for minute in np.unique(micros(rows[EVENT_TIME]) // MINUTE_US).tolist():
            end_us = (minute + 1) * MINUTE_US
            for later_us in (0, _minutes_up(self.step.quiet_us)):
                due_us = end_us + later_us + self.wait_us
                complete.set(Timestamp(micros=due_us), dynamic_timer_tag=str(due_us))

    @on_timer(COMPLETE)
    @_WITH_PENDING
    def fold(
        self,
        pending: Any,
        due: Any = beam.DoFn.TimestampParam,
        state: Any = beam.DoFn.StateParam(STATE),
        folded_until: Any = beam.DoFn.StateParam(FOLDED_UNTIL),
    ) -> Iterator[Rows]:
        *slots, stragglers = pending
        until = self.end_us if self.bounded else due.micros - self.wait_us
        since = folded_until.read()
        if since is not None and until <= since:
            return
        rows = []
        for bag in slots if self.bounded else [*_between(slots, since, until), stragglers]:
            rows += self._taken(bag, until)
        before = state.read()
        folded = self.step(
            self.step.state_schema.empty_table()
            if before is None
            else pa.Table.from_batches([self.state.decode(before)]),
            concatenated(rows, self.step.row_schema),
            until,
        )
        if len(folded.state):
            batches = folded.state.combine_chunks().to_batches()
            state.write(self.state.encode(concatenated(batches, self.step.state_schema)))
        elif before is not None:
            state.clear()
        folded_until.write(until)
        if folded.output is not None:
            yield folded.output

    def _younger(self, rows: pa.RecordBatch, until: int) -> pa.RecordBatch:
        older = micros(rows[EVENT_TIME]) < until
        if not older.any():
            return rows
        self.older.inc(int(older.sum()))
        return rows.filter(pa.array(~older))

    def _taken(self, bag: Any, until: int) -> list[pa.RecordBatch]:
        """Take the rows before `until` out of a bag, and leave the others, in few pages."""
        taken, left = [], []
        for page in bag.read():
            rows = self.rows.decode(page)
            ripe = micros(rows[EVENT_TIME]) < until
            if ripe.all():
                taken.append(rows)
            elif not ripe.any():
                left.append(rows)
            else:
                taken.append(rows.filter(pa.array(ripe)))
                left.append(rows.filter(pa.array(~ripe)))
        if taken:
            bag.clear()
            if left:
                self._add(bag, concatenated(left, self.step.row_schema))
        return taken

    def _add(self, bag: Any, rows: pa.RecordBatch) -> None:
        for piece in in_pieces(rows, PAGE_BYTES):
            bag.add(self.rows.encode(piece))


def _between(slots: list, since: int | None, until: int) -> list:
    """Return the bags of the slots that lie between `since` and `until`."""
    start = (MIN_EVENT_TIME_US if since is None else since) // _SLOT_US
    numbers = np.arange(start, min(-(-until // _SLOT_US), start + _SLOTS))
    return [slots[number] for number in sorted(set((numbers % _SLOTS).tolist()))]


def _minutes_up(duration_us: int) -> int:
    return -(-duration_us // MINUTE_US) * MINUTE_US
