"""Greedy tokens from a static cache against those from a dynamic one: two artifacts of one checkpoint, four prompts, stage by stage.

    python -m benchmarks.static_equals_dynamic artifacts/dynamic artifacts/static --stage traced --stage fused --stage int8

Each row alone, the static cache with no more slots than tokens: both forms sum over the same columns, and their logits must be equal bit for bit.
As one ragged batch they can't be: a sum over keys adds up in another order where columns of padding (dynamic, on the left) or spare slots (static)
lie between or behind the keys, and float16 graphs round what comes of it. Both forms are given the dynamic form's tokens, to the end. Where they
would choose differently it is a tie if the two candidates' logits are equal or neighbouring numbers of the graph's dtype, in both forms; anything
else is a difference.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from artifact.config import LlamaConfig
from artifact.manifest import kv_cache_of, require_artifact
from artifact.steps import require
from validation.calls import AnyCall, Ids
from validation.graph_runner import GraphRunner
from validation.greedy import Decoder, next_logits
from validation.row_result import Array

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village at the foot of a mountain, there lived an old clockmaker who had never been late for anything",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain than at the sea, because",
)
"""5 to about 30 tokens: no two rows of the batch end in the same column of its prefill."""


def main() -> int:
    """Print two lines a stage and one for each tie and difference; 1 where a stage has differences, or other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dynamic", type=Path)
    parser.add_argument("static", type=Path)
    parser.add_argument("--stage", action="append")
    parser.add_argument("--steps", type=int, default=128)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.dynamic / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    print(f"prompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens, {arguments.steps} steps")
    same = [_compare(arguments.dynamic, arguments.static, stage, prompts, arguments.steps) for stage in arguments.stage or ["traced"]]
    return 0 if all(same) else 1


def _compare(dynamic: Path, static: Path, stage: str, prompts: list[list[int]], steps: int) -> bool:
    runners = [_open(artifact, stage) for artifact in (dynamic, static)]
    print(f"{stage} {runners[0].dtype}", flush=True)
    start = time.perf_counter()
    calls = len(prompts) * steps
    same_bits = sum(np.array_equal(*logits) for prompt in prompts for logits in side_by_side(runners[0], NoSpareSlots(runners[1]), [prompt], steps))
    print(f"  each row alone: logits of {same_bits} of {calls} tokens equal to the last bit", flush=True)
    parted = partings(*runners, prompts, steps)
    differences = sum(not parting.is_tie for parting in parted)
    counts = f"{calls - len(parted)} of {calls} tokens equal, {len(parted) - differences} tied, {differences} different"
    print(f"  ragged batch: {counts} ({time.perf_counter() - start:.0f} s)", flush=True)
    for parting in parted:
        print(f"  {parting}")
    return same_bits == calls and not differences


@dataclass(frozen=True)
class Parting:
    """A step at which the forms choose different tokens for a row, after the same tokens.

    Attributes:
        tokens: what the dynamic form chooses, and the static one.
        gaps: by how much each form's own choice leads the other's, in its logits; not finite where they are not.
        ulp: from either form's best logit down to the next number of its dtype, the lesser of the two.
    """

    row: int
    step: int
    tokens: tuple[int, int]
    gaps: tuple[float, float]
    ulp: float

    @property
    def is_tie(self) -> bool:
        """Whether the two candidates are equal or neighbouring numbers, in both forms."""
        return all(gap <= self.ulp for gap in self.gaps)

    def __str__(self) -> str:
        (theirs, ours), (led, leads) = self.tokens, self.gaps
        word = "tie" if self.is_tie else "difference"
        return f"{word} in row {self.row} at step {self.step}: dynamic {theirs} by {led:.6g}, static {ours} by {leads:.6g}; one ulp is {self.ulp:.6g}"


def partings(dynamic: Decoder, static: Decoder, prompts: Sequence[Sequence[int]], steps: int) -> list[Parting]:
    """Where two forms part, in the order of steps."""
    return [parting for step, logits in enumerate(side_by_side(dynamic, static, prompts, steps)) for parting in _parted(step, *logits)]


def _parted(step: int, theirs_BV: Array, ours_BV: Array) -> Iterator[Parting]:
    for row, (theirs, ours) in enumerate(zip(theirs_BV, ours_BV, strict=True)):
        first, second = int(theirs.argmax()), int(ours.argmax())
        if first != second or not np.isfinite([theirs[first], ours[second]]).all():  # the best of what is no number is no number
            gaps = float(theirs[first]) - float(theirs[second]), float(ours[second]) - float(ours[first])
            yield Parting(row, step, (first, second), gaps, _ulp(theirs[first], ours[second]))


def _ulp(*best: Any) -> float:
    """The least distance to a neighbour of either: below a power of two numbers lie half as far apart as above it."""
    return min(float(one) - float(np.nextafter(one, -np.inf, dtype=one.dtype)) for one in best)


def side_by_side(dynamic: Decoder, static: Decoder, prompts: Sequence[Sequence[int]], steps: int) -> Iterator[tuple[Array, Array]]:
    """Logits [B, V] of both forms, step by step, both given what the first of them chooses."""
    chosen: list[Ids] = []
    capacity = max(map(len, prompts)) + steps
    both = [next_logits(form, prompts, chosen, capacity) for form in (dynamic, static)]
    for theirs, ours in islice(zip(*both, strict=True), steps):
        chosen[:] = [theirs.argmax(axis=-1)]
        yield theirs, ours


class NoSpareSlots:
    """A graph with a static cache of as many slots as are in use: it grows with every call."""

    def __init__(self, graph: Decoder) -> None:
        self.name, self.kv_cache, self.capacity = graph.name, graph.kv_cache, graph.capacity
        self._graph = graph

    def new_cache(self, batch: int, capacity: int = 0) -> list[Array]:
        """No slots, whatever the capacity."""
        return self._graph.new_cache(batch)

    def call(self, call: AnyCall, cache: list[Array]) -> list[Array]:
        """As the graph, with the slots that this call needs."""
        grown = self._graph.new_cache(len(call.input_ids), call.in_use)
        for slots, kept in zip(grown, cache, strict=True):
            slots[:, :, : kept.shape[2]] = kept
        return self._graph.call(call, grown)


def _open(artifact: Path, stage: str) -> GraphRunner:
    model = require_artifact(artifact, "generate", weights=True)["model"]
    return GraphRunner(require(artifact, f"{stage}.onnx"), LlamaConfig(**model["config"]), model["dtype"], kv_cache_of(model))


if __name__ == "__main__":
    sys.exit(main())
