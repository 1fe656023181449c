"""64-bit hashes of columns, the same on every machine and in every release.

Identities, shards and sketches are kept in state and in files, so the hash is fixed for
good: MurmurHash64A by Austin Appleby (public domain, MurmurHash2.cpp), seed 0.
"""

import numpy as np
import pyarrow as pa

_M = np.uint64(0xC6A4A7935BD1E995)
_R = np.uint64(47)
_MASK_64 = (1 << 64) - 1
_TAIL_MASKS = np.array([(1 << 8 * length) - 1 for length in range(8)], np.uint64)
_FEW_ROWS = 16  # below this, a Python loop over words beats NumPy calls per word


def hash_strings(column: pa.Array) -> np.ndarray:
    """Hash each string or binary value with MurmurHash64A.

    Args:
      column: string or binary array (32-bit offsets); nulls hash like the empty string.

    Returns:
      uint64, one per row.
    """
    rows = len(column)
    _, offsets_buffer, data_buffer = column.buffers()
    if rows == 0 or data_buffer is None or data_buffer.size == 0:
        return _finished(np.zeros(rows, np.uint64))
    offsets = np.frombuffer(offsets_buffer, np.int32)[column.offset : column.offset + rows + 1]
    data = np.frombuffer(data_buffer, np.uint8)
    if len(data) < 8:
        data = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))

    starts = offsets[:-1].astype(np.int64)
    lengths = offsets[1:] - starts
    hashes = lengths.astype(np.uint64) * _M
    remaining = np.arange(rows)  # rows that still have a whole word to mix in
    for word in range(int(lengths.max()) // 8):
        if len(remaining) == rows:
            inside = lengths >= 8 * (word + 1)
            if not inside.all():
                remaining = np.flatnonzero(inside)
        else:
            remaining = remaining[lengths[remaining] >= 8 * (word + 1)]
        if len(remaining) < min(_FEW_ROWS, rows):
            for row in remaining:
                hashes[row] = _mixed_scalar(
                    int(hashes[row]), data[starts[row] + 8 * word : starts[row] + lengths[row]]
                )
            break
        if len(remaining) == rows:
            hashes = _mixed(hashes, words[starts + 8 * word])
        else:
            hashes[remaining] = _mixed(hashes[remaining], words[starts[remaining] + 8 * word])
    return _finished(_with_tail(hashes, words, starts + lengths, lengths & 7))


def hash_with(hashes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Extend hashes by one 8-byte value each (int64 or uint64), giving new hashes."""
    return _finished(_mixed(hashes, values.view(np.uint64)))


def _mixed(hashes: np.ndarray, word: np.ndarray) -> np.ndarray:
    word = word * _M
    word ^= word >> _R
    word *= _M
    word ^= hashes
    word *= _M
    return word


def _mixed_scalar(value: int, data: np.ndarray) -> int:
    """Mix in all whole words of one row."""
    m = int(_M)
    for word in data[: len(data) & ~7].view("<u8").tolist():
        word = word * m & _MASK_64
        word ^= word >> 47
        value = (value ^ (word * m & _MASK_64)) * m & _MASK_64
    return value


def _with_tail(
    hashes: np.ndarray, words: np.ndarray, ends: np.ndarray, tails: np.ndarray
) -> np.ndarray:
    """Mix in the last 1 to 7 bytes of each row that has them."""
    if not tails.any():
        return hashes
    starts = ends - tails
    loads = np.minimum(starts, len(words) - 1)  # the last word may not start where the tail does
    tail = words[loads] >> ((starts - loads) * 8).astype(np.uint64)
    tail &= _TAIL_MASKS[tails]
    tail ^= hashes
    tail *= _M
    return tail if tails.all() else np.where(tails > 0, tail, hashes)


def _finished(hashes: np.ndarray) -> np.ndarray:
    hashes = hashes ^ (hashes >> _R)
    hashes *= _M
    hashes ^= hashes >> _R
    return hashes
