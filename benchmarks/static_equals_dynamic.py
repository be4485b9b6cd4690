"""Greedy tokens from a static cache against those from a dynamic one: two artifacts of one checkpoint, a batch of ragged prompts, stage by stage.

    python -m benchmarks.static_equals_dynamic artifacts/dynamic artifacts/static --stage traced --stage fused --stage int8

A row is compared up to its first different token; what follows has another past. There the two best logits are printed, of each form, in one call
over the whole row: where the two candidates are as near as the forms are to each other, it is a tie that rounding decides.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from artifact.config import LlamaConfig
from artifact.manifest import kv_cache_of, require_artifact
from artifact.steps import require
from validation.graph_runner import GraphRunner
from validation.greedy import greedy

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village at the foot of a mountain, there lived an old clockmaker who had never been late for anything",
    "def fibonacci(n):",
    "Water boils at a lower temperature on a mountain than at the sea, because",
)
"""5 to about 30 tokens: no two rows of the batch end in the same column of its prefill."""


def main() -> int:
    """Print one line a stage and one a difference; 1 where a stage has differences."""
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
    start = time.perf_counter()
    theirs, ours = (np.stack(list(islice(greedy(runner, prompts, max(map(len, prompts)) + steps), steps))) for runner in runners)  # [steps, B]
    first = [int(np.argmax(column)) if column.any() else steps for column in (ours != theirs).T]
    equal = sum(first)
    print(f"{stage} {runners[0].dtype}: {equal} of {ours.size} tokens equal ({time.perf_counter() - start:.0f} s)", flush=True)
    for row, step in enumerate(first):
        if step < steps:
            print(f"  row {row} differs at step {step}")
            ids = np.array([*prompts[row], *theirs[:step, row]])
            for runner in runners:
                print(f"    {runner.kv_cache:8} {_best_two(runner.logits(ids)[-1])}")
    return equal == ours.size


def _open(artifact: Path, stage: str) -> GraphRunner:
    model = require_artifact(artifact, "generate", weights=True)["model"]
    return GraphRunner(require(artifact, f"{stage}.onnx"), LlamaConfig(**model["config"]), model["dtype"], kv_cache_of(model))


def _best_two(logits: np.ndarray) -> str:
    best = np.argsort(logits.astype(np.float64))[-2:][::-1]
    return ", ".join(f"{token}: {float(logits[token]):.6g}" for token in best)


if __name__ == "__main__":
    sys.exit(main())
