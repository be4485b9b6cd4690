"""Find weights in a plan's bytes, as stored and transposed: one pass over the plan, however many weights there are.

TensorRT-RTX puts constants at multiples of 8 bytes, or all of a plan's as far beside them (measured). So the plan is read as 64-bit words and
looked up in a table of the samples' first words; whoever is found is compared in full. Some of those that are not are searched byte by byte, and
the plan is read again from where in a word they stand, before a weight counts as missing.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.graph_weights import Weight

SAMPLE_BYTES = 64
WORD = 8
BLOCK_WORDS = 1 << 22
CANDIDATES = 16
SLOW_SEARCHES = 8
"""Byte-by-byte passes that are worth their time; where more weights are missing, something larger is wrong than their alignment."""


@dataclass(frozen=True)
class Copies:
    """How often a weight's sample stands in the plan."""

    name: str
    as_stored: int
    transposed: int

    @property
    def total(self) -> int:
        """In either layout."""
        return self.as_stored + self.transposed


def count_copies(plan: Path, weights: Sequence[Weight]) -> list[Copies]:
    """How often each weight is stored in a plan, by a sample of up to 64 bytes."""
    samples = [sample for weight in weights for sample in _samples(weight)]
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        counts = _count(content, samples)
        missing = [i for i in range(len(weights)) if not counts[2 * i] + counts[2 * i + 1]]
        for shift in _other_shifts(content, [sample for i in missing[:SLOW_SEARCHES] for sample in samples[2 * i : 2 * i + 2]]):
            counts = [before + more for before, more in zip(counts, _count(content, samples, shift), strict=True)]
    return [Copies(weight.name, counts[2 * i], counts[2 * i + 1]) for i, weight in enumerate(weights)]


def _samples(weight: Weight) -> tuple[bytes, bytes]:
    """The most varied piece of a row and of a column; each starts at a multiple of 8 bytes in its layout. A vector is its own transpose."""
    array = weight.stored()
    if array.ndim == 1:
        return _most_varied(array[None]), _most_varied(array[None])
    return _most_varied(array), _most_varied(array.T)


def _most_varied(array: npt.NDArray[np.generic]) -> bytes:
    rows, columns = array.shape
    step = WORD // min(WORD, array.itemsize)
    length = min(columns, SAMPLE_BYTES // array.itemsize) // step * step or columns
    # Rows that start at a multiple of 8 bytes. Of a row, a piece from its middle that crosses no multiple of its own length:
    # the compiler may store a packed weight's parts apart, and heads and gate·up begin at such multiples.
    start = columns // 2 // length * length if 2 * length <= columns else 0
    chosen = range(0, rows, step * max(1, rows // step // CANDIDATES))
    pieces = (np.ascontiguousarray(array[row, start : start + length]) for row in chosen)
    return max((piece.tobytes() for piece in pieces), key=lambda piece: len(set(piece)))


def _other_shifts(content: mmap.mmap, samples: Sequence[bytes]) -> list[int]:
    """Where in a word samples stand that are at no multiple of 8 bytes: a part's constants may all be moved by a few bytes (INT8, measured)."""
    places = (content.find(sample) for sample in samples)
    return sorted({place % WORD for place in places if place >= 0} - {0})


def _count(content: mmap.mmap, samples: Sequence[bytes], shift: int = 0) -> list[int]:
    keys = np.array([int.from_bytes(sample[:WORD].ljust(WORD, b"\0"), "little") for sample in samples], dtype="<u8")
    order = np.argsort(keys, kind="stable")
    is_candidate = np.zeros(1 << 16, dtype=bool)
    is_candidate[(keys & 0xFFFF).astype(np.int64)] = True
    counts = [0] * len(samples)
    view = memoryview(content)
    total = (len(content) - shift) // WORD
    for start in range(0, total, BLOCK_WORDS):
        size = min(BLOCK_WORDS, total - start)
        words = np.frombuffer(view, dtype="<u8", count=size, offset=start * WORD + shift)
        places = np.flatnonzero(is_candidate[words.view("<u2")[::4]])
        hits = words[places]
        del words
        first, last = (np.searchsorted(keys[order], hits, side=side) for side in ("left", "right"))
        for i in np.flatnonzero(first < last):
            at = (start + int(places[i])) * WORD + shift
            for j in order[first[i] : last[i]]:
                counts[j] += content[at : at + len(samples[j])] == samples[j]
    view.release()
    return counts
