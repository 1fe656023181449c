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
- A row older than what was folded is counted as `older_than_folded` and left out. The time
  rule routes such rows aside long before, so the count is zero; runs assert it.
- Bounded input is folded once, at its end.
"""

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

from beam_pipelines.kernels.columns import divided, micros
from beam_pipelines.model.batches import BatchCoder, Rows, concatenated
from beam_pipelines.model.records import EVENT_TIME, MAX_EVENT_TIME_US, MIN_EVENT_TIME_US
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.telemetry import Counter

MINUTE_US = 60_000_000
_SECOND_US = 1_000_000
_SLOTS = 8  # bags that the pending minutes take turns in: a fold reads few rows too many


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

    PENDING = tuple(BagStateSpec(f"pending_{slot}", BytesCoder()) for slot in range(_SLOTS))
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

    def process(
        self,
        element: tuple[int, Rows],
        pending_0: Any = beam.DoFn.StateParam(PENDING[0]),
        pending_1: Any = beam.DoFn.StateParam(PENDING[1]),
        pending_2: Any = beam.DoFn.StateParam(PENDING[2]),
        pending_3: Any = beam.DoFn.StateParam(PENDING[3]),
        pending_4: Any = beam.DoFn.StateParam(PENDING[4]),
        pending_5: Any = beam.DoFn.StateParam(PENDING[5]),
        pending_6: Any = beam.DoFn.StateParam(PENDING[6]),
        pending_7: Any = beam.DoFn.StateParam(PENDING[7]),
        folded_until: Any = beam.DoFn.StateParam(FOLDED_UNTIL),
        complete: Any = beam.DoFn.TimerParam(COMPLETE),
    ) -> None:
        _, rows = element
        pending = (
            pending_0, pending_1, pending_2, pending_3, pending_4, pending_5, pending_6, pending_7
        )  # fmt: skip
        until = folded_until.read()
        if until is not None:
            rows = self._younger(rows, until)
        if len(rows) == 0:
            return
        if self.bounded:
            pending[0].add(self.rows.encode(rows))
            complete.set(GlobalWindow().max_timestamp())
            return
        for minute, part in divided(rows, micros(rows[EVENT_TIME]) // MINUTE_US):
            pending[minute % _SLOTS].add(self.rows.encode(part))
            end_us = (minute + 1) * MINUTE_US
            for later_us in (0, _minutes_up(self.step.quiet_us)):
                due_us = end_us + later_us + self.wait_us
                complete.set(Timestamp(micros=due_us), dynamic_timer_tag=str(due_us))

    @on_timer(COMPLETE)
    def fold(
        self,
        due: Any = beam.DoFn.TimestampParam,
        pending_0: Any = beam.DoFn.StateParam(PENDING[0]),
        pending_1: Any = beam.DoFn.StateParam(PENDING[1]),
        pending_2: Any = beam.DoFn.StateParam(PENDING[2]),
        pending_3: Any = beam.DoFn.StateParam(PENDING[3]),
        pending_4: Any = beam.DoFn.StateParam(PENDING[4]),
        pending_5: Any = beam.DoFn.StateParam(PENDING[5]),
        pending_6: Any = beam.DoFn.StateParam(PENDING[6]),
        pending_7: Any = beam.DoFn.StateParam(PENDING[7]),
        state: Any = beam.DoFn.StateParam(STATE),
        folded_until: Any = beam.DoFn.StateParam(FOLDED_UNTIL),
    ) -> Iterator[Rows]:
        pending = (
            pending_0, pending_1, pending_2, pending_3, pending_4, pending_5, pending_6, pending_7
        )  # fmt: skip
        until = self.end_us if self.bounded else due.micros - self.wait_us
        since = folded_until.read()
        if since is not None and until <= since:
            return
        rows = []
        for bag in pending[:1] if self.bounded else _between(pending, since, until):
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
        """Take the rows before `until` out of a bag, and leave the others."""
        taken, left = [], []
        for page in bag.read():
            rows = self.rows.decode(page)
            ripe = micros(rows[EVENT_TIME]) < until
            if ripe.all():
                taken.append(rows)
            elif not ripe.any():
                left.append(page)
            else:
                taken.append(rows.filter(pa.array(ripe)))
                left.append(self.rows.encode(rows.filter(pa.array(~ripe))))
        if taken:
            bag.clear()
            for page in left:
                bag.add(page)
        return taken


def _between(pending: tuple, since: int | None, until: int) -> list:
    """Return the bags that may hold rows of the minutes from `since` to before `until`."""
    start = (MIN_EVENT_TIME_US if since is None else since) // MINUTE_US
    minutes = np.arange(start, min(-(-until // MINUTE_US), start + len(pending)))
    return [pending[slot] for slot in sorted(set((minutes % len(pending)).tolist()))]


def _minutes_up(duration_us: int) -> int:
    return -(-duration_us // MINUTE_US) * MINUTE_US
