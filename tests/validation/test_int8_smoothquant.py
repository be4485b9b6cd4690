"""int8-smoothquant.onnx of a tiny artifact: what is folded is exact, what is kept is weight-only, and strict mode runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.calibration import CALIBRATION
from artifact.errors import QuantizationError
from artifact.io_spec import OPSETS
from artifact.layout import layer_of
from artifact.manifest import fingerprint, read_manifest, write_manifest
from artifact.steps import StepContext, run_step
from engines.engine_graph import write_engine_graph
from exporter.checkpoints import Checkpoint, open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
from graphs.quantize.int8_smoothquant import SCHEME, quantize_int8_smoothquant
from graphs.quantize.linears import find_linears
from graphs.quantize.smoothing import unsmoothed
from graphs.quantize.statistics import Statistics
from validation.artifact_weights import artifact_reader
from validation.calibration import write_statistics
from validation.calibration_text import CalibrationText
from validation.calls import Turn, left_padded
from validation.graph_runner import GraphRunner, call_feeds
from validation.parity import validate_artifact
from validation.reference import Reference
from validation.strict import run_strict

IDS = np.random.default_rng(0).integers(3, 64, 48)
SEQUENCES = tuple(np.random.default_rng(seed).integers(3, 64, 80) for seed in range(1, 7))
MOST_OF_ROUNDING = 0.1
"""Relative error of logits: a model of this width loses 0.04 to 0.06 by rounding, factors that are not undone cost more."""
Quantised = tuple[Path, Checkpoint, dict[str, Any]]


def fused(folder: Path, checkpoint: Checkpoint) -> Path:
    """An artifact, fused and calibrated."""
    run_step(folder, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    run_step(folder, "fuse", {}, fuse_artifact)
    write_statistics(
        StepContext(folder), Reference(checkpoint.config, artifact_reader(folder)), CalibrationText(SEQUENCES, None, "ids", "", 1), "", CALIBRATION
    )
    return folder


def quantise(artifact: Path, **options: Any) -> dict[str, Any]:
    return quantize_int8_smoothquant(StepContext(artifact), Statistics(artifact / "calibration.safetensors"), **options)


def logits(artifact: Path, checkpoint: Checkpoint, stage: str) -> np.ndarray:
    return GraphRunner(artifact / f"{stage}.onnx", checkpoint.config, "fp16").logits(IDS).astype(np.float64)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root mean square, relative."""
    return float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))


