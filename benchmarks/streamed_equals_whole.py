"""Graphs run one layer at a time against the same graphs loaded whole, stage by stage: `python -m benchmarks.streamed_equals_whole artifacts/demo`.

Both run the four scenarios on random tokens; they are compared with one another, and for scale with the float32 reference. Exit code 1 where a logit
or a cache of theirs differs in a bit (graphs for ONNX Runtime are parted at their sums, and differ by 1e-5).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from artifact.config import LlamaConfig
from artifact.manifest import kv_cache_of, require_artifact
from artifact.steps import require
from exporter.checkpoints import CheckpointRequest, open_request
from validation.graph_runner import GraphRunner
from validation.metrics import absolute_errors
from validation.oracle import SPARE_SLOTS
from validation.reference import Reference
from validation.row_result import RowResult
from validation.scenarios import Scenario, make_scenarios, split_sequences, tokens_needed
from validation.streamed_runner import StreamedRunner


def main() -> int:
    """Print one line a stage and scenario; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--stage", action="append")
    arguments = parser.parse_args()
    model = require_artifact(arguments.artifact, "streamed_equals_whole", weights=True)["model"]
    config = LlamaConfig(**model["config"])
    main, short = split_sequences(config, np.random.default_rng(0).integers(0, config.vocab_size, tokens_needed(config)), None)
    checkpoint = open_request(CheckpointRequest.from_record(model["request"]))
    reference = [run.logits() for run in Reference(config, checkpoint.read).run([main, short], keep_cache=())]
    scenarios = make_scenarios(config, main, short)
    sound = True
    for stage in arguments.stage or ["traced"]:
        path = require(arguments.artifact, f"{stage}.onnx")
        whole = GraphRunner(path, config, model["dtype"], kv_cache_of(model))
        streamed = StreamedRunner(path, config, model["dtype"], kv_cache_of(model))
        sound &= _compare(stage, whole, streamed, scenarios, reference)
    return 0 if sound else 1


def _compare(stage: str, whole: GraphRunner, streamed: StreamedRunner, scenarios: tuple[Scenario, ...], reference: list[np.ndarray]) -> bool:
    slots = max(scenario.width for scenario in scenarios) + SPARE_SLOTS
    start = time.perf_counter()
    streamed.expect(scenarios, (), slots)
    sound = not streamed.joined
    for scenario in scenarios:
        pairs = list(zip(whole.run(scenario, slots), streamed.run(scenario, slots), scenario.sequences, strict=True))
        error = np.concatenate([absolute_errors(row.logits, reference[sequence][row.positions])[0] for row, _, sequence in pairs]).mean()
        apart = np.concatenate([absolute_errors(first.logits, second.logits)[0] for first, second, _ in pairs]).mean()
        same = all(_same(first, second) for first, second, _ in pairs)
        print(f"{stage:8} {scenario.name:8} error of the whole {error:.5f}, difference ÷ error {apart / error:.3f}, same bits: {same}", flush=True)
        sound &= same
    print(f"{stage:8} cuts joined are the graph: {not streamed.joined}; {time.perf_counter() - start:.0f} s", flush=True)
    return sound


def _same(first: RowResult, second: RowResult) -> bool:
    ours, theirs = ([row.logits, *row.keys, *row.values] for row in (first, second))
    return all(np.array_equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())
