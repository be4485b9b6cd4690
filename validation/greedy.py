"""Greedy decoding of a batch: the likeliest token of every row, again and again, from a graph of either cache form.

Letters: B batch, S new tokens of a call, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from artifact.io_spec import KvCache
from validation.calls import FORMS, AnyCall, Ids, Turn
from validation.row_result import Array


class Decoder(Protocol):
    """Whatever can be called with new tokens: a graph on the CPU, or a plan on the GPU, which keeps its caches to itself.

    Attributes:
        capacity: slots of a static cache that it is fixed to; None where the caller chooses, or the cache is dynamic.
    """

    name: str
    kv_cache: KvCache
    capacity: int | None

    def new_cache(self, batch: int, capacity: int = 0) -> list[Array]:
        """Caches before the first call."""

    def call(self, call: AnyCall, cache: list[Array] | None) -> list[Array]:
        """Logits [B, S, V] or [B, 1, V], then the caches of the next call."""


def greedy(runner: Decoder, prompts: Sequence[Sequence[int]], capacity: int = 0) -> Iterator[Ids]:
    """Continue prompts of any lengths; the caller stops.

    Args:
        runner: the graph or plan.
        prompts: token ids of each row, at least one.
        capacity: slots of a static cache, unless the graph fixes them: the longest prompt and what is to follow.

    Yields:
        [B] int64, the next token of every row.

    Raises:
        ValidationError: ONNX Runtime stopped, or the static cache is full.
    """
    chosen: list[Ids] = []
    for logits in next_logits(runner, prompts, chosen, capacity):
        chosen[:] = [logits.argmax(axis=-1)]
        yield chosen[0]


def next_logits(runner: Decoder, prompts: Sequence[Sequence[int]], chosen: list[Ids], capacity: int = 0) -> Iterator[Array]:
    """The same where the caller chooses, so that several decoders can be given one history.

    Args:
        runner, prompts, capacity: as in ``greedy``.
        chosen: its one entry [B] is what the rows go on with; the caller puts it there before asking for more.

    Yields:
        [B, V], logits of every row's next token, the graph's dtype.

    Raises:
        ValidationError: as ``greedy``.
    """
    cache = runner.new_cache(len(prompts), capacity)
    for call in FORMS[runner.kv_cache].calls(_turns(prompts, chosen)):
        logits, *cache = runner.call(call, cache)
        columns = np.minimum(call.last, logits.shape[1] - 1)  # an engine graph has one
        yield logits[np.arange(len(prompts)), columns]


def _turns(prompts: Sequence[Sequence[int]], chosen: list[Ids]) -> Iterator[Turn]:
    """The prompts, then whatever has just been chosen."""
    new = [np.asarray(prompt, np.int64) for prompt in prompts]
    past = [0] * len(prompts)
    while True:
        yield Turn(tuple(new), tuple(past))
        past = [count + len(ids) for count, ids in zip(past, new, strict=True)]
        new = list(chosen[0][:, None])
