"""graphs/quantize/given_islands.py: static scales for a checkpoint that has none, where they don't cost a usual row too much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from artifact.errors import QuantizationError
from artifact.given import GIVEN_FILE, Given
from artifact.graph_file import load_graph
from artifact.layout import MODULE_KEY
from artifact.manifest import FORMAT, write_manifest
from artifact.steps import StepContext
from artifact.tensor_file import plan_tensors, write_tensors
from graphs.quantize.given_islands import MOST_LOST, median_row_error, quantize_given_islands
from graphs.quantize.statistics import FIELDS, Statistics

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[B,8] x) => (float[B,8] y)
<float[8,8] out, float[8,8] down>
{
    t = Transpose<perm=[1,0]>(out)
    a = MatMul(x, t)
    u = Transpose<perm=[1,0]>(down)
    y = MatMul(a, u)
}"""
OUT, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
NAMES = {"out": OUT, "down": DOWN}


def artifact(folder: Path, *, static: bool = False, quantised: bool = True) -> StepContext:
    """Two linears whose weights are level × scale."""
    rng = np.random.default_rng(0)
    levels = {module: rng.integers(-128, 128, (8, 8)).astype(np.int8) for module in NAMES.values()}
    scales = {module: rng.uniform(0.001, 0.01, (8, 1)).astype(np.float32) for module in NAMES.values()}
    weights = {f"{module}.weight": levels[module] * scales[module] for module in NAMES.values()}
    given = {f"{module}.weight_scale": scale for module, scale in scales.items()}
    if static:
        given |= {f"{module}.input_scale": np.array([0.5], np.float32) for module in NAMES.values()}
    (folder / "weights").mkdir(parents=True)
    header, planned = plan_tensors("weights/x.safetensors", {name: ("F32", (8, 8)) for name in weights})
    places = write_tensors(folder / "weights" / "x.safetensors", header, planned, (memoryview(array).cast("B") for array in weights.values()))
    save_file(given, folder / GIVEN_FILE)
    model = ir.from_onnx_text(GRAPH)
    for value in [value for node in model.graph for value in node.inputs if value is not None and value.name in NAMES]:
        value.name = f"{NAMES[str(value.name)]}.weight"
        place = next(place for place in places if place.name == value.name)
        value.const_value = ir.ExternalTensor(place.file, place.offset, place.length, ir.DataType.FLOAT, shape=ir.Shape((8, 8)), name=place.name)
        model.graph.initializers.add(value)
    for node, module in zip(model.graph, [OUT, OUT, DOWN, DOWN], strict=True):
        node.metadata_props[MODULE_KEY] = module
    ir.save(model, folder / "fused.onnx")
    record = {"quantization": Given("m", "f", 8, 0, "static" if static else "dynamic", 2).as_record()} if quantised else {}
    write_manifest(folder, {"format": FORMAT, "model": {"name": "x", "source": "/x", "dtype": "fp32", "config": {}} | record, "steps": {}})
    return StepContext(folder)


def measured(folder: Path, rows: dict[str, np.ndarray]) -> Statistics:
    """A calibration file of these rows."""
    tensors = {}
    for site, samples in rows.items():
        values = (np.abs(samples).max(axis=0), np.square(samples).mean(axis=0), samples.astype(np.float16), samples[:1].astype(np.float16))
        tensors |= {f"{site}.{field}": value.astype(value.dtype) for field, value in zip(FIELDS, values, strict=True)}
    save_file(tensors, folder / "calibration.safetensors")
    return Statistics(folder / "calibration.safetensors")


def test_largest_value_seen_becomes_127_and_a_site_with_a_spike_keeps_its_input(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    spiked = rows.copy()
    spiked[0, 3] = 5000
    step = artifact(tmp_path)
    report = quantize_given_islands(step, measured(tmp_path, {OUT: rows, DOWN: spiked}))
    out, down = report["sites"]
    assert out["activation_scale"] == pytest.approx(np.abs(rows).max() / 127, rel=1e-6)
    assert (out["kept"], down["kept"]) == (False, True)
    assert out["median_row_error"] < MOST_LOST < down["median_row_error"]
    assert report["w8a8"] == {"linears": 1, "share": 0.5}
    assert report["kept"][-1]["name"] == DOWN
    assert "one static scale would cost the median input 100% of its length" in report["kept"][-1]["reason"]
    counts = [node.op_type for node in load_graph(tmp_path / "int8-smoothquant.onnx").graph]
    assert (counts.count("QuantizeLinear"), counts.count("DequantizeLinear")) == (1, 3)


def test_row_error_is_that_of_rounding_and_clipping() -> None:
    rows = np.array([[1, 0.24], [0, 0], [200, 0]], np.float32)
    errors = [0.24 / np.hypot(1, 0.24), 73 / 200]
    assert median_row_error(rows, 1.0) == pytest.approx(np.median(errors), rel=1e-6)
    assert median_row_error(np.zeros((3, 2), np.float32), 1.0) == 0
    assert median_row_error(np.zeros((0, 2), np.float32), 1.0) == 0


def test_static_scales_need_no_statistics(tmp_path: Path) -> None:
    report = quantize_given_islands(artifact(tmp_path, static=True))
    assert [one["activation_scale"] for one in report["sites"]] == [0.5, 0.5]
    assert report["w8a8"]["linears"] == 2


def test_no_scale_and_no_statistics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=rf"{OUT}: the checkpoint has no scale of its input, and nothing was measured"):
        quantize_given_islands(artifact(tmp_path))


def test_artifact_of_an_unquantised_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="the checkpoint was not quantised"):
        quantize_given_islands(artifact(tmp_path, quantised=False))


def test_quantised_graph_is_not_quantised_again(tmp_path: Path) -> None:
    step = artifact(tmp_path, static=True)
    quantize_given_islands(step)
    (tmp_path / "int8-smoothquant.onnx").rename(tmp_path / "fused.onnx")
    with pytest.raises(QuantizationError, match=r"fused\.onnx is quantised already"):
        quantize_given_islands(step)
