"""Flink's key groups: which subtask of a keyed stage a key lands on.

Flink hashes an encoded key into one of `max_parallelism` key groups, and gives each
subtask a contiguous run of them. A handful of keys (readers, shards) falls unevenly: of 16
integers, 4 subtasks get 5, 4, 4 and 3. So such keys are given labels that are chosen, by
the same hash, to fall evenly.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import count

MAX_PARALLELISM = 128
"""Key groups of a job; the labels chosen here are even for no other number."""

_32_BITS, _64_BITS = (1 << 32) - 1, (1 << 64) - 1
_C1, _C2 = 0x87C37B91114253D5, 0x4CF5AD432745937F


def key_group(encoded_key: bytes, max_parallelism: int = MAX_PARALLELISM) -> int:
    """Return the key group of a key, as Beam encodes it for Flink (in nested context).

    `org.apache.beam.runners.flink.adapter.FlinkKey.hashCode` (Guava's murmur3_128 as an int),
    scrambled by `org.apache.flink.util.MathUtils.murmurHash`, modulo the number of groups
    (`KeyGroupRangeAssignment.assignToKeyGroup`).
    """
    code = _murmur3_128_int(encoded_key)
    code = code * 0xCC9E2D51 & _32_BITS
    code = _rotated(code, 15) * 0x1B873593 & _32_BITS
    code = (_rotated(code, 13) * 5 + 0xE6546B64) & _32_BITS
    code ^= 4
    code = (code ^ code >> 16) * 0x85EBCA6B & _32_BITS
    code = (code ^ code >> 13) * 0xC2B2AE35 & _32_BITS
    code ^= code >> 16
    if code >> 31:  # negative in Java, where abs of the least int is taken as 0
        code = (1 << 32) - code & 0x7FFFFFFF
    return code % max_parallelism


def even_labels(encode: Callable[[int], bytes], parts: int) -> tuple[int, ...]:
    """Return a label for each part, so that label i falls into the i-th run of key groups.

    With as many subtasks as parts, each gets one; with a divisor of that, each gets as many
    as the others.

    Args:
      encode: Encodes the key that is made with a label.
      parts: Number of labels, at most MAX_PARALLELISM.
    """
    labels: dict[int, int] = {}
    for label in count():
        part = key_group(encode(label)) * parts // MAX_PARALLELISM
        labels.setdefault(part, label)
        if len(labels) == parts:
            return tuple(labels[part] for part in range(parts))
    raise AssertionError("count() has no end")


@lru_cache(maxsize=4096)
def shard_labels(shards: int, *beside: int) -> tuple[int, ...]:
    """Return the labels of shards that are keys themselves, or the first part of a tuple.

    Args:
      shards: Their number.
      beside: The ints that follow in the key.
    """
    suffix = b"".join(varint(value) for value in beside)
    return even_labels(lambda label: varint(label) + suffix, shards)


def varint(value: int) -> bytes:
    """Encode an int as Beam's VarIntCoder does: 64-bit two's complement, base 128."""
    bits, encoded = value & (1 << 64) - 1, bytearray()
    while bits > 127:
        encoded.append(bits & 127 | 128)
        bits >>= 7
    encoded.append(bits)
    return bytes(encoded)


def _murmur3_128_int(data: bytes) -> int:
    """Return the lowest 32 bits of MurmurHash3_x64_128 with seed 0 (A. Appleby, 2011)."""
    h1 = h2 = 0
    for start in range(0, len(data), 16):
        block = data[start : start + 16]  # the last one, if shorter, is padded with zeros
        k1, k2 = (int.from_bytes(half, "little") for half in (block[:8], block[8:]))
        whole = len(block) == 16
        h1 ^= _rotated(k1 * _C1 & _64_BITS, 31, 64) * _C2 & _64_BITS
        if whole:
            h1 = ((_rotated(h1, 27, 64) + h2) * 5 + 0x52DCE729) & _64_BITS
        h2 ^= _rotated(k2 * _C2 & _64_BITS, 33, 64) * _C1 & _64_BITS
        if whole:
            h2 = ((_rotated(h2, 31, 64) + h1) * 5 + 0x38495AB5) & _64_BITS
    h1, h2 = h1 ^ len(data), h2 ^ len(data)
    h1 = h1 + h2 & _64_BITS
    h2 = h1 + h2 & _64_BITS
    return _mixed(h1) + _mixed(h2) & _32_BITS


def _mixed(code: int) -> int:
    code = (code ^ code >> 33) * 0xFF51AFD7ED558CCD & _64_BITS
    code = (code ^ code >> 33) * 0xC4CEB9FE1A85EC53 & _64_BITS
    return code ^ code >> 33


def _rotated(code: int, bits: int, width: int = 32) -> int:
    return (code << bits | code >> (width - bits)) & ((1 << width) - 1)
