"""Made-up user activity: a stream with the oddities of real ones, and the truth about it.

The stream is a sequence of records with offsets and append times, as a Kafka topic with
LogAppendTime keeps them. It is made in chunks; each is a pure function of the seed and its
number, so chunks can be made anywhere and in any order:

- What users do is drawn as *visits*. 2,000 visitors are on the site at any time, each in
  a lane. In a round every lane does one thing, in random order; a round of 2,000 records
  lasts 33 s, so a visitor thinks from a blink to a minute or two.
- What arrives is drawn per record: most carry the next event of their lane, after some
  delay; the others are re-sends of an earlier record, or can't be read.

The same bytes come out on every machine and with every NumPy: what is drawn are raw bits
of PCG64, a sequence that NumPy guarantees, and all arithmetic is on integers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from beam_pipelines.demo.payloads import (
    FLAW_OF,
    FLAWS,
    ODD_FORMATS,
    PAGES,
    USERS,
    Array,
    Integers,
    common_payloads,
    flaws_of_chunk,
    tokens_of,
    uuids,
)
from beam_pipelines.model.activity import ACTIVITY, EVENT_TYPES
from beam_pipelines.model.batches import encoded, one_of
from beam_pipelines.model.records import (
    FUTURE,
    LATE,
    ON_TIME,
    PAYLOADS,
    TIMESTAMP,
    TOO_LATE,
    VERDICTS,
)
from beam_pipelines.model.time_rule import TimeRule

CHUNK_RECORDS = 50_000

TRUTH = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),
        one_of("verdict", (*VERDICTS, "invalid")),  # by the default time rule
        pa.field("flaw", pa.string()),  # what is wrong with an invalid one: see FLAWS
        pa.field("event", pa.int64()),  # offset of the event's first record; null: invalid
        pa.field("is_resend", pa.bool_(), nullable=False),
        pa.field("event_time", TIMESTAMP),
        pa.field("user_id", pa.string()),
        pa.field("page_url", pa.string()),
        ACTIVITY.field("event_type").with_nullable(True),
    ]
)


_START_US = 1_767_603_600_000_000  # 2026-01-05T09:00:00Z
_RECORDS_PER_S = 60
_SECOND_US = 1_000_000
_974_YEARS_US = 974 * 31_556_952 * _SECOND_US  # to the year 3000

_LANES = 2_000  # divides CHUNK_RECORDS: a chunk is a whole number of rounds
_ROUNDS = CHUNK_RECORDS // _LANES
_EPOCH_ROUNDS = 24  # visits are drawn in epochs; none is longer than this

# What a record is, its share in 1/10,000, and the random time in [low, high) µs by which
# its event was delayed (early ones: by which it is ahead).
_RESEND, _FLAWED, _LATE, _TOO_LATE, _EARLY, _OUT_OF_ORDER, _PROMPT = range(7)
_SHARES = np.cumsum([1500, 30, 30, 30, 30, 500, 7880])
_LOW_US = np.array([0, 0, 120_000_001, 240_000_001, 300_000_001, 2_000_000, 20_000])
_HIGH_US = np.array([1, 1, 240_000_001, 3_600_000_000, 3_600_000_000, 90_000_000, 2_000_000])
_NEAR_RECORDS = 600  # 97 % of the re-sends come within so many records: 10 s


class DemoChunk(NamedTuple):
    """A stretch of the stream, and what is true of each of its records."""

    payloads: pa.RecordBatch  # of PAYLOADS
    truth: pa.RecordBatch  # of TRUTH, in the same order


@dataclass(frozen=True)
class DemoTraffic:
    """About an hour of a website's activity, at 60 records/s from 2026-01-05T09:00:00Z.

    15 % of the records repeat an earlier one byte for byte, 5 % of the events are 2 to 90 s
    out of order, about 0.3 % each are late, too late, or from the future (by the default
    `TimeRule`; some lie exactly on its borders), and 0.3 % can't be read, by every kind of
    `FLAWS`. 10 % have no event_id, 4 % another layout or time format than the rest. More
    records with the same seed begin with the same records.

    Args:
      events: Number of records, re-sends and unreadable ones included.
      seed: Another seed, another stream.

    Raises:
      ValueError: one of them is negative.
    """

    events: int = 200_000
    seed: int = 1

    def __post_init__(self) -> None:
        if self.events < 0 or self.seed < 0:
            raise ValueError(f"events and seed must not be negative: {self.events}, {self.seed}")

    @property
    def chunks(self) -> int:
        """Number of chunks; all but the last hold `CHUNK_RECORDS` records."""
        return -(-self.events // CHUNK_RECORDS)

    @property
    def as_of_us(self) -> int:
        """The clock at the end of the stream (µs since 1970), after its last append."""
        return _START_US + -(-self.events * _SECOND_US // _RECORDS_PER_S)

    def chunk(self, i: int) -> DemoChunk:
        """Return chunk i, from 0 to `chunks` - 1."""
        return DemoChunk(self.payloads(i), self.truth(i))

    def payloads(self, i: int) -> pa.RecordBatch:
        """Return the records of chunk i."""
        length = self._length(i)
        own, pool, source = _arrivals(self.seed, i)
        return pa.RecordBatch.from_arrays(
            [
                pool.payloads.take(pa.array(pool.positions[source[:length]])),
                pa.array(own.offsets[:length]),
                pa.array(own.append_us[:length]).cast(TIMESTAMP),
            ],
            schema=PAYLOADS,
        )

    def truth(self, i: int) -> pa.RecordBatch:
        """Return what is true of the records of chunk i."""
        length = self._length(i)
        own, pool, source = _arrivals(self.seed, i)
        source, kinds = source[:length], own.kinds[:length]
        invalid = kinds == _FLAWED
        verdicts = _verdicts(pool.event_us[source], own.append_us[:length])

        def valid(column: Array) -> pa.Array:
            return pa.array(column[source], mask=invalid)

        return pa.RecordBatch.from_arrays(
            [
                pa.array(own.offsets[:length]),
                encoded(TRUTH.field("verdict"), np.where(invalid, len(VERDICTS), verdicts)),
                pa.array(FLAWS).take(pa.array(own.flaws[:length], mask=~invalid)),
                valid(pool.offsets),
                pa.array(kinds == _RESEND),
                valid(pool.event_us).cast(TIMESTAMP),
                USERS.take(valid(pool.users)),
                PAGES.take(valid(pool.pages)),
                encoded(TRUTH.field("event_type"), valid(pool.types)),
            ],
            schema=TRUTH,
        )

    def _length(self, i: int) -> int:
        if not 0 <= i < self.chunks:
            raise IndexError(f"no chunk {i}; {self.events} records make {self.chunks} chunks")
        return min(CHUNK_RECORDS, self.events - i * CHUNK_RECORDS)


def _verdicts(event_us: Integers, append_us: Integers) -> npt.NDArray[np.int8]:
    rule = TimeRule()
    behind = append_us - event_us - rule.out_of_orderness_s * _SECOND_US
    verdicts = np.where(behind <= 0, ON_TIME, LATE)
    verdicts[behind > rule.allowed_lateness_s * _SECOND_US] = TOO_LATE
    verdicts[event_us > append_us + rule.future_tolerance_s * _SECOND_US] = FUTURE
    return verdicts.astype(np.int8)


class _Draws:
    """Random integers, the same for the same keys."""

    def __init__(self, *keys: int) -> None:
        self._generator = np.random.PCG64(np.random.SeedSequence(keys))

    def bits(self, count: int) -> npt.NDArray[np.uint64]:
        return self._generator.random_raw(count)

    def below(self, limit: int | Integers, count: int) -> Integers:
        """Draw integers in [0, limit), limit < 2^32."""
        high_bits = self.bits(count) >> np.uint64(32)
        return (high_bits * np.asarray(limit, np.uint64) >> np.uint64(32)).astype(np.int64)

    def ranks(self, chances: Integers, count: int) -> Integers:
        """Draw indices of a list of cumulative weights."""
        return chances.searchsorted(self.below(chances[-1], count), side="right")


def _chances(ranks: int, flatness: int) -> Integers:
    """Return cumulative weights 1 / (rank + flatness) of ranks 0, 1, ..."""
    return np.cumsum(100_000_000 // (np.arange(ranks, dtype=np.int64) + flatness))


_PAGE_CHANCES = _chances(len(PAGES), flatness=1)
_USER_CHANCES = _chances(len(USERS), flatness=1_000)  # so that few are in two lanes at once
_VIEW, _CLICK, _FIRST, _LAST = range(len(EVENT_TYPES))


class _Visits(NamedTuple):
    """What happens per round (rows, of one epoch) and lane (columns)."""

    users: npt.NDArray[np.int16]
    pages: npt.NDArray[np.int16]
    types: npt.NDArray[np.int8]


@lru_cache(maxsize=4)
def _visits(seed: int, epoch: int) -> _Visits:
    shape, cells = (_EPOCH_ROUNDS, _LANES), _EPOCH_ROUNDS * _LANES
    draws = _Draws(seed, 0, epoch)
    rounds = np.arange(_EPOCH_ROUNDS)[:, None]

    starts = draws.below(8, cells).reshape(shape) == 0
    starts[0] = True
    users = np.zeros(shape, np.int16)
    users[starts] = draws.ranks(_USER_CHANCES, int(starts.sum()))
    users = np.take_along_axis(users, np.maximum.accumulate(rounds * starts), axis=0)

    ends = np.vstack([starts[1:], np.ones(_LANES, bool)])
    chance = draws.below(20, cells).reshape(shape)
    types = np.where(chance < 5, _CLICK, _VIEW).astype(np.int8)
    types[ends & (chance < 15)] = _LAST  # some visitors just leave
    types[starts & (chance > 0)] = _FIRST

    pages = draws.ranks(_PAGE_CHANCES, cells).reshape(shape).astype(np.int16)
    opens = starts | (types == _VIEW)  # other events happen on the page that is open
    pages = np.take_along_axis(pages, np.maximum.accumulate(rounds * opens), axis=0)
    return _Visits(users, pages, types)


def _happens(seed: int, first_round: int, lanes: Integers) -> _Visits:
    """Return what happens in each of the given lanes (one row of lanes per round)."""
    # The epoch of each lane starts in another round, so visits don't break off all at once.
    rounds = first_round + np.arange(len(lanes))[:, None] + lanes % _EPOCH_ROUNDS
    first, last = first_round // _EPOCH_ROUNDS, int(rounds.max()) // _EPOCH_ROUNDS
    epochs = [_visits(seed, epoch) for epoch in range(first, last + 1)]
    cells = ((rounds - first * _EPOCH_ROUNDS) * _LANES + lanes).ravel()
    return _Visits(*(np.concatenate(parts).ravel()[cells] for parts in zip(*epochs, strict=True)))


class _Records(NamedTuple):
    """Records of a chunk; of its re-sends, only `kinds`, `append_us` and `distance` count."""

    kinds: npt.NDArray[np.int8]
    flaws: Integers  # index into FLAWS
    offsets: Integers
    append_us: Integers
    event_us: Integers
    users: npt.NDArray[np.int16]
    pages: npt.NDArray[np.int16]
    types: npt.NDArray[np.int8]
    distance: Integers  # from a re-send back to where its source is looked for
    positions: Integers  # of the record's bytes in `payloads`
    payloads: pa.BinaryArray


@lru_cache(maxsize=3)
def _records(seed: int, i: int) -> _Records:
    n = CHUNK_RECORDS
    draws = _Draws(seed, 1, i)
    offsets = np.arange(i * n, (i + 1) * n)
    kinds = draws.ranks(_SHARES, n).astype(np.int8)
    if i == 0:
        kinds[0] = _PROMPT  # nothing is there yet to be sent again

    # Kafka's append times have milliseconds; each record has a slot of its own.
    slot_us = _SECOND_US // _RECORDS_PER_S
    append_us = _START_US + offsets * _SECOND_US // _RECORDS_PER_S + draws.below(slot_us, n)
    append_us -= append_us % 1_000

    delay_us = _LOW_US[kinds] + draws.below((_HIGH_US - _LOW_US)[kinds], n)
    eighth = draws.below(8, n)
    on_border = (eighth == 0) & ((kinds == _LATE) | (kinds == _TOO_LATE) | (kinds == _EARLY))
    delay_us[on_border] = _LOW_US[kinds[on_border]] - 1
    delay_us[kinds == _EARLY] *= -1
    event_us = append_us - delay_us
    event_us[(kinds == _EARLY) & (eighth == 7)] += _974_YEARS_US

    order = draws.bits(n).reshape(_ROUNDS, _LANES).argsort(axis=1, kind="stable")
    users, pages, types = _happens(seed, i * _ROUNDS, order)

    distance = 1 + draws.below(np.where(draws.below(100, n) < 3, n - 1, _NEAR_RECORDS), n)

    # Most have one layout; the others are written one by one.
    style = draws.below(100, n)
    flawed = np.flatnonzero(kinds == _FLAWED)
    odd = np.flatnonzero((style < 4) & (kinds != _FLAWED))
    formats = [ODD_FORMATS[row % len(ODD_FORMATS)] for row in range(len(odd))]
    event_us[odd] -= event_us[odd] % np.array([f.unit_us for f in formats], np.int64)
    flaws = np.zeros(n, np.int64)
    flaws[flawed] = flaws_of_chunk(i, len(flawed))
    ids = uuids(draws.bits(2 * n))
    others = np.concatenate([odd, flawed])
    local_us = event_us[others]
    local_us[: len(odd)] += np.array([f.offset_minutes * 60 * _SECOND_US for f in formats])
    tokens = tokens_of(ids[others], local_us, users[others], pages[others], types[others])
    odd_ones = zip(formats, tokens, event_us[odd], strict=False)
    written = [odd_format.write(t, int(us)) for odd_format, t, us in odd_ones]
    written += [FLAW_OF[f](t) for f, t in zip(flaws[flawed], tokens[len(odd) :], strict=True)]
    common = common_payloads(ids, style >= 90, event_us, users, pages, types)
    positions = np.arange(n)
    positions[others] = n + np.arange(len(others))
    payloads = pa.concat_arrays([common, pa.array(written, pa.binary())])
    columns = (kinds, flaws, offsets, append_us, event_us, users, pages, types, distance)
    return _Records(*columns, positions, payloads)


def _arrivals(seed: int, i: int) -> tuple[_Records, _Records, Integers]:
    """Return chunk i, it after the one before, and where in these its records come from.

    The source of a re-send is the nearest event at or before the place drawn for it: at most
    a chunk away, and never itself a re-send.
    """
    own = pool = _records(seed, i)
    if i:
        before = _records(seed, i - 1)
        columns: Any = zip(before[:-1], own[:-1], strict=True)
        payloads = pa.concat_arrays([before.payloads, own.payloads])
        pool = _Records._make([*map(np.concatenate, columns), payloads])
        pool.positions[CHUNK_RECORDS:] += len(before.payloads)
    places = np.arange(len(pool.kinds))
    is_event = (pool.kinds != _RESEND) & (pool.kinds != _FLAWED)
    newest_event = np.maximum.accumulate(np.where(is_event, places, is_event.argmax()))
    source = places[-CHUNK_RECORDS:].copy()
    resent = own.kinds == _RESEND
    source[resent] = newest_event[np.maximum(source - own.distance, 0)[resent]]
    return own, pool, source
