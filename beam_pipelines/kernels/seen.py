"""A table of the ids seen so far."""

import numpy as np

_SMALLEST = 1 << 10
_ZERO = np.uint64(0x9E3779B97F4A7C15)  # stands in for id 0, which marks an empty slot


class SeenTable:
    """A set of 64-bit hashes with open addressing, probed a column at a time.

    12 bytes a slot, at most half of the slots used.
    """

    def __init__(self) -> None:
        self._resize(_SMALLEST)

    def _resize(self, slots: int) -> None:
        self._slots = np.zeros(slots, np.uint64)
        self._rows = np.empty(slots, np.int32)  # scratch: which row of a batch took the slot
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def nbytes(self) -> int:
        """Memory the table takes."""
        return self._slots.nbytes + self._rows.nbytes

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Add ids.

        Args:
          ids: uint64 hashes; well mixed, as their low bits choose the slot.

        Returns:
          bool per id: whether it is the first sight of it, in this table and in `ids`.
        """
        needed = 2 * (self._used + len(ids))
        if needed > len(self._slots):
            seen = self._slots[self._slots != 0]
            self._resize(1 << (needed - 1).bit_length())
            self._insert(seen)
        return self._insert(np.where(ids == 0, _ZERO, ids))

    def _insert(self, ids: np.ndarray) -> np.ndarray:
        slots, mask = self._slots, np.uint64(len(self._slots) - 1)
        first = np.zeros(len(ids), bool)
        pending = np.arange(len(ids), dtype=np.int32)
        values, places = ids, (ids & mask).astype(np.int64)
        while len(pending):
            there = slots[places]
            empty = there == 0
            if empty.any():
                # Rows that share an empty slot: the last write stands, so write backwards
                # for the earliest row. Equal ids take the same path and meet here.
                free, candidates = places[empty][::-1], pending[empty][::-1]
                slots[free] = values[empty][::-1]
                taken = slots[free] == ids[candidates]
                free, candidates = free[taken], candidates[taken]
                self._rows[free] = candidates
                winners = candidates[self._rows[free] == candidates]
                first[winners] = True
                self._used += len(winners)
                there = slots[places]
            other = there != values
            if not other.any():
                break
            pending, values = pending[other], values[other]
            places = (places[other] + 1) & np.int64(mask)
        return first
