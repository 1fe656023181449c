"""Texts of any MurmurHash64A (seed 0), the hash of `kernels.hashing`: it can be inverted.

For tests that send what a stranger might, who chooses ids so that their hashes collide.
"""

import numpy as np
import pyarrow as pa

from beam_pipelines.kernels.hashing import hash_strings

_M, _R = np.uint64(0xC6A4A7935BD1E995), np.uint64(47)
_INVERSE = np.uint64(pow(int(_M), -1, 1 << 64))
_START = np.uint64(16 * int(_M) & (1 << 64) - 1)  # the state before a text of two words


def texts_of(hashes, seed=1):
    """Return a text of 16 printable ASCII characters for each hash."""
    hashes = np.asarray(hashes, np.uint64)
    random = np.random.default_rng(seed)
    goal = _unshifted(_unshifted(hashes) * _INVERSE) * _INVERSE
    texts, missing = [""] * len(hashes), np.arange(len(hashes))
    while len(missing):
        first = random.integers(0x30, 0x5B, (len(missing), 8), dtype=np.uint8)
        last = _unmixed(goal[missing] ^ ((_START ^ _mixed(first.view("<u8")[:, 0])) * _M))
        written = last.view(np.uint8).reshape(-1, 8)
        printable = np.all((written >= 0x23) & (written < 0x7F) & (written != 0x5C), axis=1)
        for row in np.flatnonzero(printable):
            texts[missing[row]] = (first[row].tobytes() + last[row].tobytes()).decode()
        missing = missing[~printable]
    assert (hash_strings(pa.array(texts, pa.string())) == hashes).all()
    return texts


def hash_of(text):
    """Return a text's hash, as an int."""
    return int(hash_strings(pa.array([text]))[0])


def twin_of(text):
    """Return another text with the same hash."""
    return texts_of([hash_of(text)])[0]


def _mixed(word):
    word = word * _M
    word ^= word >> _R
    return word * _M


def _unmixed(word):
    return _unshifted(word * _INVERSE) * _INVERSE


def _unshifted(value):
    return value ^ (value >> _R)  # its own inverse, as 47 is more than half of 64
