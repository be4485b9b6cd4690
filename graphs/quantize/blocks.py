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
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.graph_file import load_graph
from artifact.layout import MODULE_KEY, layer_of
from artifact.steps import StepContext, require
from artifact.tensor_file import StoredTensor, checksums_json, plan_tensors, write_tensors
from graphs.fusions._contrib import CONTRIB, CONTRIB_VERSION
from graphs.quantize.int8 import SAFETENSORS
from graphs.quantize.linears import Linear, find_linears
from graphs.quantize.rounding import Format, Round, pack, round_to_nearest

SOURCE = "fused-onnxruntime.onnx"
ROW_BLOCK_VALUES = 1 << 22
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
    "int4": BlockScheme(Format(4, 128), {"lm_head": NARROW_8, "down_proj": Format(4, 32)} | dict.fromkeys(QKV, Format(4, 64))),
}
"""Wide blocks are faster, narrow ones more exact, weights and activations alike; each exception is where width was measured to cost most."""


def quantize_blocks(step: StepContext, scheme: str, *, rounding: Round | None = None) -> dict[str, Any]:
    """Write ``<scheme>-onnxruntime.onnx`` and its weights from ``fused-onnxruntime.onnx``; the embedding is read as it is.

    Returns:
        scheme, target, linears, quantized, kept, formats (which → how many linears), bytes, nodes, weight_error (root mean square, relative to the
        weights').

    Raises:
        QuantizationError: the graph is quantised already, has no linears, or a weight holds NaN or Inf.
    """
    model = load_graph(require(step.artifact, SOURCE))
    if any(node.op_type == "MatMulNBits" for node in model.graph):
        raise QuantizationError(f"{SOURCE} is quantised already", hint=f"python cli.py fuse {step.artifact} --target onnxruntime --force")
    linears = list(find_linears(model.graph))
    if not linears:
        hint = f"python cli.py inspect {step.artifact}/{SOURCE}"
        raise QuantizationError(f"{SOURCE} holds no MatMul by a constant weight [out, in]", hint=hint)
    writer = _Writer(step, scheme, rounding or round_to_nearest)
    stored = {tensor.name: tensor for tensor in writer.write(linears)}
    for linear in linears:
        _replace(model.graph, linear, SCHEMES[scheme].of(module_of(linear)), stored)
    with step.write(f"{scheme}-onnxruntime.onnx") as temporary:
        ir.save(model, temporary)
    forms = Counter(SCHEMES[scheme].of(module_of(linear)) for linear in linears)
    worst = max(writer.errors, key=lambda name: writer.errors[name])
    return {
        "scheme": scheme,
        "target": "onnxruntime",
        "linears": len(linears),
        "quantized": len(linears),
        "kept": [{"name": "model.embed_tokens", "reason": "the embedding is looked up, not multiplied"}],
        "formats": {f"{form.bits} bits, blocks of {form.block_size}": count for form, count in forms.items()},
        "bytes": sum(tensor.length for tensor in stored.values()),
        "nodes": model.graph.num_nodes(),
        "weight_error": {"worst": worst, "worst_rms": writer.errors[worst], "mean_rms": sum(writer.errors.values()) / len(writer.errors)},
    }


def module_of(linear: Linear) -> str:
    """Module path of a linear; a tied lm_head's weight bears the embedding's name."""
    return linear.matmul.metadata_props.get(MODULE_KEY) or linear.name


@dataclass
class _Writer:
    """Writes the weights of all linears, one linear and one file a layer at a time, and keeps each one's error."""

    step: StepContext
    scheme: str
    rounding: Round
    errors: dict[str, float] = field(default_factory=dict)

    def write(self, linears: list[Linear]) -> list[StoredTensor]:
        stored: list[StoredTensor] = []
        for layer, group in groupby(linears, key=lambda linear: layer_of(module_of(linear))):
            part = "shared" if layer is None else f"layer-{layer:03d}"
            self.step.progress(f"quantising {part}", len(self.errors), len(linears))
            members, file = list(group), f"weights/{self.scheme}-onnxruntime-{part}.safetensors"
            header, planned = plan_tensors(file, self._shapes(members))
            with self.step.write(file) as temporary:
                stored += write_tensors(temporary, header, planned, self._data(members))
        with self.step.write(f"weights/{self.scheme}-onnxruntime-checksums.json") as temporary:
            temporary.write_text(checksums_json(stored), encoding="utf-8")
        return stored

    def _shapes(self, linears: list[Linear]) -> dict[str, tuple[str, tuple[int, ...]]]:
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for linear in linears:
            form, (rows, columns) = SCHEMES[self.scheme].of(module_of(linear)), _shape(linear)
            blocks = form.blocks(columns)
            shapes[_name(linear, "levels")] = ("U8", (rows, blocks, form.block_size * form.bits // 8))
            shapes[_name(linear, "scales")] = (SAFETENSORS[linear.weight.dtype or ir.DataType.FLOAT], (rows, blocks))
        return shapes

    def _data(self, linears: list[Linear]) -> Iterator[memoryview]:
        for linear in linears:
            tensor = linear.weight.const_value
            assert tensor is not None
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = self.step.artifact
            levels, scales = self._quantized(tensor.numpy(), module_of(linear))
            yield levels.data.cast("B")
            yield scales.data.cast("B")
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()

    def _quantized(self, weight: NDArray[Any], module: str) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        """Bytes and scales of one weight [out, in]; float32 copies of some rows at a time."""
        form, (rows, columns) = SCHEMES[self.scheme].of(module), weight.shape
        blocks = form.blocks(columns)
        packed = np.empty((rows, blocks, form.block_size * form.bits // 8), np.uint8)
        scales = np.empty((rows, blocks), weight.dtype)
        squared = total = 0.0
        for start in range(0, rows, height := max(1, ROW_BLOCK_VALUES // columns)):
            some = slice(start, start + height)
            exact = np.zeros((len(weight[some]), blocks * form.block_size), np.float32)
            exact[:, :columns] = weight[some]
            if not np.isfinite(exact).all():
                raise QuantizationError(f"{module}.weight holds NaN or Inf in rows {start} … {start + len(exact) - 1}")
            blocked = exact.reshape(-1, blocks, form.block_size)
            levels, scale = self.rounding(blocked, form)
            scales[some] = scale
            packed[some] = pack(levels, form)
            squared += float(np.square(levels * scales[some].astype(np.float32)[:, :, None] - blocked).sum())
            total += float(np.square(exact).sum())
        self.errors[module] = (squared / total) ** 0.5 if total else 0.0
        return packed, scales


def _shape(linear: Linear) -> tuple[int, int]:
    assert linear.weight.shape is not None
    rows, columns = linear.weight.shape.numpy()
    return int(rows), int(columns)


def _name(linear: Linear, what: str) -> str:
    return f"{module_of(linear)}.weight_{what}"


def _replace(graph: ir.Graph, linear: Linear, form: Format, stored: Mapping[str, StoredTensor]) -> None:
    """MatMulNBits in the place of the product; the float weight goes where nothing else reads it."""
    rows, columns = _shape(linear)
    operands = [linear.matmul.inputs[0]]
    for what, dtype in (("levels", ir.DataType.UINT8), ("scales", linear.weight.dtype or ir.DataType.FLOAT)):
        tensor = stored[_name(linear, what)]
        shape = ir.Shape(tensor.shape)
        data = ir.ExternalTensor(tensor.file, tensor.offset, tensor.length, dtype, shape=shape, name=tensor.name)
        value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(dtype), const_value=data)
        graph.initializers.add(value)
        operands.append(value)
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
