"""How batches meet keyed work: gathered within a bundle, divided into shards."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Timestamp
from apache_beam.utils.windowed_value import WindowedValue

from beam_pipelines.kernels.columns import divided, shards_of
from beam_pipelines.kernels.key_groups import shard_labels
from beam_pipelines.model.batches import Rows, concatenated

GATHERED_ROWS = 1 << 16
"""Rows taken together, where a bundle has them."""

GATHERED_BYTES = 64 << 20
"""Bytes of columns from which on no more are taken together."""

SHARDS = 16
"""Shards that keyed work is divided into, unless told otherwise."""


def by_shard(
    rows: pa.RecordBatch, hashes: np.ndarray, shards: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Divide rows by the shard of each one's hash; yields (label of the shard, its rows)."""
    labels = shard_labels(shards)
    for shard, part in divided(rows, shards_of(hashes, shards).astype(np.int64)):
        yield labels[shard], part


def require_global_window(batches: beam.PCollection, what: str) -> None:
    """Refuse batches that were windowed: a batch has one timestamp, its rows have many.

    Raises:
      ValueError: there is a WindowInto before.
    """
    if not isinstance(batches.windowing.windowfn, GlobalWindows):
        raise ValueError(
            f"{what} takes batches in the global window; remove the WindowInto before it, which "
            "put every row into the window of its batch's timestamp, not of its own event_time"
        )


def in_global_window(element: Any, timestamp: Timestamp) -> WindowedValue:
    """Return an element as a bundle's end may yield it."""
    return WindowedValue(element, timestamp, (GlobalWindow(),))


class GatheringFn(beam.DoFn):
    """Hands `work` the columns of several batches at once.

    Nothing outlives the bundle, and an output's timestamp is up to `work`, which is told
    the earliest of the batches'.
    """

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns

    def start_bundle(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0
        self._earliest: Timestamp = MAX_TIMESTAMP

    def process(
        self, batch: Rows, timestamp: Any = beam.DoFn.TimestampParam
    ) -> Iterator[WindowedValue]:
        if len(batch) == 0:
            return
        selected = batch.select(list(self.columns))
        self._batches.append(selected)
        self._rows += len(batch)
        self._bytes += selected.nbytes
        self._earliest = min(self._earliest, timestamp)
        if self._rows >= GATHERED_ROWS or self._bytes >= GATHERED_BYTES:
            yield from self._flush()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._batches:
            yield from self._flush()

    def _flush(self) -> Iterator[WindowedValue]:
        rows = concatenated(self._batches, self._batches[0].schema)
        earliest = self._earliest
        self._reset()
        for element, stamp in self.work(rows, earliest):
            yield in_global_window(element, stamp)

    @abstractmethod
    def work(self, rows: pa.RecordBatch, earliest: Timestamp) -> Iterator[tuple[Any, Timestamp]]:
        """Yield (output, its timestamp) for the gathered rows."""
