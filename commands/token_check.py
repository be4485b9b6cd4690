"""The tokens that a plan chooses against its ONNX graph on the CPU: the graph is given the plan's own tokens, and asked what it would have chosen."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from artifact.config import LlamaConfig
from artifact.layout import parameter_count
from artifact.room import free_memory, gigabytes
from validation.calls import Ids
from validation.greedy import Decoder, greedy, next_logits
from validation.row_result import Array

Report = dict[str, Any]
FLOAT32, AT_ONCE = 4, 2
"""Bytes of a weight in ONNX Runtime, and how often it exists while it is packed for the processor."""
NEAR = 0.02
"""Of a row's largest logit: two tokens that a graph holds so near each other are told apart by rounding."""


def why_no_room(config: LlamaConfig) -> str | None:
    """Why the graph that would judge can't be opened beside what runs; None where the memory that is free holds it."""
    needed, free = AT_ONCE * FLOAT32 * parameter_count(config), free_memory()
    return None if needed <= free else f"the graph takes about {gigabytes(needed)} of memory on the CPU, {gigabytes(free)} are free"


def not_checked(reason: str) -> Report:
    """The report of a check that did not run, with the reason: nothing was judged."""
    return {"checked": 0, "equal": 0, "decisive": 0, "first": None, "passed": None, "reason": reason}


def check_tokens(plan: Decoder, graph: Decoder, prompts: Sequence[Sequence[int]], count: int) -> Report:
    """Let the plan choose, and the graph judge.

    Args:
        plan: what is checked.
        graph: of its stage, whole.
        prompts: token ids of each row, as many rows as the plan's session has.
        count: tokens of each row.

    Returns:
        checked, equal; decisive: how many others the graph would not have chosen by more than ``NEAR`` of the row's largest logit, or can't be
        judged, because its logits are no numbers; first of those: {row, position, plan, graph, margin: None where there is none}; passed: none is
        decisive.
    """
    positions = max(map(len, prompts)) + count
    chosen = [ids.copy() for ids in islice(greedy(plan, prompts, positions), count)]
    decisive: list[Report] = []
    equal = 0
    following: list[Ids] = []
    for position, (ids, given) in enumerate(zip(chosen, next_logits(graph, prompts, following, positions), strict=False)):  # it never ends
        following[:] = [ids]
        logits = given.astype(np.float32)
        best, rows = logits.argmax(axis=-1), np.arange(len(prompts))
        margins = _margins(logits, best, ids)
        equal += int((best == ids).sum())
        decisive += [
            {"row": int(row), "position": position, "plan": int(ids[row]), "graph": int(best[row]), "margin": _finite(margins[row])}
            for row in rows[~(margins <= NEAR)]  # what is no number is no pass
        ]
    total = count * len(prompts)
    return {"checked": total, "equal": equal, "decisive": len(decisive), "first": next(iter(decisive), None), "passed": not decisive}


def _margins(logits: Array, best: Ids, ids: Ids) -> Array:
    """[B] by how much each row's best token leads the chosen one, of that row's largest logit; not finite where the row is not."""
    rows = np.arange(len(logits))
    with np.errstate(invalid="ignore", divide="ignore"):
        margins: Array = (logits[rows, best] - logits[rows, ids]) / np.abs(logits).max(axis=-1)
    return margins


def _finite(margin: float) -> float | None:
    return round(float(margin), 4) if np.isfinite(margin) else None
