"""One linear × 1.01 in a middle layer, at any size: is it found, and its layer named? `python -m benchmarks.saboteur artifacts/llama-2-7b`.

The factor is a node behind the linear, as a wrong fusion would leave it: the weights are sound, so no checksum can tell; end to end it hides under
float16's noise. Prints the local ratio of every layer; exit code 1 unless the damaged layer is the first and only one beyond the limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from artifact.layout import MODULE_KEY, layer_prefix
from artifact.manifest import require_artifact
from benchmarks.layers_equal_reference import LIMIT
from exporter.checkpoints import CheckpointRequest, open_request
from validation.local_ratio import TOKENS, float16_layer_errors, local_ratios
from validation.reference import Reference

FACTOR = 1.01


def main() -> int:
    """Print one line a layer, and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--stage", default="fused")
    parser.add_argument("--linear", default="mlp.down_proj")
    parser.add_argument("--layer", type=int, help="default: the middle one")
    arguments = parser.parse_args()
    model = require_artifact(arguments.artifact, "saboteur", weights=True)["model"]
    checkpoint, start = open_request(CheckpointRequest.from_record(model["request"])), time.perf_counter()
    layer = checkpoint.config.num_hidden_layers // 2 if arguments.layer is None else arguments.layer
    reference = Reference(checkpoint.config, checkpoint.read)
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, TOKENS)
    (run,) = reference.run([tokens], keep_hidden=(0,), keep_cache=(), progress=_say)
    assert run.hidden is not None
    graph = ir.load(arguments.artifact / f"{arguments.stage}.onnx")
    scale_linear(graph, f"{layer_prefix(layer)}.{arguments.linear}", FACTOR)
    ratios = local_ratios(graph, run.hidden, float16_layer_errors(reference, run.hidden, _say), _say)
    if ratios is None:
        print("a float32 artifact has no local ratios")
        return 1
    for index, ratio in enumerate(ratios):
        print(f"layer {index:3d}  {ratio:.3f}{'  × 1.01' if index == layer else ''}")
    beyond = [index for index, ratio in enumerate(ratios) if not ratio <= LIMIT]
    print(f"beyond {LIMIT}: {beyond or 'none'}; damaged: {layer}, {arguments.linear}; {time.perf_counter() - start:.0f} s")
    return 0 if beyond == [layer] else 1


def scale_linear(model: ir.Model, module: str, factor: float) -> None:
    """Multiply what leaves a linear, behind the cast that ends its float32 sum where it has one."""
    product = next(node for node in model.graph if node.op_type == "MatMul" and node.metadata_props.get(MODULE_KEY) == module)
    after = product.outputs[0].consumers()[0]
    value = after.outputs[0] if after.op_type == "Cast" else product.outputs[0]
    constant = ir.Value(name="saboteur", const_value=ir.tensor(np.float16(factor), name="saboteur"), type=value.type, shape=ir.Shape([]))
    model.graph.register_initializer(constant)
    users = list(value.uses())
    scaled = ir.node("Mul", [value, constant], name="saboteur.Mul", metadata_props={MODULE_KEY: module})
    scaled.outputs[0].name, scaled.outputs[0].type, scaled.outputs[0].shape = "saboteur.scaled", value.type, value.shape
    for node, index in users:
        node.replace_input_with(index, scaled.outputs[0])
    model.graph.append(scaled)
    model.graph.sort()


def _say(what: str, done: int, total: int) -> None:
    print(f"\r{what} ({done}/{total})", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
