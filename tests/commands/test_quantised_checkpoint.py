"""A checkpoint that another tool quantised, from the folder to the quantised graph: the integers in the graph are the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from artifact.config import LlamaConfig
from artifact.errors import QuantizationError, UsageError
from artifact.graph_file import load_graph
from artifact.layout import linear_shapes, members
from artifact.manifest import read_manifest
from artifact.steps import run_step
from commands.calibrate import CalibrationOptions
from commands.graphs import fuse, quantize
from commands.inspect import inspect
from commands.placement import PlacementOptions
from commands.summary import summarize
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.quantised_model import QuantisedCheckpoint
from exporter.export import export_checkpoint

PINNED = Path(__file__).parents[1] / "exporter" / "checkpoints" / "quantised"
LAYER = "model.layers.0"


def fused(name: str, folder: Path, dtype: str = "fp16") -> Path:
    run_step(folder, "export", {}, lambda step: export_checkpoint(step, open_checkpoint(str(PINNED / name)), dtype=dtype))  # type: ignore[arg-type]
    fuse(folder)
    return folder


def opened(name: str) -> QuantisedCheckpoint:
    checkpoint = open_checkpoint(str(PINNED / name))
    assert isinstance(checkpoint, QuantisedCheckpoint)
    return checkpoint


def stored(artifact: Path, graph: str, ending: str) -> dict[str, np.ndarray]:
    """Module → what a graph's initializer of that ending holds."""
    found = {}
    for name, value in load_graph(artifact / graph).graph.initializers.items():
        if name.endswith(ending) and value.const_value is not None:
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.base_dir = artifact
            found[name.removesuffix(ending)] = np.array(value.const_value.numpy())
    return found


def levels_of(checkpoint: QuantisedCheckpoint, module: str) -> np.ndarray:
    parts = [checkpoint.linears[member] for member in members(module)]
    return torch.cat([part.levels(0, part.shape[0]) for part in parts]).numpy()


