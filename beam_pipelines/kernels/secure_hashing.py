"""64-bit hashes that nobody can aim: BLAKE2b (RFC 7693), cut to 64 bits.

MurmurHash (`kernels.hashing`) can be inverted: whoever chooses a text chooses its hash. So
where strangers choose texts and equal hashes make two things one, texts are hashed here. A
text that shares the hash of a given one costs 2⁶⁴ attempts; one that shares the hash of any
of a million, 2⁴⁴. With a key, whoever doesn't know it can't even try.
"""

import hashlib
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_pipelines.kernels.hashing import hash_strings

_HASH_BYTES = 8


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


def secure_hashes_of_repeated(
    texts: pa.Array, key: bytes = b"", purpose: bytes = b""
) -> np.ndarray:
    """Return `secure_hashes`, computed once for most texts that occur often."""
    first = _first_rows(texts)
    hashed = np.flatnonzero(first == np.arange(len(texts)))
    hashes = np.empty(len(texts), np.uint64)
    hashes[hashed] = secure_hashes(texts.take(pa.array(hashed)), key, purpose)
    return hashes[first]


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
