"""Approximate distinct counts, the slow way: one hash, one register and one sum at a time.

Written from what `beam_pipelines.kernels.hashing` and `hyperloglog` promise, and from the
sources they name; it shares no code with them.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

REGISTERS = 4096
HASH_BITS_FOR_RANK = 52  # q: the other 12 bits choose the register
STANDARD_ERROR = 1.04 / math.sqrt(REGISTERS)

_M = 0xC6A4A7935BD1E995
_64_BITS = (1 << 64) - 1


@lru_cache(maxsize=1 << 20)
def murmur_hash_64a(data: bytes) -> int:
    """Hash bytes as MurmurHash64A (Austin Appleby, MurmurHash2.cpp) does with seed 0."""
    h = len(data) * _M & _64_BITS
    whole = len(data) // 8 * 8
    for (k,) in struct.iter_unpack("<Q", data[:whole]):
        k = k * _M & _64_BITS
        k ^= k >> 47
        k = k * _M & _64_BITS
        h ^= k
        h = h * _M & _64_BITS
    if data[whole:]:
        h ^= int.from_bytes(data[whole:], "little")
        h = h * _M & _64_BITS
    h ^= h >> 47
    h = h * _M & _64_BITS
    h ^= h >> 47
    return h


def estimate(values: Iterable[str]) -> float:
    """Estimate how many distinct texts there are: a whole number, or without bound."""
    registers: dict[int, int] = {}
    for value in values:
        h = murmur_hash_64a(value.encode())
        register = h >> HASH_BITS_FOR_RANK
        rest = h & ((1 << HASH_BITS_FOR_RANK) - 1)
        rank = HASH_BITS_FOR_RANK - rest.bit_length() + 1  # leading zeros + 1
        registers[register] = max(rank, registers.get(register, 0))
    estimated = improved_estimate(registers)
    return round(estimated) if math.isfinite(estimated) else estimated


def improved_estimate(registers: dict[int, int]) -> float:
    """Return Ertl's improved estimate of the registers that are not zero.

    arXiv:1702.01284, algorithm 6, with its series (formulas 15 and 20) summed as printed.
    """
    if not registers:
        return 0.0
    m, q = REGISTERS, HASH_BITS_FOR_RANK
    with_rank = Counter(registers.values())
    z = m * _sigma((m - len(registers)) / m)
    z += sum(with_rank[k] * 2.0**-k for k in range(1, q + 1))
    z += m * _tau(1 - with_rank[q + 1] / m) * 2.0**-q
    return m * m / (2 * math.log(2) * z) if z else math.inf


def _sigma(x: float) -> float:
    return x + sum(x ** (2.0**k) * 2.0 ** (k - 1) for k in range(1, 64))


def _tau(x: float) -> float:
    return (1 - x - sum((1 - x ** (2.0**-k)) ** 2 * 2.0**-k for k in range(1, 64))) / 3
