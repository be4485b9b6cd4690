"""How the new tokens of a batch are laid out as a call of a graph: padded on the left for a dynamic cache, on the right for a static one.

    turn      row 0: a b c   row 1: d                       what the call brings, whatever the cache
    dynamic   a b c          padding padding d              a mask over all columns so far says what is real
    static    a b c          d padding padding              each row writes behind its own last token: padding is overwritten later

Letters: B batch, S new tokens of a call (the longest row's), T columns so far, n new tokens of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from artifact import io_spec
from artifact.io_spec import KvCache

Ids = NDArray[np.int64]
Inputs = dict[str, NDArray[np.int64]]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Turn:
    """What one call brings: new tokens [n] of every row, maybe none, and how many tokens each row has had before."""

    new: tuple[Ids, ...]
    past: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of the call, S."""
        return max(map(len, self.new))


@dataclass(frozen=True)
class Call:
    """One call of a graph with a dynamic cache: the new columns [start, end) of the batch, with everything before them in the cache.

    Attributes:
        input_ids, position_ids: [B, S] int64; padding, on the left, has id 0 and position 0.
        attention_mask: [B, T] int64, 0 = padding.
    """

    start: int
    end: int
    input_ids: Ids
    attention_mask: Ids
    position_ids: Ids

    @property
    def in_use(self) -> int:
        """Columns after the call, T."""
        return self.end

    @property
    def empty_length(self) -> int:
        """Length of the caches that stand for no past."""
        return 0

    @property
    def last(self) -> Ids:
        """[B], column of each row's last real token."""
        return np.full(len(self.input_ids), self.input_ids.shape[1] - 1, np.int64)

    def inputs(self) -> Inputs:
        """Graph inputs by name, without the caches."""
        return {io_spec.INPUT_IDS: self.input_ids, io_spec.ATTENTION_MASK: self.attention_mask, io_spec.POSITION_IDS: self.position_ids}


@dataclass(frozen=True)
class StaticCall:
    """One call of a graph with a static cache; fields as in ``artifact.io_spec.graph_inputs``.

    Attributes:
        input_ids, position_ids: [B, S] int64; padding, on the right, has id 0 and counts on.
        write_indices: [B] int64, the row's tokens so far.
        lengths: [B] int64, ``write_indices + S``: padding is written too.
        last: [B] int64, column of the row's last real token; 0 where it has none.
    """

    input_ids: Ids
    position_ids: Ids
    write_indices: Ids
    lengths: Ids
    last: Ids

    @property
    def in_use(self) -> int:
        """Slots that the call needs."""
        return int(self.lengths.max())

    @property
    def empty_length(self) -> int:
        """Length of the smallest caches that the call fits into."""
        return self.in_use

    def inputs(self) -> Inputs:
        """Graph inputs by name, without the caches; the last belongs to engine graphs alone."""
        return {
            io_spec.INPUT_IDS: self.input_ids,
            io_spec.POSITION_IDS: self.position_ids,
            io_spec.CACHE_WRITE_INDICES: self.write_indices,
            io_spec.KEY_VALUE_LENGTHS: self.lengths,
            io_spec.LAST_TOKEN_INDICES: self.last,
        }


AnyCall = Call | StaticCall


@dataclass(frozen=True)
class CacheForm:
    """What a cache form asks of a caller.

    Attributes:
        calls: turns → calls, in order; lazy, so that a turn may depend on what the call before it gave.
        padding: on which side of the new tokens.
    """

    calls: Callable[[Iterable[Turn]], Iterator[AnyCall]]
    padding: Side


def left_padded(turns: Iterable[Turn]) -> Iterator[Call]:
    """Calls of a graph with a dynamic cache."""
    mask: Ids | None = None
    for turn in turns:
        real = _padded([np.ones_like(new) for new in turn.new], turn.width, "left")
        mask = real if mask is None else np.concatenate((mask, real), axis=1)
        end = mask.shape[1]
        positions = _padded(_positions(turn), turn.width, "left")
        yield Call(end - turn.width, end, _padded(turn.new, turn.width, "left"), mask, positions)


def right_padded(turns: Iterable[Turn]) -> Iterator[StaticCall]:
    """Calls of a graph with a static cache."""
    for turn in turns:
        past, counts = (np.array(numbers, np.int64) for numbers in (turn.past, [len(new) for new in turn.new]))
        last = np.maximum(counts - 1, 0)
        positions = past[:, None] + np.arange(turn.width)  # padding too has the position of its slot
        yield StaticCall(_padded(turn.new, turn.width, "right"), positions, past, past + turn.width, last)


def _positions(turn: Turn) -> list[Ids]:
    return [np.arange(past, past + len(new), dtype=np.int64) for new, past in zip(turn.new, turn.past, strict=True)]


def _padded(rows: Iterable[Ids], width: int, side: Side) -> Ids:
    """Rows of any lengths → [B, width], padded with 0."""
    spare = [(row, width - len(row)) for row in rows]
    return np.stack([np.pad(row, (pad, 0) if side == "left" else (0, pad)) for row, pad in spare]).astype(np.int64)


FORMS: dict[KvCache, CacheForm] = {"dynamic": CacheForm(left_padded, "left"), "static": CacheForm(right_padded, "right")}
