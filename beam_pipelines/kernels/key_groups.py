"""Flink's key groups: which subtask of a keyed stage a key lands on.

Flink hashes an encoded key into one of `max_parallelism` key groups, and gives each
subtask a contiguous run of them. A handful of keys (readers, shards) falls unevenly: of 16
integers, 4 subtasks got 6, 4, 3 and 3. So such keys are given labels that are chosen, by
the same hash, to fall evenly.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import count

MAX_PARALLELISM = 128
"""Key groups of a job; the labels chosen here are even for no other number."""

_32_BITS = 0xFFFFFFFF


def key_group(encoded_key: bytes, max_parallelism: int = MAX_PARALLELISM) -> int:
    """Return the key group of a key, as Beam encodes it for Flink (in nested context).

    `java.nio.ByteBuffer.hashCode`, scrambled by `org.apache.flink.util.MathUtils.murmurHash`,
    modulo the number of groups (`KeyGroupRangeAssignment.assignToKeyGroup`).
    """
    code = 1
    for byte in reversed(encoded_key):
        code = (31 * code + (byte - 256 if byte > 127 else byte)) & _32_BITS
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


def _rotated(code: int, bits: int) -> int:
    return (code << bits | code >> (32 - bits)) & _32_BITS
