"""graphs/quantize/blocks.py: which linears, which bytes, which numbers; ONNX Runtime's operator computes what the stored levels say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from artifact.errors import ArtifactError, QuantizationError
from artifact.layout import MODULE_KEY
from artifact.steps import StepContext
from artifact.tensor_file import plan_tensors, write_tensors
from graphs.quantize import blocks
from graphs.quantize.blocks import BlockScheme, quantize_blocks
from graphs.quantize.rounding import Format

E, F, V = 48, 40, 12
GRAPH = f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
g (float[B,{E}] x) => (float[B,{V}] y)
<float[{F},{E}] first, float[{V},{F}] head>
{{
    t = Transpose<perm=[1,0]>(first)
    a = MatMul(x, t)
    u = Transpose<perm=[1,0]>(head)
    y = MatMul(a, u)
}}"""
NAMES = {"first": "model.layers.0.mlp.up_proj.weight", "head": "model.embed_tokens.weight"}
MODULES = ["model.layers.0.mlp.up_proj"] * 2 + ["lm_head"] * 2
"""The tied lm_head's weight bears the embedding's name."""


@pytest.fixture
def step(tmp_path: Path) -> StepContext:
    """A folder with a two-linear fused-onnxruntime.onnx over external weights."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(NAMES.values(), ((F, E), (V, F)), strict=True)}
    weights[NAMES["first"]][2] = 0  # a block of zeros has no scale of its own
    return write(tmp_path, weights)


def write(folder: Path, weights: dict[str, np.ndarray]) -> StepContext:
    header, planned = plan_tensors("weights/x.safetensors", {name: ("F32", array.shape) for name, array in weights.items()})
    (folder / "weights").mkdir(parents=True)
    stored = write_tensors(folder / "weights" / "x.safetensors", header, planned, (memoryview(array).cast("B") for array in weights.values()))
    model = ir.from_onnx_text(GRAPH)
    for tensor in stored:
        value = next(value for node in model.graph for value in node.inputs if value.name in NAMES and NAMES[value.name] == tensor.name)
        value.name = tensor.name
        shape = ir.Shape(tensor.shape)
        value.const_value = ir.ExternalTensor(tensor.file, tensor.offset, tensor.length, ir.DataType.FLOAT, shape=shape, name=tensor.name)
        model.graph.initializers.add(value)
    for node, module in zip(model.graph, MODULES, strict=True):
        node.name, node.metadata_props[MODULE_KEY] = f"{module}.{node.op_type}", module
    ir.save(model, folder / blocks.SOURCE)
    return StepContext(folder)


def dequantized(model: ir.Model, node: ir.Node, folder: Path) -> np.ndarray:
    """[out, in] as the levels and scales say."""
    for value in node.inputs[1:]:
        value.const_value.base_dir = folder
    levels, scales = (value.const_value.numpy() for value in node.inputs[1:])
    bits, columns = node.attributes["bits"].value, node.attributes["K"].value
    if bits == 4:
        levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(*levels.shape[:2], -1)
    blocked = (levels.astype(np.float32) - (1 << (bits - 1))) * scales[:, :, None]
    return blocked.reshape(len(blocked), -1)[:, :columns]


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 1 / 127), ("int4", 1 / 7)])
def test_every_linear_is_stored_in_blocks_and_computed_so(step, scheme, bound):
    original = ir.load(step.artifact / blocks.SOURCE)
    report = quantize_blocks(step, scheme)
    assert (report["scheme"], report["target"], report["linears"], report["quantized"]) == (scheme, "onnxruntime", 2, 2)
    assert sum(report["formats"].values()) == 2
    model = ir.load(step.artifact / f"{scheme}-onnxruntime.onnx")
    first, head = model.graph
    for node, module, (rows, columns) in ((first, MODULES[0], (F, E)), (head, "lm_head", (V, F))):
        form = blocks.SCHEMES[scheme].of(module)
        assert {name: attribute.value for name, attribute in node.attributes.items()} == {
            "K": columns, "N": rows, "bits": form.bits, "block_size": form.block_size, "accuracy_level": 4,
        }  # fmt: skip
        assert (node.op_type, node.domain, node.metadata_props[MODULE_KEY]) == ("MatMulNBits", "com.microsoft", module)
        assert [value.name for value in node.inputs[1:]] == [f"{module}.weight_levels", f"{module}.weight_scales"]
        weight = original.graph.initializers[NAMES["head" if module == "lm_head" else "first"]].const_value.numpy()
        assert np.abs(dequantized(model, node, step.artifact) - weight).max() <= bound * np.abs(weight).max()
    assert not set(NAMES.values()) & model.graph.initializers.keys()
    x = np.random.default_rng(1).standard_normal((3, E)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(step.artifact / f"{scheme}-onnxruntime.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    exact = x @ dequantized(model, first, step.artifact).T @ dequantized(model, head, step.artifact).T
    np.testing.assert_allclose(y, exact, atol=0.03 * np.abs(exact).max())  # activations are rounded to int8 as well


def test_files_are_one_a_layer_and_one_for_the_rest_with_their_checksums(step):
    report = quantize_blocks(step, "int8")
    files = [
        "weights/int8-onnxruntime-checksums.json",
        "weights/int8-onnxruntime-layer-000.safetensors",
        "weights/int8-onnxruntime-shared.safetensors",
    ]
    assert sorted(step.outputs) == ["int8-onnxruntime.onnx", *files]
    entries = json.loads((step.artifact / files[0]).read_text())
    assert sum(entry["length"] for entry in entries.values()) == report["bytes"]
    assert {entry["dtype"] for entry in entries.values()} == {"U8", "F32"}


def test_format_of_a_module_is_the_first_exception_or_the_usual_one():
    scheme = BlockScheme(Format(4, 32), {"lm_head": Format(8, 64)})
    assert (scheme.of("lm_head"), scheme.of("model.layers.0.mlp.up_proj")) == (Format(8, 64), Format(4, 32))
    assert (Format(4, 32).blocks(33), Format(4, 32).blocks(64)) == (2, 2)


def test_refuses_nan_a_quantised_graph_and_a_missing_one(step, tmp_path):
    quantize_blocks(step, "int8")
    (step.artifact / "int8-onnxruntime.onnx").rename(step.artifact / blocks.SOURCE)
    with pytest.raises(QuantizationError, match=r"fused-onnxruntime\.onnx is quantised already"):
        quantize_blocks(step, "int8")
    bad = {name: np.full(shape, np.nan, np.float32) for name, shape in zip(NAMES.values(), ((F, E), (V, F)), strict=True)}
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or Inf in rows 0 … 39"):
        quantize_blocks(write(tmp_path / "bad", bad), "int4")
    with pytest.raises(ArtifactError, match=r"has no fused-onnxruntime\.onnx") as raised:
        quantize_blocks(StepContext(tmp_path / "none"), "int8")
    assert "fuse" in raised.value.hint
    assert "--target onnxruntime" in raised.value.hint


def test_refuses_a_graph_without_linears(step):
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> g (float[B] x) => (float[B] y) { y = Sigmoid(x) }')
    ir.save(model, step.artifact / blocks.SOURCE)
    with pytest.raises(QuantizationError, match="holds no MatMul by a constant weight"):
        quantize_blocks(step, "int8")
