"""What torch.onnx.export(dynamo=True) makes of a Hugging Face Llama, its cache as plain inputs and outputs, under the exporter's own names.

    python benchmarks/dynamo_llama.py CHECKPOINT OUT.onnx --opset 23 --dtype float16

CHECKPOINT is a Hugging Face folder; with ``--meta`` its config.json is enough: the graph is traced without weights, and those of OUT are holes of a
sparse file, of no use but to measure what a tool needs for a graph of that size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from export_dynamo import Flat, example
from onnxscript import optimizer
from transformers import AutoConfig, AutoModelForCausalLM

HOLES, LARGE_BYTES = "holes.data", 1024


def main() -> None:
    """Load, trace, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--opset", type=int, default=18)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--meta", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    device = "meta" if options.meta else "cpu"
    with torch.device(device):
        model = (
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.checkpoint), dtype=dtype)
            if options.meta
            else AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=dtype)
        )
        program = export(model.eval(), dtype, options.opset, optimize=not options.meta)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.meta:
        save_holes(program.model, options.out)
    else:
        program.save(options.out, external_data=True)


def export(model: torch.nn.Module, dtype: torch.dtype, opset: int, *, optimize: bool) -> torch.onnx.ONNXProgram:
    """The graph of a model with dynamic batch, tokens and past."""
    inputs, axes = example(model.config, dtype)
    program = torch.onnx.export(
        Flat(model).eval(), (), kwargs=inputs, dynamo=True, opset_version=opset, verbose=False, optimize=optimize, dynamic_shapes=axes
    )
    assert program is not None
    return program


def save_holes(model: ir.Model, out: Path) -> None:
    """Save a graph whose weights are zeros that take no disk; what the exporter could not optimise without weights is optimised now."""
    end = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= LARGE_BYTES:
            value.const_value = ir.ExternalTensor(HOLES, end, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=out.parent)
            end += tensor.nbytes
        elif isinstance(tensor.raw, torch.Tensor) and tensor.raw.is_meta:
            value.const_value = ir.tensor(np.zeros(tensor.shape.numpy(), tensor.dtype.numpy()), name=name)
    with (out.parent / HOLES).open("wb") as file:
        file.truncate(end)
    optimizer.optimize_ir(model, should_fold=lambda node: False if any(map(_is_hole, node.inputs)) else None)
    ir.save(model, out)


def _is_hole(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.const_value, ir.ExternalTensor)


if __name__ == "__main__":
    main()
