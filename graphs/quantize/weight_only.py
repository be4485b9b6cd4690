"""Weight-only schemes for TensorRT: levels and scales in the place of a linear's weight, activations untouched.

Before:  x ─ MatMul(Transpose(weight float [out, in]))
After:   x ─ MatMul(DequantizeLinear(levels [in, out], scale [out]))                     INT8
         x ─ MatMul(Transpose(DequantizeLinear(levels [out, in], scale [out, blocks])))  INT4
         The casts of a linear that adds up in float32 stay where they are.

The linears of the layers are quantised; embedding and lm_head keep their precision. Weights are read and written one at a time.
Source: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.graph_file import load_graph
from artifact.layout import MODULE_KEY, layer_of
from artifact.steps import StepContext, require
from artifact.tensor_file import StoredTensor
from graphs.quantize.given import NOT_GIVEN, GivenRounder, GivenScales, given_scales
from graphs.quantize.linears import Linear, find_linears
from graphs.quantize.rounder import Rounder, rounding_report
from graphs.quantize.rounding import FACTORS, Grid, Levels, largest_over, nibbles, turned
from graphs.quantize.statistics import Statistics
from graphs.quantize.writer import PACKED_VALUES, SAFETENSORS, Piece, add_initializer, elements, read_mapped, row_slices, shape_of, write_pieces

SOURCE = "fused.onnx"
OUTPUT = "the output layer keeps its precision"


@dataclass(frozen=True)
class Form:
    """How a scheme stores weights: symmetric, levels of ``dtype``.

    Attributes:
        scheme: its name, which is also the graph's.
        dtype: INT8 or INT4, two of which share a byte.
        low, high: levels.
        opset: the first in which DequantizeLinear reads them.
        block_of: name of a linear and its columns → columns that share a scale; raises QuantizationError. None: a whole row does.
    """

    scheme: str
    dtype: ir.DataType
    low: int
    high: int
    opset: int
    block_of: Callable[[str, int], int] | None = None

    def grid(self, name: str, columns: int, dtype: np.dtype[Any]) -> Grid:
        """Levels and scales of one linear; scales are rounded up to ``dtype`` before anything is rounded by them."""
        block = columns if self.block_of is None else self.block_of(name, columns)
        return Grid(self.low, self.high, block, largest_over(self.high, dtype), () if self.dtype == ir.DataType.INT8 else FACTORS)

    @property
    def turned(self) -> bool:
        """Whether levels are stored [in, out]: of INT8 the compiler wants them so, and would hold a turned copy of them all while it builds."""
        return self.dtype == ir.DataType.INT8

    def stored(self, levels: Levels) -> Iterator[NDArray[Any]]:
        """Levels [out, in] as their bytes, in blocks."""
        return turned(levels) if self.turned else (nibbles(levels[rows]) for rows in row_slices(levels, PACKED_VALUES))

    def levels_name(self, linear: Linear) -> str:
        """`….weight_int8_t`, `….weight_int4`."""
        return f"{linear.name}.weight_{self.dtype.name.lower()}{'_t' if self.turned else ''}"


def quantize_weights(step: StepContext, form: Form, statistics: Statistics | None = None, kept: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write ``<scheme>.onnx`` and ``weights/<scheme>-*.safetensors`` from ``fused.onnx``.

    Args:
        step: the artifact.
        form: the scheme.
        statistics: what calibration measured of activations; None rounds plainly.
        kept: linears of the layers that keep their precision → why.

    Returns:
        scheme, method, linears, quantized, kept, bytes, bytes_per_weight, nodes, blocks, weight_error, rounded; given (whose levels these are)
        where a quantised checkpoint brought them.

    Raises:
        QuantizationError: the graph is quantised already, has no linears or an opset that is too old; a weight holds NaN or Inf, or has no block
            that divides it; or the statistics are of another model.
    """
    model, linears, every = open_fused(step, form.scheme, form.opset)
    chosen = [linear for linear in every if linear.name not in (kept or {})]
    given = given_scales(step.artifact)
    rounder = Rounder(statistics) if given is None else GivenRounder(given=given)
    form = form if given is None else _in_groups(form, given)
    grids = {linear.name: form.grid(linear.name, shape_of(linear.weight)[1], _scale_dtype(linear).numpy()) for linear in chosen}
    stored = write_pieces(step, form.scheme, [_piece(step, linear, form, grids[linear.name], rounder) for linear in chosen])
    for linear in chosen:
        dequantize(model.graph, linear, form, grids[linear.name].block_size, stored)
    with step.write(f"{form.scheme}.onnx") as temporary:
        ir.save(model, temporary)
    size = sum(tensor.length for tensor in stored.values())
    return {
        "scheme": form.scheme,
        "linears": len(linears),
        "quantized": len(chosen),
        "kept": [*kept_always(linears, every), *({"name": name, "reason": reason} for name, reason in (kept or {}).items())],
        "bytes": size,
        "bytes_per_weight": round(size / elements(chosen), 4),
        "blocks": _blocks(form, grids),
        "nodes": model.graph.num_nodes(),
        **rounding_report(rounder),
        **({} if given is None else {"method": "given", "given": given.given.words}),
    }


