"""The tokens that a plan chooses against its ONNX graph on the CPU: the graph is given the plan's own tokens, and asked what it would have chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from validation.calls import FORMS, Ids, Turn
from validation.greedy import Decoder, greedy
from validation.row_result import Array

Report = dict[str, Any]
NEAR = 0.02
"""Of the largest logit: two tokens that a graph holds so near each other are told apart by rounding."""


def check_tokens(plan: Decoder, graph: Decoder, prompts: Sequence[Sequence[int]], count: int) -> Report:
    """Let the plan choose, and the graph judge.

    Args:
        plan: what is checked.
        graph: of its stage, whole.
        prompts: token ids of each row, as many rows as the plan's session has.
        count: tokens of each row.

    Returns:
        checked, equal; decisive: how many others the graph would not have chosen by more than ``NEAR`` of its largest logit; first of those:
        {row, position, plan, graph, margin}; passed: none is decisive.
    """
    positions = max(map(len, prompts)) + count
    chosen = [ids.copy() for ids in islice(greedy(plan, prompts, positions), count)]
    decisive: list[Report] = []
    equal = 0
    for position, (ids, logits) in enumerate(zip(chosen, _judged(graph, prompts, chosen, positions), strict=True)):
        best, rows = logits.argmax(axis=-1), np.arange(len(prompts))
        margins = (logits[rows, best] - logits[rows, ids]) / np.abs(logits).max()
        equal += int((best == ids).sum())
        decisive += [
            {"row": int(row), "position": position, "plan": int(ids[row]), "graph": int(best[row]), "margin": round(float(margins[row]), 4)}
            for row in rows[margins > NEAR]
        ]
    total = count * len(prompts)
    return {"checked": total, "equal": equal, "decisive": len(decisive), "first": next(iter(decisive), None), "passed": not decisive}


def _judged(graph: Decoder, prompts: Sequence[Sequence[int]], chosen: Sequence[Ids], positions: int) -> Iterator[Array]:
    """The graph's logits [B, V] where each token was chosen."""
    cache = graph.new_cache(len(prompts), positions)
    for call in FORMS[graph.kv_cache].calls(_turns(prompts, chosen)):
        logits, *cache = graph.call(call, cache)
        columns = np.minimum(call.last, logits.shape[1] - 1)
        yield logits[np.arange(len(prompts)), columns].astype(np.float32)


def _turns(prompts: Sequence[Sequence[int]], chosen: Sequence[Ids]) -> Iterator[Turn]:
    """The prompts, then the tokens that were chosen, without the last, which nothing follows."""
    yield Turn(tuple(np.asarray(prompt, np.int64) for prompt in prompts), (0,) * len(prompts))
    for step, ids in enumerate(chosen[:-1]):
        yield Turn(tuple(ids[:, None]), tuple(len(prompt) + step for prompt in prompts))
