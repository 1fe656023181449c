"""A table of the ids seen so far."""

import secrets

import numpy as np

_SMALLEST_BITS = 10
_ZERO = np.uint64(0x9E3779B97F4A7C15)  # stands in for 0, which marks an empty slot
_HALF = np.uint64(32)
_SECRET = [np.uint64(secrets.randbits(64) | 1) for _ in range(3)]


class SeenTable:
    """A set of 64-bit hashes with open addressing, probed a column at a time.

    An id's home is the slot that the high bits of `_mixed` name; if that is taken, the next
    free one after it. 12 bytes a slot, at most half of the slots used. Ids may be chosen by
    a stranger: which of them share a home differs from process to process.
    """

    def __init__(self) -> None:
        self._used = 0
        self._resize(_SMALLEST_BITS)

    def _resize(self, bits: int) -> None:
        self._shift = np.uint64(64 - bits)
        self._last = (1 << bits) - 1
        self._slots = np.zeros(1 << bits, np.uint64)
        self._rows = np.empty(1 << bits, np.int32)  # scratch: which row of a batch took the slot

    def __len__(self) -> int:
        return self._used

    @property
    def nbytes(self) -> int:
        """Memory the table takes."""
        return self._slots.nbytes + self._rows.nbytes

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Add ids.

        Args:
          ids: uint64 hashes.

        Returns:
          bool per id: whether it is the first sight of it, in this table and in `ids`.
        """
        needed = 2 * (self._used + len(ids))
        if needed > len(self._slots):
            seen = self._slots[self._slots != 0]
            self._resize((needed - 1).bit_length())
            self._fill(seen)
        mixed = _mixed(ids)
        return self._insert(np.where(mixed == 0, _ZERO, mixed))

    def _fill(self, ids: np.ndarray) -> None:
        """Put distinct ids into the empty table: in the order of their homes, side by side."""
        ids = np.sort(ids)
        count = np.arange(len(ids))
        places = np.maximum.accumulate((ids >> self._shift).astype(np.int64) - count) + count
        inside = int(np.searchsorted(places, self._last, side="right"))
        self._slots[places[:inside]] = ids[:inside]
        self._used = inside
        self._insert(ids[inside:])  # the few that go round the end

    def _insert(self, ids: np.ndarray) -> np.ndarray:
        slots = self._slots
        first = np.zeros(len(ids), bool)
        pending = np.arange(len(ids), dtype=np.int32)
        values, places = ids, (ids >> self._shift).astype(np.int64)
        while len(pending):
            there = slots[places]
            empty = np.flatnonzero(there == 0)
            if len(empty):
                # Rows that share an empty slot: the last write stands, so write backwards
                # for the earliest row. Equal ids take the same path and meet here.
                backwards = empty[::-1]
                free, candidates = places[backwards], pending[backwards]
                slots[free] = values[backwards]
                self._rows[free] = candidates
                winners = candidates[self._rows[free] == candidates]
                first[winners] = True
                self._used += len(winners)
                there[empty] = slots[places[empty]]
            other = np.flatnonzero(there != values)
            pending, values = pending[other], values[other]
            places = (places[other] + 1) & self._last
        return first


def _mixed(ids: np.ndarray) -> np.ndarray:
    """Mix ids one to one, by numbers that nobody outside of this process knows."""
    mixed = ids * _SECRET[0]
    for odd in _SECRET[1:]:  # with one round fewer, multiples of 2⁵¹ could still share homes
        mixed ^= mixed >> _HALF
        mixed *= odd
    return mixed
