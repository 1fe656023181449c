"""Rows held back in state for a while, to go on together."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.coders import BytesCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, TimerSpec, on_timer
from apache_beam.typehints import typehints
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.kernels.columns import hashes_of
from beam_pipelines.kernels.key_groups import shard_labels
from beam_pipelines.model.batches import BatchCoder, BatchOf, Rows, concatenated, schema_of
from beam_pipelines.transforms.bags import AddedBytes, taking_bags
from beam_pipelines.transforms.gather import by_shard, require_global_window
from beam_pipelines.transforms.worker import tune_worker

HELD_BYTES = 16 << 20
"""Rows of a place go on early once a process has put that many bytes of them into state."""

_WITH_HELD = taking_bags(
    "held", [BagStateSpec(f"held_{number}", BytesCoder()) for number in range(4)]
)


@dataclass
class Hold(beam.PTransform):
    """Hold rows of endless input back for up to `every_s`, and let them go on together.

    For sinks whose price falls with the rows they are given at once: a runner's bundles hold
    what came in a fraction of a second. Bounded input passes as it comes, in large bundles.

    Input: batches with column `by`, in the global window.
    Output: batches of the same schema, the rows in no particular order. Rows with equal `by`
    are held in the same place, and so go on together; the places take turns, so that a sink
    has one after the other to write. A place that holds more than `HELD_BYTES` is emptied early.
    The watermark may go on meanwhile, on runners that don't hold it: nobody knows how late the
    rows are then, and windows, sessions and dedupe refuse them.

    Args:
      by: Column whose hash decides where a row is held.
      every_s: Seconds of processing time that a row waits at most, while nothing is in the way.
      shards: Places to hold rows in.

    Raises:
      ValueError: the column is missing, the batches were windowed, or a number isn't positive.
    """

    by: str
    every_s: float
    shards: int

    def __post_init__(self) -> None:
        if self.every_s <= 0 or self.shards <= 0:
            raise ValueError(f"every_s and shards must be positive, not {self}")

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        schema = schema_of(batches, self.by)
        require_global_window(batches, "Hold")
        if batches.is_bounded:
            return batches
        batch = BatchOf(schema)
        return (
            batches
            | "By place"
            >> beam.ParDo(_ByPlaceFn(self.by, self.shards)).with_output_types(
                typehints.Tuple[int, batch]
            )
            | "Together"
            >> beam.ParDo(_TogetherFn(schema, self.every_s, self.shards)).with_output_types(batch)
        )


class _ByPlaceFn(beam.DoFn):
    def __init__(self, by: str, shards: int) -> None:
        self.by = by
        self.shards = shards

    def process(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        yield from by_shard(rows, hashes_of(rows[self.by]), self.shards)


class _TogetherFn(beam.DoFn):
    GO_ON = TimerSpec("go_on", TimeDomain.REAL_TIME)

    def __init__(self, schema: pa.Schema, every_s: float, shards: int) -> None:
        self.coder = BatchCoder(schema)
        self.every_s = every_s
        self.added = AddedBytes()
        self.turns_s = {
            label: number / shards * every_s for number, label in enumerate(shard_labels(shards))
        }

    def setup(self) -> None:
        tune_worker()

    @_WITH_HELD
    def process(
        self,
        element: tuple[int, Rows],
        held: Any,
        go_on: Any = beam.DoFn.TimerParam(GO_ON),
    ) -> Iterator[Rows]:
        place, rows = element
        now = time.time()
        turn_s = self.turns_s[place]
        bag = int(now * len(held) / self.every_s) % len(held)  # in turns: a bundle commits to few
        page = self.coder.encode(rows)
        held[bag].add(page)
        if self.added.add(place, len(page)) > HELD_BYTES:
            yield from self._all(place, held)
            return  # a timer that is set already finds nothing to do
        due = ((now - turn_s) // self.every_s + 1) * self.every_s + turn_s
        # A tag of its own: setting one timer anew would put off what it was set for before.
        go_on.set(Timestamp(due), dynamic_timer_tag=str(due))

    @on_timer(GO_ON)
    @_WITH_HELD
    def let_go(self, held: Any, place: Any = beam.DoFn.KeyParam) -> Iterator[Rows]:
        yield from self._all(place, held)

    def _all(self, place: int, held: tuple) -> Iterator[Rows]:
        self.added.emptied(place)
        pages = [page for bag in held for page in bag.read()]
        if not pages:
            return
        for bag in held:
            bag.clear()
        yield concatenated([self.coder.decode(page) for page in pages], self.coder.schema)
