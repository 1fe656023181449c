"""64-bit hashes that nobody can aim: BLAKE2b (RFC 7693), cut to 64 bits.

MurmurHash (`kernels.hashing`) can be inverted: whoever chooses a text chooses its hash. So
where strangers choose texts and equal hashes make two things one, texts are hashed here. A
text that shares the hash of a given one costs 2⁶⁴ attempts; one that shares the hash of any
of a million, 2⁴⁴. With a key, whoever doesn't know it can't even try.
"""

import hashlib
from itertools import pairwise, repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.kernels.hashing import hash_strings

_HASH_BYTES = 8
_REMEMBERED = 1 << 16  # texts, of which each takes some 200 bytes at most
_REMEMBERED_BYTES = 64  # longer ones are hashed anew


def secure_hashes(
    texts: pa.Array, key: bytes = b"", purpose: bytes = b"", beside: np.ndarray | None = None
) -> np.ndarray:
    """Hash each text by itself; 0.3 to 0.5 µs a row.

    Args:
      texts: string or binary array (32-bit offsets); nulls hash like the empty string.
      key: Up to 64 bytes; none: anybody can compute the hashes.
      purpose: Up to 16 bytes; a text has another hash for each purpose.
      beside: 8 bytes per row (int64 or uint64) that are hashed after its text.

    Returns:
      uint64, one per row.
    """
    _, offsets_buffer, data_buffer = texts.buffers()
    if len(texts) == 0:
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = memoryview(data_buffer or b"")
    after = memoryview(b"" if beside is None else beside.astype("<i8", copy=False).tobytes())
    # A copy of an empty hash costs half as much as making one.
    new = hashlib.blake2b(digest_size=_HASH_BYTES, key=key, person=purpose).copy
    digests = []
    for row, (start, end) in enumerate(pairwise(offsets.tolist())):
        digest = new()
        digest.update(data[start:end])
        if beside is not None:
            digest.update(after[8 * row : 8 * row + 8])
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


class RepeatedHashes:
    """`secure_hashes` of texts that occur often: each is hashed once, and remembered.

    The result is the same, whatever is remembered. Python's dictionary hashes with a secret
    of its own, so texts that were made to collide cost no more than others.

    Args:
      key: As for `secure_hashes`.
      purpose: Likewise.
    """

    def __init__(self, key: bytes = b"", purpose: bytes = b"") -> None:
        self._key, self._purpose = key, purpose
        self._known: dict[bytes, bytes] = {}

    def __call__(self, texts: pa.Array) -> np.ndarray:
        """Hash each text; returns uint64, one per row."""
        first = _first_rows(texts)
        hashed = np.flatnonzero(first == np.arange(len(texts)))
        hashes = np.empty(len(texts), np.uint64)
        hashes[hashed] = self._of_few(texts.take(pa.array(hashed)))
        return hashes[first]

    def _of_few(self, texts: pa.Array) -> np.ndarray:
        spelled = _spelled(texts)
        found = list(map(self._known.get, spelled, repeat(b"")))
        new = [row for row, digest in enumerate(found) if not digest]
        if new:
            hashes = secure_hashes(texts.take(pa.array(new)), self._key, self._purpose)
            digests = hashes.astype("<u8").tobytes()
            if len(self._known) + len(new) > _REMEMBERED:
                self._known.clear()
            for number, row in enumerate(new):
                found[row] = digest = digests[_HASH_BYTES * number : _HASH_BYTES * (number + 1)]
                if len(spelled[row]) <= _REMEMBERED_BYTES and len(self._known) < _REMEMBERED:
                    self._known[spelled[row]] = digest
        return np.frombuffer(b"".join(found), "<u8").astype(np.uint64)


def _spelled(texts: pa.Array) -> list[bytes]:
    """Return the bytes of each text; of a null, none."""
    _, offsets_buffer, data_buffer = texts.buffers()
    if len(texts) == 0:
        return []
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    start = int(offsets[0])
    data = b"" if data_buffer is None else data_buffer[start : int(offsets[-1])].to_pybytes()
    return [data[begin:end] for begin, end in pairwise((offsets - start).tolist())]


def _first_rows(texts: pa.Array) -> np.ndarray:
    """Give each row an earlier row of the same text, or itself.

    A row finds the first one of its slot or none, so texts that are made to share a slot
    are hashed row by row and cost no more than that. (Arrow's `dictionary_encode` would
    compare each of them with all others.)
    """
    rows = np.arange(len(texts))
    bits = 2 + len(texts).bit_length()
    slots = (hash_strings(texts) >> np.uint64(64 - bits)).astype(np.int64)
    owner = np.empty(1 << bits, np.int64)
    owner[slots[::-1]] = rows[::-1]
    first = owner[slots]
    others = np.flatnonzero(first != rows)
    same = pc.equal(texts.take(pa.array(others)), texts.take(pa.array(first[others])))
    differ = others[~pc.fill_null(same, False).to_numpy(zero_copy_only=False)]
    first[differ] = differ
    return first