@pytest.mark.trace
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["w8a16-pack", "w8a16-naive", "w8a16-tensor", "modelopt-w8a16"])
def test_int8_graph_holds_the_checkpoints_integers_and_scales(tmp_path: Path, name: str, dtype: str) -> None:
    artifact, checkpoint = fused(name, tmp_path / "art", dtype), opened(name)
    report = quantize(artifact).report
    assert (report["method"], report["given"]) == ("given", checkpoint.given.words)
    assert report["calibration"] == {"text": None, "reason": "the checkpoint was quantised, and its own integers and scales are taken"}
    lines = [sheet.title for sheet in summarize("quantize", report)]
    assert f"the checkpoint's own integers and scales: {checkpoint.given.words}" in lines
    assert not any("plain rounding" in line for line in lines)
    levels, scales = stored(artifact, "int8.onnx", ".weight_int8_t"), stored(artifact, "int8.onnx", ".weight_scale")
    assert sorted(levels) == [f"{LAYER}.{linear}" for linear in ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")]
    for module, found in levels.items():
        assert np.array_equal(found.T, levels_of(checkpoint, module)), module
        exact = np.concatenate([checkpoint.scales(member, 0, checkpoint.linears[member].shape[0]).numpy()[:, 0] for member in members(module)])
        assert np.array_equal(scales[module], exact.astype(scales[module].dtype)), module
    assert report["weight_error"]["worst_rms"] <= (1e-3 if dtype == "fp16" else 1e-7)


@pytest.mark.trace
def test_float_graphs_hold_level_times_scale_rounded_once(tmp_path: Path) -> None:
    artifact, checkpoint = fused("w8a16-pack", tmp_path / "art"), opened("w8a16-pack")
    weights = stored(artifact, "traced.onnx", ".weight")
    for linear in linear_shapes(checkpoint.config):
        part = checkpoint.linears[f"{LAYER}.{linear}"]
        exact = part.levels(0, part.shape[0]).double() * part.scales(0, part.shape[0]).double()
        assert np.array_equal(weights[f"{LAYER}.{linear}"], exact.numpy().astype(np.float16)), linear


@pytest.mark.trace
def test_linear_that_has_no_levels_stays_float_with_a_reason(tmp_path: Path) -> None:
    from exporter.checkpoints.pre_quant_scale import Folded

    checkpoint = opened("w8a16-pack")
    checkpoint.folded = Folded(columns={f"{LAYER}.self_attn.k_proj": torch.linspace(0.5, 2, 32)})
    run_step(tmp_path, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    fuse(tmp_path)
    report = quantize(tmp_path).report
    assert report["quantized"] == 3
    assert {"name": f"{LAYER}.self_attn.qkv_proj", "reason": "float in the checkpoint, it or a linear that is packed with it"} in report["kept"]


@pytest.mark.trace
def test_artifact_says_what_its_checkpoint_was_and_verifies(tmp_path: Path) -> None:
    artifact = fused("w8a16-pack", tmp_path / "art")
    quantize(artifact)
    model = read_manifest(artifact)["model"]
    assert model["format"] == "compressed-tensors pack-quantized"
    assert model["quantization"]["bits"] == 8
    assert LlamaConfig(**model["config"]) == opened("w8a16-pack").config
    report = inspect(str(artifact), verify=True)
    assert report["passed"], report["audit"]


@pytest.mark.trace
def test_another_scheme_or_a_calibration_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    artifact = fused("w8a16-pack", tmp_path / "art")
    before = sorted(artifact.rglob("*"))
    with pytest.raises(QuantizationError, match="int4 would round its weights a second time"):
        quantize(artifact, scheme="int4")
    with pytest.raises(QuantizationError, match="not for onnxruntime"):
        quantize(artifact, target="onnxruntime")
    with pytest.raises(UsageError, match="its own integers and scales are taken, and nothing is calibrated") as caught:
        quantize(artifact, calibration=CalibrationOptions(calibration_tokens=64))
    assert caught.value.hint == "leave out --calibration-tokens"
    assert sorted(artifact.rglob("*")) == before


def test_inspect_says_what_a_quantised_checkpoint_is() -> None:
    report = inspect(str(PINNED / "w4a16-pack"))
    assert report["kind"] == "checkpoint (compressed-tensors pack-quantized)"
    assert report["quantization"] == {
        **{"method": "compressed-tensors", "format": "pack-quantized", "bits": 4, "group_size": 32, "activations": "float", "quantized": 7},
        "scheme": "int4",
    }


@pytest.mark.trace
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(("name", "kept"), [("w4a16-pack", []), ("modelopt-w4a16", [f"{LAYER}.self_attn.o_proj"])])
def test_int4_graph_holds_the_checkpoints_integers_and_scales(tmp_path: Path, name: str, kept: list[str], dtype: str) -> None:
    artifact, checkpoint = fused(name, tmp_path / "art", dtype), opened(name)
    report = quantize(artifact, scheme="int4").report
    assert (report["method"], report["blocks"]) == ("given", {"32": 4 - len(kept)})
    assert [one["name"] for one in report["kept"]] == ["model.embed_tokens", *kept, "lm_head"]
    levels, scales = stored(artifact, "int4.onnx", ".weight_int4"), stored(artifact, "int4.onnx", ".weight_scale")
    assert len(levels) == 4 - len(kept)
    for module, found in levels.items():
        assert np.array_equal(found.astype(np.int8), levels_of(checkpoint, module)), module
        exact = np.concatenate([checkpoint.scales(member, 0, checkpoint.linears[member].shape[0]).numpy() for member in members(module)])
        assert np.array_equal(scales[module], exact.astype(scales[module].dtype)), module


@pytest.mark.trace
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(("name", "kept"), [("w8a8-static", []), ("modelopt-w8a8", [f"{LAYER}.self_attn.o_proj"])])
def test_w8a8_graph_holds_the_checkpoints_integers_and_all_of_its_scales(tmp_path: Path, name: str, kept: list[str], dtype: str) -> None:
    artifact, checkpoint = fused(name, tmp_path / "art", dtype), opened(name)
    report = quantize(artifact, scheme="int8-smoothquant").report
    assert report["w8a8"] == {"linears": 4 - len(kept), "share": 1.0}
    assert [one["name"] for one in report["kept"]] == ["model.embed_tokens", *kept, "lm_head"]
    levels, scales = (stored(artifact, "int8-smoothquant.onnx", f".weight_{part}") for part in ("int8", "scale"))
    assert len(levels) == 4 - len(kept)
    for module, found in levels.items():
        assert np.array_equal(found, levels_of(checkpoint, module)), module
        exact = np.concatenate([checkpoint.scales(member, 0, checkpoint.linears[member].shape[0]).numpy()[:, 0] for member in members(module)])
        assert scales[module].dtype == np.float32
        assert np.array_equal(scales[module], exact), module
    inputs = stored(artifact, "int8-smoothquant.onnx", ".activation_scale")
    assert inputs.keys() == levels.keys()
    for module, scale in inputs.items():
        assert [checkpoint.linears[member].input_scale() for member in members(module)] == [float(scale)] * len(members(module))
    assert inspect(str(artifact), verify=True)["passed"]


@pytest.mark.trace
def test_dynamic_w8a8_needs_a_text_for_its_static_scales(tmp_path: Path) -> None:
    artifact = fused("w8a8-dynamic", tmp_path / "art")
    with pytest.raises(QuantizationError, match="int8-smoothquant rounds activations by scales that are measured: --calibration none"):
        quantize(artifact, scheme="int8-smoothquant", calibration=CalibrationOptions(calibration="none"))


@pytest.mark.trace
@pytest.mark.parametrize(("name", "scheme"), [("w8a16-pack", "int8"), ("w8a8-dynamic", "int8-smoothquant")])
def test_nothing_is_placed_where_levels_came(tmp_path: Path, name: str, scheme: str) -> None:
    with pytest.raises(UsageError, match="there is nothing to place") as caught:
        quantize(fused(name, tmp_path / "art"), scheme=scheme, placement=PlacementOptions(max_perplexity_increase=1.0))
    assert caught.value.hint == "leave out --max-perplexity-increase"
