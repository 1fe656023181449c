"""First sights."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.coders import BytesCoder
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagStateSpec,
    ReadModifyWriteStateSpec,
    TimerSpec,
    on_timer,
)
from apache_beam.transforms.window import GlobalWindow
from apache_beam.typehints import typehints
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.kernels.columns import divided, hashes_of, micros, shards_of, texts_of
from beam_pipelines.kernels.hashing import hash_with
from beam_pipelines.kernels.key_groups import shard_labels
from beam_pipelines.kernels.secure_hashing import secure_hashes
from beam_pipelines.kernels.seen import SeenTable
from beam_pipelines.model.batches import Rows, hint_of, lateness_of
from beam_pipelines.model.hash_key import HashKey, key_of
from beam_pipelines.model.records import EVENT_TIME, timed_schema_of
from beam_pipelines.model.time_rule import SLACK_S
from beam_pipelines.telemetry import Counter
from beam_pipelines.transforms.bags import taking_bags
from beam_pipelines.transforms.gather import SHARDS, GatheringFn, require_global_window
from beam_pipelines.transforms.journal import Journal
from beam_pipelines.transforms.worker import tune_worker

BUCKET_S = 300
"""Seconds of event time whose ids are kept and forgotten together."""

_SECOND_US = 1_000_000

_WITH_PAGES = taking_bags(
    "pages", [BagStateSpec(f"pages_{number}", BytesCoder()) for number in range(8)]
)


@dataclass
class Deduplicate(beam.PTransform):
    """Let the first row of each identity pass.

    Input: batches with `event_time` and column `by`, in the global window.
    Output: batches of the same schema without the rows whose identity was seen before:
    equal `by` and equal `event_time`. Of rows that arrive together the first one stays.

    Exact while copies arrive within the allowance: on endless input the ids of a bucket
    (`BUCKET_S` of event time) are kept until the watermark is past its end by the lateness
    that the batches' hint carries, and `SLACK_S`. A later copy was too late for any table. On
    bounded input all are kept until the end.

    Identities are compared by a 64-bit hash: of a billion rows within the horizon, two
    different ones share a hash with a chance of 3 %. Who knows a row's identity can make
    another row of its hash; with a `hash_key` nobody can who doesn't know it.

    Args:
      by: Column that, with the event time, identifies a row; a uint64 column is taken as
        the hash itself. Rows in which it is null share one identity per event time (with
        the empty text's): give each row an id, or the others are counted as duplicates.
      shards: Parts that the ids are divided into.
      hash_key: Of the hash that identities are compared by; None: MurmurHash.

    Raises:
      ValueError: a column is missing, the batches were windowed, they are unbounded and
        nobody has judged their lateness, or there is a `hash_key` for hashes (give it to
        what made them).
    """

    by: str
    shards: int = SHARDS
    hash_key: HashKey | None = None

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        schema = timed_schema_of(batches, self.by)
        require_global_window(batches, "Deduplicate")
        if self.hash_key and pa.types.is_uint64(schema.field(self.by).type):
            raise ValueError(f"{self.by} holds hashes: give the hash_key to what makes them")
        batch = hint_of(batches)
        lateness_s = lateness_of(batches, "Deduplicate")
        keyed = typehints.Tuple[typehints.Tuple[int, int], batch]
        return (
            batches
            | "By identity"
            >> beam.ParDo(
                _ByIdentityFn(schema, self.by, self.shards, batches.is_bounded, self.hash_key)
            ).with_output_types(keyed)
            | "First sights"
            >> beam.ParDo(
                _FirstSightsFn(self.by, lateness_s, batches.is_bounded, self.hash_key)
            ).with_output_types(batch)
        )


def _identities(rows: pa.RecordBatch, by: str, key: bytes) -> np.ndarray:
    column = rows[by]
    if key:
        return secure_hashes(texts_of(column), key, b"name and time", micros(rows[EVENT_TIME]))
    if not pa.types.is_uint64(column.type):
        return hash_with(hashes_of(column), micros(rows[EVENT_TIME]))
    if not column.null_count:
        return hashes_of(column)
    unknown = hash_with(np.zeros(len(rows), np.uint64), micros(rows[EVENT_TIME]))
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    return np.where(is_null, unknown, hashes_of(column))


class _ByIdentityFn(GatheringFn):
    """Keys rows by (shard of the identity, bucket of the event time).

    The bucket only serves to forget: bounded input has a single one, so its cost doesn't
    follow the calendar. Batches are gathered, as a reader of many partitions yields many
    small ones, and what is behind is paid for by the element.
    """

    def __init__(
        self,
        schema: pa.Schema,
        by: str,
        shards: int,
        bounded: bool,
        hash_key: HashKey | None = None,
    ) -> None:
        super().__init__(tuple(schema.names))
        self.by = by
        self.shards = shards
        self.bounded = bounded
        self.hash_key = hash_key

    def setup(self) -> None:
        self._key = key_of(self.hash_key)

    def work(self, rows: pa.RecordBatch, earliest: Timestamp) -> Iterator:
        keys = shards_of(_identities(rows, self.by, self._key), self.shards).astype(np.int64)
        if not self.bounded:
            keys += micros(rows[EVENT_TIME]) // (BUCKET_S * _SECOND_US) * self.shards
        for key, part in divided(rows, keys):
            bucket, shard = divmod(key, self.shards)
            yield ((shard_labels(self.shards, bucket)[shard], bucket), part), earliest


class _FirstSightsFn(beam.DoFn):
    TOKEN = ReadModifyWriteStateSpec("token", BytesCoder())
    FORGET = TimerSpec("forget", TimeDomain.WATERMARK)

    def __init__(self, by: str, lateness_s: int, bounded: bool, hash_key: HashKey | None) -> None:
        self.by = by
        self.hash_key = hash_key
        self.kept_s = lateness_s + SLACK_S
        self.bounded = bounded
        self.stage = f"dedupe-{uuid.uuid4()}"
        self.accepted = Counter("accepted")
        self.duplicate = Counter("duplicate")

    def setup(self) -> None:
        tune_worker()
        self._key = key_of(self.hash_key)
        self.journal = Journal(self.stage, _seen_table)

    def start_bundle(self) -> None:
        self.journal.start_bundle()

    @_WITH_PAGES
    def process(
        self,
        element: tuple[tuple[int, int], Rows],
        pages: Any,
        token: Any = beam.DoFn.StateParam(TOKEN),
        forget: Any = beam.DoFn.TimerParam(FORGET),
    ) -> Iterator[Rows]:
        key, rows = element
        if len(rows) == 0:
            return
        ids = _identities(rows, self.by, self._key)
        table = self.journal.table(key, pages, token)
        if len(table) == 0:
            forget.set(self._forgotten_at(key[1]))
        first = table.add(ids)
        passed = int(first.sum())
        self.accepted.inc(passed)
        self.duplicate.inc(len(rows) - passed)
        if passed:
            self.journal.append(key, ids[first].tobytes(), pages, token)
            yield rows if passed == len(rows) else rows.filter(pa.array(first))

    @on_timer(FORGET)
    @_WITH_PAGES
    def forget(
        self,
        pages: Any,
        key: Any = beam.DoFn.KeyParam,
        token: Any = beam.DoFn.StateParam(TOKEN),
    ) -> None:
        self.journal.clear(key, pages, token)

    def finish_bundle(self) -> None:
        self.journal.finish_bundle()

    def _forgotten_at(self, bucket: int) -> Timestamp:
        if self.bounded:
            return GlobalWindow().max_timestamp()
        return Timestamp((bucket + 1) * BUCKET_S + self.kept_s)


def _seen_table(pages: Iterable[bytes]) -> SeenTable:
    table = SeenTable()
    for page in pages:
        table.add(np.frombuffer(page, np.uint64))
    return table


@dataclass
class AcceptAll(beam.PTransform):
    """Let every row pass, and count it as accepted: for input without re-sends."""

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return batches | "Accept" >> beam.ParDo(_AcceptFn()).with_output_types(hint_of(batches))


class _AcceptFn(beam.DoFn):
    def __init__(self) -> None:
        self.accepted = Counter("accepted")

    def process(self, rows: Rows) -> Iterator[Rows]:
        self.accepted.inc(len(rows))
        yield rows