def open_fused(step: StepContext, scheme: str, opset: int) -> tuple[ir.Model, list[Linear], list[Linear]]:
    """``fused.onnx``, its linears, and those of the layers; of a quantised checkpoint, those that came with levels.

    Raises:
        QuantizationError: the graph is quantised already, is of an older opset, or has no linears in its layers.
    """
    model = load_graph(require(step.artifact, SOURCE))
    if any(node.op_type in ("DequantizeLinear", "QuantizeLinear") for node in model.graph):
        raise QuantizationError(f"{SOURCE} is quantised already", hint=f"python cli.py fuse {step.artifact} --force")
    found = model.opset_imports.get("", 0)
    if found < opset:
        message = f"{scheme} needs opset {opset}, {SOURCE} is of opset {found}: it was fused for an older TensorRT"
        raise QuantizationError(message, hint=f"python cli.py fuse {step.artifact} --force")
    linears = list(find_linears(model.graph))
    given = given_scales(step.artifact)
    chosen = [linear for linear in linears if layer_of(linear.name) is not None and (given is None or given.covers(linear.name))]
    if not chosen:
        hint = f"python cli.py inspect {step.artifact}/{SOURCE}"
        raise QuantizationError(f"{SOURCE} holds no MatMul by a constant weight [out, in] in a decoder layer", hint=hint)
    return model, linears, chosen


def kept_always(linears: list[Linear], chosen: list[Linear]) -> list[dict[str, str]]:
    """What is not quantised whatever the scheme for TensorRT, and why."""
    outside = {linear.matmul.metadata_props.get(MODULE_KEY, linear.name): layer_of(linear.name) for linear in linears if linear not in chosen}
    embedding = {"name": "model.embed_tokens", "reason": "the embedding is looked up, not multiplied"}
    return [embedding, *({"name": name, "reason": OUTPUT if layer is None else NOT_GIVEN} for name, layer in outside.items())]


def _blocks(form: Form, grids: Mapping[str, Grid]) -> dict[str, int]:
    """How many linears have blocks of which size."""
    return {} if form.block_of is None else {str(size): count for size, count in Counter(grid.block_size for grid in grids.values()).items()}


def _in_groups(form: Form, given: GivenScales) -> Form:
    """The form with blocks that divide the checkpoint's groups too."""
    block_of = form.block_of
    return form if block_of is None else replace(form, block_of=lambda name, columns: block_of(name, gcd(columns, given.given.group_size)))


def _scale_dtype(linear: Linear) -> ir.DataType:
    return linear.weight.dtype or ir.DataType.FLOAT16


def _piece(step: StepContext, linear: Linear, form: Form, grid: Grid, rounder: Rounder) -> Piece:
    """A linear's levels and scales."""
    (rows, columns), scales = shape_of(linear.weight), _scale_dtype(linear)
    levels_form = ("I8", (columns, rows)) if form.turned else ("U8", (rows, columns // 2))
    scale_shape = (rows,) if form.block_of is None else (rows, grid.blocks(columns))

    def make() -> Iterator[NDArray[Any]]:
        levels, scale = read_mapped(linear.weight, step.artifact, lambda weight: rounder.round(weight, linear.name, grid))
        yield from form.stored(levels)
        yield scale.reshape(scale_shape).astype(scales.numpy())

    return Piece(linear.name, {form.levels_name(linear): levels_form, f"{linear.name}.weight_scale": (SAFETENSORS[scales], scale_shape)}, make)


def dequantize(graph: ir.Graph, linear: Linear, form: Form, block: int, stored: Mapping[str, StoredTensor]) -> None:
    """Put the stored levels and DequantizeLinear where the weight was; of turned ones, where its transpose was."""
    rows, columns = shape_of(linear.weight)
    shape = (columns, rows) if form.turned else (rows, columns)
    operands = [
        add_initializer(graph, stored[form.levels_name(linear)], form.dtype, shape),
        add_initializer(graph, stored[f"{linear.name}.weight_scale"], _scale_dtype(linear)),
    ]
    output = ir.Value(name=f"{linear.name}.DequantizeLinear", shape=ir.Shape(shape), type=linear.weight.type)
    attributes = {"axis": 1} if form.block_of is None else {"axis": 1, "block_size": block}
    node = ir.node("DequantizeLinear", operands, attributes, outputs=[output], name=output.name, metadata_props={MODULE_KEY: linear.name})
    graph.insert_before(linear.transpose, node)
    if form.turned:
        linear.transpose.outputs[0].replace_all_uses_with(output)
        graph.remove(linear.transpose, safe=True)
    else:
        linear.transpose.replace_input_with(0, output)
    if not linear.weight.uses():
        del graph.initializers[str(linear.weight.name)]
