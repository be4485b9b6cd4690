"""The calls that a layer is tried with: a prefill, a step and a chunk from a cache, and a padded batch's prompt and step.

They are short pieces of the scenarios at the reference's own hidden states, keys and values, so that a layer needs no layer before it. The step is
the last of the main sequence: what goes wrong with length shows there.
Letters: B batch, S new tokens, E hidden, K kv heads, W columns or slots of a cache, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact import io_spec
from validation.calls import FORMS, AnyCall, Turn
from validation.local_ratio import TOKENS
from validation.oracle import MAIN, PADDED, Oracle
from validation.stray_slots import UNWRITTEN

Array = NDArray[Any]
CHUNK, PROMPT = 16, 40
"""Tokens of the chunk and of the padded prompt."""


@dataclass(frozen=True)
class Probe:
    """One call.

    Attributes:
        name: ``prefill``, ``decode``, ``chunked``, ``padded prompt``, ``padded step``.
        sequences: for each row, which of the reference's it is of.
        turn: its new tokens.
        call: the same as a graph takes them.
        slots: of a static cache; 0 of a dynamic one.
    """

    name: str
    sequences: tuple[int, ...]
    turn: Turn
    call: AnyCall
    slots: int

    @property
    def tokens(self) -> str:
        """``128 tokens``, ``1 token after 319``."""
        count, past = self.turn.width, max(self.turn.past)
        return f"{count} token{'s' if count > 1 else ''}" + (f" after {past}" if past else "")

    @property
    def label(self) -> str:
        """``decode, 1 token after 319``; an edge's name says it already."""
        return self.name if self.tokens in self.name else f"{self.name}, {self.tokens}"

    def entering(self, oracle: Oracle, layer: int) -> Array:
        """The reference's hidden state before a layer (after the last, for their number), [B, S, E] float32; padding has the first token's."""
        rows = []
        for row, new, past in zip(self.sequences, self.turn.new, self.turn.past, strict=True):
            hidden = oracle.runs[row].hidden
            assert hidden is not None
            rows.append(_fill(hidden[layer][np.arange(past, past + len(new)) % len(hidden[layer])], hidden[layer][:1], self.turn.width, oracle))
        return np.stack(rows).astype(np.float32)

    def caches(self, oracle: Oracle, layer: int) -> dict[str, Array]:
        """The reference's keys and values before the call, by graph input, [B, K, W, D] float32; gigabytes at an edge, so each is made in place."""
        feeds = {}
        for kind in io_spec.CACHE_KINDS:
            shape = (len(self.sequences), oracle.config.num_key_value_heads, self._width, oracle.config.head_dim)
            filled = np.empty(shape, np.float32)
            for index, (row, past) in enumerate(zip(self.sequences, self.turn.past, strict=True)):
                run = oracle.runs[row]
                kept = np.asarray((run.keys if kind == "key" else run.values)[layer])  # [K, L, D]
                filled[index] = UNWRITTEN if self.slots else kept[:, :1]
                start = self._width - past if FORMS[oracle.kv_cache].padding == "left" else 0
                for first in range(0, past, kept.shape[1]):
                    count = min(kept.shape[1], past - first)
                    filled[index, :, start + first : start + first + count] = kept[:, :count]
            feeds[io_spec.past_name(layer, kind)] = filled
        return feeds

    @property
    def _width(self) -> int:
        return self.slots or self.call.in_use - self.turn.width


def make_probes(oracle: Oracle) -> list[Probe]:
    """The five, as long as the scenarios' sequences allow."""
    main, short = (next(_row(oracle, sequence)) for sequence in (MAIN, PADDED))
    length, half = len(main), len(main) // 2
    padded = min(PROMPT, len(main) - 1), max(2, min(PROMPT * 5 // 8, len(short) - 1))
    both = (MAIN, PADDED)
    rows = (main[: padded[0]], short[: padded[1]])
    steps = (main[padded[0] : padded[0] + 1], short[padded[1] : padded[1] + 1])
    return [
        _probe(oracle, "prefill", (MAIN,), [(main[:TOKENS],)]),
        _probe(oracle, "decode", (MAIN,), [(main[: length - 1],), (main[length - 1 :],)]),
        _probe(oracle, "chunked", (MAIN,), [(main[:half],), (main[half : half + CHUNK],)]),
        _probe(oracle, "padded prompt", both, [rows]),
        _probe(oracle, "padded step", both, [rows, steps]),
    ]


def _row(oracle: Oracle, sequence: int) -> Any:
    return (row for each in oracle.scenarios for row, of in zip(each.rows, each.sequences, strict=True) if of == sequence)


def _probe(oracle: Oracle, name: str, sequences: tuple[int, ...], rows: Sequence[tuple[Array, ...]]) -> Probe:
    turns, past = [], (0,) * len(sequences)
    for new in rows:
        turns.append(Turn(new, past))
        past = tuple(before + len(tokens) for before, tokens in zip(past, new, strict=True))
    call = list(FORMS[oracle.kv_cache].calls(turns))[-1]
    return Probe(name, sequences, turns[-1], call, oracle.capacity if oracle.kv_cache == "static" else 0)


def _fill(real: Array, filler: Array, width: int, oracle: Oracle) -> Array:
    """[n, …] → [width, …], padded on the side of the cache form."""
    spare = np.repeat(filler, width - len(real), axis=0)
    parts = (spare, real) if FORMS[oracle.kv_cache].padding == "left" else (real, spare)
    return np.concatenate(parts)