@pytest.fixture(scope="module", params=[False, True], ids=["", "biases"])
def quantised(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    folder = tmp_path_factory.mktemp("smoothquant")
    checkpoint = open_checkpoint(str(make_checkpoint(folder / "checkpoint", attention_bias=request.param, mlp_bias=request.param)))
    artifact = fused(folder / "tiny", checkpoint)
    return artifact, checkpoint, quantise(artifact)


def test_every_linear_of_the_layers_is_an_island(quantised: Quantised) -> None:
    artifact, checkpoint, report = quantised
    graph = ir.load(artifact / f"{SCHEME}.onnx").graph
    layers = checkpoint.config.num_hidden_layers
    operators = [node.op_type for node in graph]
    assert operators.count("QuantizeLinear") == 4 * layers
    assert (report["quantized"], report["w8a8"]) == (4 * layers, {"linears": 4 * layers, "share": 1.0})
    assert [linear.name for linear in find_linears(graph)] == ["lm_head"]
    assert [kept["name"] for kept in report["kept"]] == ["model.embed_tokens", "lm_head"]
    assert {entry["site"].split(".", 3)[3] for entry in report["sites"]} == {
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
    }  # fmt: skip


def test_its_engine_graph_passes_by_being_equal_to_it(quantised: Quantised, tmp_path: Path) -> None:
    """No text is scored on an engine graph, and none has to be: its stage's own verdict stands on one."""
    artifact = Path(shutil.copytree(quantised[0], tmp_path / "built"))
    write_engine_graph(artifact / f"{SCHEME}.onnx", artifact / f"{SCHEME}-engine.onnx")
    report = validate_artifact(StepContext(artifact), checkpoint=quantised[1], stages=[f"{SCHEME}-engine"], text=None, tokens=None)
    (entry,) = report["stages"]
    assert {check["check"] for check in entry["checks"]} == {"engine_difference", "engine_structure"}
    assert entry["passed"] is True


def test_what_is_folded_changes_no_more_than_rounding_does(quantised: Quantised, tmp_path: Path) -> None:
    """Factors of 0.7 to 1.4 at every site: a norm, a row of v or up, or a bias that was not divided would be wrong by its factor."""
    artifact, checkpoint, report = quantised[0], quantised[1], quantised[2]
    artifact = Path(shutil.copytree(artifact, tmp_path / "folded"))
    statistics = Statistics(artifact / "calibration.safetensors")
    found = {}
    for seed, entry in enumerate(report["sites"]):
        measured = statistics.of(entry["site"])
        vector = 2 ** np.random.default_rng(seed).uniform(-0.5, 0.5, len(measured.absmax)).astype(np.float32)
        if entry["site"].endswith("o_proj"):  # two query heads a group share a factor
            vector = np.broadcast_to(vector.reshape(2, 2, 8)[:, :1], (2, 2, 8)).reshape(-1)
        found[entry["site"]] = replace(unsmoothed(measured), vector=vector, activation_scale=1.2 * float((measured.absmax / vector).max()) / 127)
    quantise(artifact, found=found)
    assert error(logits(artifact, checkpoint, SCHEME), logits(artifact, checkpoint, "fused")) < MOST_OF_ROUNDING


def test_norms_are_new_and_those_of_the_float_graph_are_left_alone(quantised: Quantised) -> None:
    artifact, checkpoint, _ = quantised
    stored = ir.load(artifact / f"{SCHEME}.onnx").graph.initializers
    norms = [name for name in stored if "layernorm" in name]
    assert len(norms) == 2 * checkpoint.config.num_hidden_layers
    assert all(name.endswith(".weight_smoothed") for name in norms)
    assert all(name in ir.load(artifact / "fused.onnx").graph.initializers for name in (norm.removesuffix("_smoothed") for norm in norms))


def test_strict_mode_runs_and_agrees_with_onnxruntime(quantised: Quantised) -> None:
    artifact, checkpoint, _ = quantised
    (call,) = left_padded([Turn((IDS,), (0,))])
    strict = run_strict(artifact / f"{SCHEME}.onnx", call_feeds(checkpoint.config, "fp16", call))
    assert strict.nonfinite == 0
    assert (
        error(strict.outputs["logits"][0].astype(np.float64), logits(artifact, checkpoint, SCHEME)) < 0.03
    )  # float16 moves some inputs over the middle between levels


def test_all_kept_is_weight_only_int8(quantised: Quantised, tmp_path: Path) -> None:
    artifact, checkpoint = Path(shutil.copytree(quantised[0], tmp_path / "kept")), quantised[1]
    names = [linear.name for linear in find_linears(ir.load(artifact / "fused.onnx").graph) if layer_of(linear.name) is not None]
    report = quantise(artifact, kept=dict.fromkeys(names, "for a test"))
    quantize_int8(StepContext(artifact), Statistics(artifact / "calibration.safetensors"))
    assert report["w8a8"] == {"linears": 0, "share": 0.0}
    assert {"name": names[0], "reason": "for a test"} in report["kept"]
    assert not [node for node in ir.load(artifact / f"{SCHEME}.onnx").graph if node.op_type == "QuantizeLinear"]
    np.testing.assert_array_equal(logits(artifact, checkpoint, SCHEME), logits(artifact, checkpoint, "int8"))


def test_one_kept_linear_is_weight_only_among_islands(quantised: Quantised, tmp_path: Path) -> None:
    artifact, checkpoint = Path(shutil.copytree(quantised[0], tmp_path / "kept")), quantised[1]
    report = quantise(artifact, kept={"model.layers.1.mlp.down_proj": "a spike"})
    graph = ir.load(artifact / f"{SCHEME}.onnx").graph
    assert [node.op_type for node in graph].count("QuantizeLinear") == 4 * checkpoint.config.num_hidden_layers - 1
    scale = graph.initializers["model.layers.1.mlp.down_proj.weight_scale"]
    assert scale.dtype == ir.DataType.FLOAT16
    assert 0.5 < report["w8a8"]["share"] < 1
    assert error(logits(artifact, checkpoint, SCHEME), logits(artifact, checkpoint, "fused")) < MOST_OF_ROUNDING


def test_refuses_to_keep_what_is_not_there(quantised: Quantised) -> None:
    with pytest.raises(QuantizationError, match=r"no linear model\.layers\.9\.mlp\.down_proj that could be kept"):
        quantise(quantised[0], kept={"model.layers.9.mlp.down_proj": "a guess"})


def test_refuses_to_round_activations_that_nobody_measured(quantised: Quantised) -> None:
    with pytest.raises(QuantizationError, match="rounds activations by scales that are measured"):
        quantize_int8_smoothquant(StepContext(quantised[0]), None)


def test_refuses_a_graph_that_is_quantised(quantised: Quantised, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(quantised[0], tmp_path / "twice"))
    (artifact / f"{SCHEME}.onnx").replace(artifact / "fused.onnx")
    manifest = read_manifest(artifact)
    manifest["steps"]["fuse"]["outputs"]["fused.onnx"] = fingerprint(artifact / "fused.onnx")
    write_manifest(artifact, manifest)
    with pytest.raises(QuantizationError, match="quantised already"):
        quantise(artifact)


def test_opset_has_what_the_form_needs(quantised: Quantised) -> None:
    assert ir.load(quantised[0] / f"{SCHEME}.onnx").graph.opset_imports[""] == OPSETS["dynamic"]
