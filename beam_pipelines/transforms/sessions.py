"""Sessions: runs of activity of one key, split by inactivity and by markers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.typehints import typehints
from apache_beam.utils.timestamp import Timestamp

from beam_pipelines.kernels.columns import micros
from beam_pipelines.kernels.secure_hashing import RepeatedHashes
from beam_pipelines.kernels.sessions import SESSION_ROWS, SessionRule, first_names, scan
from beam_pipelines.kernels.texts import short_field, short_texts
from beam_pipelines.model.batches import BatchOf, lateness_of, values_of
from beam_pipelines.model.hash_key import HashKey, key_of
from beam_pipelines.model.records import EVENT_TIME, TIMESTAMP, timed_schema_of
from beam_pipelines.telemetry import Counter
from beam_pipelines.transforms.fold import MINUTE_US, Folded, FoldFn
from beam_pipelines.transforms.gather import SHARDS, GatheringFn, by_shard, require_global_window

_SECOND_US = 1_000_000
_NO_MARKER = -2  # no value's code, nor the one of an open session
_PURPOSE = b"session"


@dataclass
class Sessionize(beam.PTransform):
    """Divide the rows of each key into sessions.

    A session ends when `gap_s` pass without a row, at an end marker, or where a start
    marker begins the next one; `kernels.sessions.SessionRule` has the whole rule. Each
    session is emitted once, when the watermark is past all that could change it: exact
    for any order of arrival within the lateness that the batches' hint carries.

    Input: batches with `event_time`, strings `by` that are never null and, if named,
    `marker`, in which null marks nothing; in the global window.
    Output: batches (`by`, session_start, session_end, duration_s, a count per entry of
    `counts`, ended_by). `ended_by` is the value of `end`, or `timeout`. (by,
    session_start) is unique. A key over MAX_KEY_BYTES is named shortened (`kernels.texts`).

    Keys are compared by BLAKE2b of their text, cut to 64 bits: whoever chooses one needs 2⁶⁴
    attempts to share another's sessions, or, among a million known ones, 2⁴⁴ to share any of
    theirs; with a `hash_key`, nobody can try.

    Args:
      by: Column with the key.
      gap_s: Seconds of inactivity that end a session.
      marker: Column, declared with `one_of`, that tells rows apart; None: all are alike.
      start: Its value that opens a session, or None.
      end: Its value that closes one, or None.
      counts: Output column → value of `marker` counted in it.
      shards: Parts that the keys are divided into.
      hash_key: Of the hash that keys are compared by.

    Raises:
      ValueError: a column or value is missing, `by` may be null, the gap isn't positive, or
        the batches were windowed, or are unbounded and nobody has judged their lateness.
    """

    by: str
    gap_s: int = 1800
    marker: str | None = None
    start: str | None = None
    end: str | None = None
    counts: Mapping[str, str] = field(default_factory=dict)
    shards: int = SHARDS
    hash_key: HashKey | None = None

    def __post_init__(self) -> None:
        if self.gap_s <= 0:
            raise ValueError(f"gap_s must be positive, got {self.gap_s}")
        if self.marker is None and (self.start or self.end or self.counts):
            raise ValueError("start, end and counts are values of a marker column: name it")

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        columns = (EVENT_TIME, self.by, *((self.marker,) if self.marker else ()))
        schema = timed_schema_of(batches, *columns)
        if schema.field(self.by).nullable:
            raise ValueError(
                f"{self.by} may be null, and rows of nobody make no session; declare the column "
                "with nullable=False"
            )
        require_global_window(batches, "Sessionize")
        key = schema.field(self.by)
        step = SessionStep(
            short_field(pa.field(self.by, pa.string(), nullable=False), key), self._rule(schema)
        )
        return (
            batches
            | "By key"
            >> beam.ParDo(_ByKeyFn(columns, self.shards, key, self.hash_key)).with_output_types(
                typehints.Tuple[int, BatchOf(SESSION_ROWS)]
            )
            | "Fold sessions"
            >> beam.ParDo(
                FoldFn(step, lateness_of(batches, "Sessionize"), batches.is_bounded)
            ).with_output_types(BatchOf(step.output_schema))
        )

    def _rule(self, schema: pa.Schema) -> SessionRule:
        if self.marker is None:
            return SessionRule(self.gap_s * _SECOND_US)
        codes = {value: code for code, value in enumerate(values_of(schema.field(self.marker)))}
        for value in filter(None, (self.start, self.end, *self.counts.values())):
            if value not in codes:
                raise ValueError(f"{self.marker} is one of {', '.join(codes)}, never {value!r}")
        return SessionRule(
            self.gap_s * _SECOND_US,
            start=None if self.start is None else codes[self.start],
            end=None if self.end is None else codes[self.end],
            end_name=self.end or "",
            counted=tuple((column, codes[value]) for column, value in self.counts.items()),
        )


class _ByKeyFn(GatheringFn):
    """Keys rows by a shard of their key's hash; few of them carry the key's name."""

    def __init__(
        self, columns: tuple[str, ...], shards: int, key: pa.Field, hash_key: HashKey | None
    ) -> None:
        super().__init__(columns)
        self.shards = shards
        self.key = key
        self.hash_key = hash_key

    def setup(self) -> None:
        self._hashes = RepeatedHashes(key_of(self.hash_key), _PURPOSE)

    def work(self, rows: pa.RecordBatch, earliest: Timestamp) -> Iterator:
        names = rows.column(1)
        keys = self._hashes(names)  # of whole names
        kinds: Any = np.zeros(len(rows), np.int8)
        if rows.num_columns > 2:
            kinds = rows.column(2).indices.fill_null(_NO_MARKER)
        minutes = micros(rows[EVENT_TIME]) // MINUTE_US
        names = first_names(keys, minutes, names)  # what goes into state
        reduced = pa.RecordBatch.from_arrays(
            [
                pa.array(keys),
                rows[EVENT_TIME],
                pa.array(kinds, pa.int8()),
                short_texts(names, self.key),
            ],
            schema=SESSION_ROWS,
        )
        for keyed in by_shard(reduced, keys, self.shards):
            yield keyed, earliest


class SessionStep:
    """Scans a shard's rows for sessions."""

    row_schema = SESSION_ROWS

    def __init__(self, by: pa.Field, rule: SessionRule) -> None:
        self.rule = rule
        self.state_schema = rule.open_schema
        self.quiet_us = rule.gap_us
        self.output_schema = pa.schema(
            [
                by,
                pa.field("session_start", TIMESTAMP, nullable=False),
                pa.field("session_end", TIMESTAMP, nullable=False),
                pa.field("duration_s", pa.float64(), nullable=False),
                *(pa.field(column, pa.int64(), nullable=False) for column, _ in rule.counted),
                pa.field("ended_by", pa.string(), nullable=False),
            ]
        )
        self.ignored_ends = Counter("ignored_session_ends")
        self.nameless = Counter("nameless_sessions")

    def __call__(self, state: pa.Table, rows: pa.RecordBatch, until_us: int) -> Folded:
        """Continue the open sessions, and emit the closed ones."""
        scanned = scan(state, rows, until_us, self.rule)
        if scanned.ignored_ends:
            self.ignored_ends.inc(scanned.ignored_ends)
        if scanned.nameless:
            self.nameless.inc(scanned.nameless)
        if len(scanned.closed) == 0:
            return Folded(scanned.still_open, None)
        columns: list[Any] = [column.combine_chunks() for column in scanned.closed.columns]
        return Folded(
            scanned.still_open,
            pa.RecordBatch.from_arrays(columns, schema=self.output_schema),
        )
