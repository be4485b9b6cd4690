"""Random float16 numbers that are the same on every machine: whole-number arithmetic, and nothing of a C library's mathematics.

Number i of a stream is a pure function of (stream, i): a counter is hashed, each hash gives four 16-bit indices into a table of 65,536 numbers.
The table is a bell: the values of a sum of eight bytes at equally spaced points of its distribution, counted exactly.
Source of the hash: SplitMix64, Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195.
"""

from __future__ import annotations

import hashlib
from functools import cache
from math import isqrt
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]
Halves = np.ndarray[Any, np.dtype[np.float16]]

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LANES = 4
"""16-bit indices in one 64-bit hash."""
BLOCK = 1 << 14
"""Hashes made at once: they stay in the cache."""
TERMS, ENTRIES = 8, 1 << 16
VARIANCE = TERMS * (256**2 - 1) // 12
"""Of a sum of eight bytes, a whole number: 43,690."""


def stream(seed: int, name: str) -> int:
    """The 64-bit key of a tensor's numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


@cache
def normal_table(std: float, mean: float) -> Halves:
    """65,536 float16 values of this mean and standard deviation, almost normally distributed, none beyond ± 4 standard deviations.

    One product and one sum in float32, rounded once to float16: exact IEEE operations.
    """
    return (np.float32(mean) + _bell().astype(np.float32) * np.float32(std * 256 / isqrt(VARIANCE << 16))).astype(np.float16)


def fill(output: Halves, key: int, start: int, table: Halves) -> None:
    """Write numbers [start, start + len(output)) of the stream ``key`` into a vector, whatever pieces it is asked for in."""
    done, place = 0, start
    while done < len(output):
        word, lane = divmod(place, LANES)
        count = min(BLOCK * LANES - lane, len(output) - done)
        words = _hashes(key, word, -(-(lane + count) // LANES))
        indices = words.astype("<u8", copy=False).view("<u2")[lane : lane + count]
        np.take(table, indices, out=output[done : done + count], mode="wrap")
        done, place = done + count, place + count


def _hashes(key: int, start: int, count: int) -> Words:
    """SplitMix64 of ``key`` at steps [start, start + count)."""
    words = np.arange(start, start + count, dtype=np.uint64)
    words *= np.uint64(GOLDEN)
    words += np.uint64(key)
    shifted = words >> np.uint64(30)
    for factor, shift in ((FIRST, 27), (SECOND, 31)):
        words ^= shifted
        words *= np.uint64(factor)
        np.right_shift(words, np.uint64(shift), out=shifted)
    words ^= shifted
    return words


@cache
def _bell() -> np.ndarray[Any, np.dtype[np.int32]]:
    """The sum of eight bytes, less its mean, at 65,536 equally spaced points of its distribution."""
    ways = [1]
    for _ in range(TERMS):
        longer = [0] * (len(ways) + 255)
        for total, count in enumerate(ways):
            for byte in range(256):
                longer[total + byte] += count
        ways = longer
    values, below, total = np.empty(ENTRIES, dtype=np.int32), 0, 0
    for entry in range(ENTRIES):
        point = (2 * entry + 1) * 256**TERMS // (2 * ENTRIES)
        while below + ways[total] <= point:
            below += ways[total]
            total += 1
        values[entry] = total - TERMS * 255 // 2
    return values
