"""Every layer of an artifact's graph against the reference, one at a time, at any size: the error of each, as a multiple of float16's own.

    python -m benchmarks.layers_equal_reference artifacts/llama-2-7b --stage traced

Limit: 2.0 (validation/tolerances.py, worst_local_ratio). Below 1 a layer is nearer to the float32 reference than PyTorch's float16 layer is.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from artifact.manifest import require_artifact
from artifact.memory import peak_rss_mb
from exporter.checkpoints import CheckpointRequest, open_request
from validation import tolerances
from validation.local_ratio import TOKENS, float16_layer_errors, local_ratios
from validation.reference import Reference

LIMIT = next(row.limit for row in tolerances.limits_of("float16", has_floor=True) if row.check == "worst_local_ratio")


def main() -> int:
    """Print one line a layer and the worst; 1 where a layer is beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--stage", default="traced")
    arguments = parser.parse_args()
    model = require_artifact(arguments.artifact, "layers_equal_reference", weights=True)["model"]
    checkpoint = open_request(CheckpointRequest.from_record(model["request"]))
    reference, start = Reference(checkpoint.config, checkpoint.read), time.perf_counter()
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, TOKENS)
    (run,) = reference.run([tokens], keep_hidden=(0,), keep_cache=(), progress=_say)
    assert run.hidden is not None
    errors = float16_layer_errors(reference, run.hidden, _say)
    ratios = local_ratios(arguments.artifact / f"{arguments.stage}.onnx", run.hidden, errors, _say)
    if ratios is None:
        print("a float32 artifact: validate compares it with the reference itself")
        return 1
    for layer, ratio in enumerate(ratios):
        print(f"layer {layer:3d}  {ratio:.3f}")
    worst = max(range(len(ratios)), key=lambda layer: ratios[layer])
    print(f"worst: layer {worst}, {ratios[worst]:.3f} (limit {LIMIT}); {time.perf_counter() - start:.0f} s, peak memory {peak_rss_mb()} MB")
    return 0 if ratios[worst] <= LIMIT else 1


def _say(what: str, done: int, total: int) -> None:
    print(f"\r{what} ({done}/{total})", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
