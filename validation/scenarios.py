"""The four ways a model is used, as calls of a graph: prefill, cached decode, chunked prefill, a padded batch.

Teacher-forced: every call gets the true tokens, whatever the graph said before, so that one full forward of the reference judges them all.
A scenario knows nothing of caches: ``calls`` lays its turns out for a graph of either form.
Letters: B batch, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.layout import LARGE, parameter_count
from validation.calls import Ids, Turn

FULL, FULL_OF_LARGE, SHORTEST = 320, 256, 20
"""Tokens of the main sequence, of a large model's (one more costs three stages a second of two cores and more), and the fewest that still make four
different scenarios."""
STEPS, PADDED_STEPS = 64, 8
"""Tokens that are decoded one by one, alone and in the padded batch; fewer where the model is short."""


@dataclass(frozen=True)
class Part:
    """What is judged alone: one row of one kind of call, so that a fault there can't hide in the mean of the rest.

    Attributes:
        row: index in the batch.
        name: ``prompt`` (the first call), ``chunk 2`` … (later calls of several tokens), ``steps`` (calls of one token, taken together).
        positions: the row's token indices.
        where: ``padded, row 1, steps``; the row is named where there are several.
    """

    row: int
    name: str
    positions: Ids
    where: str


@dataclass(frozen=True)
class Scenario:
    """Token rows and how they are cut into calls.

    Attributes:
        rows: token ids [L] of each row of the batch; they end together, so a shorter one has fewer tokens in the first calls.
        sequences: for each row, which of the reference's sequences it is a prefix of.
        chunks: columns of each call; they add up to the longest row.
    """

    name: str
    rows: tuple[Ids, ...]
    sequences: tuple[int, ...]
    chunks: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of the batch: the longest row."""
        return max(len(row) for row in self.rows)

    @property
    def pads(self) -> tuple[int, ...]:
        """Columns of the batch in which a row has no token, before its first."""
        return tuple(self.width - len(row) for row in self.rows)

    @property
    def positions(self) -> int:
        """Real positions of all rows."""
        return sum(len(row) for row in self.rows)

    def parts(self) -> Iterator[Part]:
        """The parts of every row, padding left out; a call that is padding alone is no part of its row."""
        for row, pad in enumerate(self.pads):
            for name, start, end in self._spans():
                positions = np.arange(max(start - pad, 0), end - pad, dtype=np.int64)
                if len(positions):
                    yield Part(row, name, positions, f"{self.name}, row {row}, {name}" if len(self.rows) > 1 else f"{self.name}, {name}")

    def is_new(self, positions: Ids) -> NDArray[np.bool_]:
        """Which positions of a row the scenario's means are about: of one unpadded row, those computed from a cache, where there are any."""
        alone = len(self.rows) == 1 and len(self.chunks) > 1
        new: NDArray[np.bool_] = positions >= (self.chunks[0] if alone else 0)
        return new

    def _spans(self) -> Iterator[tuple[str, int, int]]:
        """(name, first column, end column): the first call, every later call of several tokens, every run of calls of one token."""
        kinds = ["prompt" if call == 0 else "steps" if size == 1 else f"chunk {call + 1}" for call, size in enumerate(self.chunks)]
        start = 0
        for name, calls in groupby(zip(kinds, self.chunks, strict=True), key=itemgetter(0)):
            end = start + sum(size for _, size in calls)
            yield name, start, end
            start = end

    def last_positions(self, row: int) -> Ids:
        """The row's real position in the last column of each call."""
        columns = np.cumsum(self.chunks) - 1 - self.pads[row]
        return columns[columns >= 0].astype(np.int64)

    def turns(self) -> Iterator[Turn]:
        """What each call brings, in order."""
        for start, end in pairwise(accumulate(self.chunks, initial=0)):
            spans = [(max(start - pad, 0), max(end - pad, 0)) for pad in self.pads]
            new = tuple(row[first:last] for row, (first, last) in zip(self.rows, spans, strict=True))
            yield Turn(new, tuple(first for first, _ in spans))


def scenario_lengths(config: LlamaConfig) -> dict[str, int]:
    """Tokens of each piece; scaled down where the model's own maximum is shorter than the full main sequence.

    Raises:
        ValidationError: the model is too short for four different scenarios.
    """
    large = parameter_count(config) > LARGE
    main = min(FULL_OF_LARGE if large else FULL, config.max_position_embeddings)
    if main < SHORTEST:
        raise ValidationError(f"max_position_embeddings is {main}; the four scenarios need at least {SHORTEST} positions")
    prompt = main - min(STEPS, main // 2)
    padded = prompt // 2 if large else prompt
    return {
        "main": main,
        "prompt": prompt,  # 256 of 320; the rest is decoded one by one
        "first_chunk": main * 5 // 16,  # 100, 156, 64: none a power of two times another
        "second_chunk": main * 39 // 80,
        "padded_prompt": padded,
        "padded_decode": min(PADDED_STEPS, main // 10),
        "short": padded * 19 // 32,  # 152, the prompt of the padded row
    }


def tokens_needed(config: LlamaConfig) -> int:
    """Tokens that the scenarios take: the main sequence and the padded row."""
    lengths = scenario_lengths(config)
    return lengths["main"] + lengths["short"] + lengths["padded_decode"]


def split_sequences(config: LlamaConfig, tokens: Ids, bos: int | None) -> tuple[Ids, Ids]:
    """The two sequences of the scenarios: the main one and the padded row; each begins with BOS where the model has one."""
    lengths = scenario_lengths(config)
    main, short = lengths["main"], lengths["short"] + lengths["padded_decode"]
    return _with_bos(tokens[:main], bos), _with_bos(tokens[main : main + short], bos)


def make_scenarios(config: LlamaConfig, main: Ids, short: Ids) -> tuple[Scenario, ...]:
    """The four scenarios over the two sequences."""
    lengths = scenario_lengths(config)
    prompt, padded, decode = lengths["prompt"], lengths["padded_prompt"], lengths["padded_decode"]
    first, second = lengths["first_chunk"], lengths["second_chunk"]
    return (
        Scenario("prefill", (main,), (0,), (len(main),)),
        Scenario("decode", (main,), (0,), (prompt, *[1] * (len(main) - prompt))),
        Scenario("chunked", (main,), (0,), (first, second, len(main) - first - second)),
        Scenario("padded", (main[: padded + decode], short), (0, 1), (padded, *[1] * decode)),
    )


def _with_bos(tokens: Ids, bos: int | None) -> Ids:
    return tokens if bos is None else np.concatenate(([bos], tokens[:-1])).astype(np.int64)
