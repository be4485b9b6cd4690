"""Block-wise weights for ONNX Runtime: 8 or 4 bits, symmetric, one scale for each block of a row, in ``MatMulNBits``.

Before:  x ─ MatMul(Transpose(weight float [out, in]))
After:   x ─ MatMulNBits(levels uint8 [out, blocks, block · bits / 8], scales [out, blocks], K=in, N=out, bits, block_size, accuracy_level=4)

A row is filled up to whole blocks with zeros; rounding.py says how a level is stored. With accuracy level 4 activations are rounded to int8 too, a
scale for each block of that size: without it there is no fast kernel of 8 bits.
Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits; docs/adr/012
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.graph_file import load_graph
from artifact.layout import MODULE_KEY
from artifact.steps import StepContext, require
from artifact.tensor_file import StoredTensor
from graphs.fusions._contrib import CONTRIB, CONTRIB_VERSION
from graphs.quantize.linears import Linear, find_linears
from graphs.quantize.rounder import Rounder, rounding_report
from graphs.quantize.rounding import Format, pack
from graphs.quantize.statistics import Statistics
from graphs.quantize.writer import PACKED_VALUES, SAFETENSORS, Piece, add_initializer, read_mapped, row_slices, shape_of, write_pieces

SOURCE = "fused-onnxruntime.onnx"
LEVEL_4 = 4


@dataclass(frozen=True)
class BlockScheme:
    """Formats of a scheme: that of every linear, and the exceptions by the end of a module's path, with the reason in docs/adr/012."""

    usual: Format
    exceptions: Mapping[str, Format] = field(default_factory=dict)

    def of(self, module: str) -> Format:
        """The format of one linear."""
        return next((found for ending, found in self.exceptions.items() if module.endswith(ending)), self.usual)


QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj")
NARROW_8 = Format(8, 32)
SCHEMES: Mapping[str, BlockScheme] = {
    "int8": BlockScheme(Format(8, 64), dict.fromkeys((*QKV, "lm_head"), NARROW_8)),
    "int4": BlockScheme(Format(4, 128), {"lm_head": Format(4, 32), "down_proj": Format(4, 32)} | dict.fromkeys(QKV, Format(4, 64))),
}
"""Wide blocks are faster, narrow ones more exact, weights and activations alike; each exception is where width was measured to cost most."""


def open_fused_onnxruntime(artifact: Path) -> tuple[ir.Model, list[Linear]]:
    """``fused-onnxruntime.onnx`` and its linears.

    Raises:
        QuantizationError: the graph is quantised already, or has no linears.
    """
    model = load_graph(require(artifact, SOURCE))
    if any(node.op_type == "MatMulNBits" for node in model.graph):
        raise QuantizationError(f"{SOURCE} is quantised already", hint=f"python cli.py fuse {artifact} --target onnxruntime --force")
    linears = list(find_linears(model.graph))
    if not linears:
        hint = f"python cli.py inspect {artifact}/{SOURCE}"
        raise QuantizationError(f"{SOURCE} holds no MatMul by a constant weight [out, in]", hint=hint)
    return model, linears


def quantize_blocks(step: StepContext, scheme: str, statistics: Statistics | None = None) -> dict[str, Any]:
    """Write ``<scheme>-onnxruntime.onnx`` and its weights from ``fused-onnxruntime.onnx``; the embedding is read as it is.

    Args:
        step: the artifact.
        scheme: a name of ``SCHEMES``.
        statistics: what calibration measured of activations; None rounds plainly. Of lm_head nothing is measured.

    Returns:
        scheme, target, method, linears, quantized, kept, formats (which → how many linears), bytes, nodes, weight_error, output_error, rounded.

    Raises:
        QuantizationError: the graph is quantised already, has no linears; a weight holds NaN or Inf, or the statistics are of another model.
    """
    model, linears = open_fused_onnxruntime(step.artifact)
    rounder = Rounder(statistics)
    stored = write_pieces(step, f"{scheme}-onnxruntime", [_piece(step, linear, SCHEMES[scheme].of(module_of(linear)), rounder) for linear in linears])
    for linear in linears:
        _replace(model.graph, linear, SCHEMES[scheme].of(module_of(linear)), stored)
    with step.write(f"{scheme}-onnxruntime.onnx") as temporary:
        ir.save(model, temporary)
    forms = Counter(SCHEMES[scheme].of(module_of(linear)) for linear in linears)
    return {
        "scheme": scheme,
        "target": "onnxruntime",
        "linears": len(linears),
        "quantized": len(linears),
        "kept": [{"name": "model.embed_tokens", "reason": "the embedding is looked up, not multiplied"}],
        "formats": {f"{form.bits} bits, blocks of {form.block_size}": count for form, count in forms.items()},
        "bytes": sum(tensor.length for tensor in stored.values()),
        "nodes": model.graph.num_nodes(),
        **rounding_report(rounder),
    }


def module_of(linear: Linear) -> str:
    """Module path of a linear; a tied lm_head's weight bears the embedding's name."""
    return linear.matmul.metadata_props.get(MODULE_KEY) or linear.name


def _piece(step: StepContext, linear: Linear, form: Format, rounder: Rounder) -> Piece:
    """Bytes and scales of one linear."""
    module, (rows, columns), dtype = module_of(linear), shape_of(linear.weight), linear.weight.dtype or ir.DataType.FLOAT
    grid, blocks = form.grid(dtype.numpy()), form.blocks(columns)
    shapes = {"levels": ("U8", (rows, blocks, form.block_size * form.bits // 8)), "scales": (SAFETENSORS[dtype], (rows, blocks))}

    def make() -> Iterator[NDArray[Any]]:
        levels, scales = read_mapped(linear.weight, step.artifact, lambda weight: rounder.round(weight, module, grid))
        yield from (pack(grid.blocked(levels[some]), form) for some in row_slices(levels, PACKED_VALUES))
        yield scales.astype(dtype.numpy())

    return Piece(module, {_name(linear, what): shape for what, shape in shapes.items()}, make)


def _name(linear: Linear, what: str) -> str:
    return f"{module_of(linear)}.weight_{what}"


def _replace(graph: ir.Graph, linear: Linear, form: Format, stored: Mapping[str, StoredTensor]) -> None:
    """MatMulNBits in the place of the product; the float weight goes where nothing else reads it."""
    rows, columns = shape_of(linear.weight)
    operands = [linear.matmul.inputs[0]]
    for what, dtype in (("levels", ir.DataType.UINT8), ("scales", linear.weight.dtype or ir.DataType.FLOAT)):
        operands.append(add_initializer(graph, stored[_name(linear, what)], dtype))
    attributes = {"K": columns, "N": rows, "bits": form.bits, "block_size": form.block_size, "accuracy_level": LEVEL_4}
    old = linear.matmul.outputs[0]
    new = ir.Value(name=old.name, type=old.type, shape=old.shape)
    name = (linear.matmul.name or "").removesuffix("MatMul") + "MatMulNBits"
    node = ir.node("MatMulNBits", operands, attributes, domain=CONTRIB, outputs=[new], name=name, metadata_props=dict(linear.matmul.metadata_props))
    graph.opset_imports.setdefault(CONTRIB, CONTRIB_VERSION)
    ir.convenience.replace_nodes_and_values(graph, linear.matmul, [linear.matmul], [node], [old], [new])
    if not linear.transpose.outputs[0].uses():
        graph.remove(linear.transpose, safe=True)
    if not linear.weight.uses():
        del graph.initializers[str(linear.weight.name)]
