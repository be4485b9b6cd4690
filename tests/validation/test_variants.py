"""Every architecture variant through the whole chain, against the model that transformers itself loads from the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from artifact.steps import StepContext, run_step
from exporter.checkpoints import Checkpoint, open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
from validation.graph_runner import GraphRunner
from validation.parity import validate_artifact
from validation.scenarios import make_scenarios

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
"""Relative to the largest logit: an fp32 artifact's."""
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "mscale": 0.7, "mscale_all_dim": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "biases, tied, wide heads": BIASES | {"tie_word_embeddings": True, "head_dim": 16},
    "attention biases, linear": {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 20000.0}},
    "mlp biases, dynamic, multi-head": {"mlp_bias": True, "num_key_value_heads": 4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn, vocabulary padded": {"rope_scaling": YARN, "vocab_size": 80},
}
LENGTH = 96
"""Tokens: four times the original length of the scaled variants."""


def config_json(variant: dict[str, Any]) -> dict[str, Any]:
    """The variant's keys; a file of transformers 5 has no ``rope_theta`` beside ``rope_parameters``."""
    return variant | ({"rope_theta": None} if "rope_parameters" in variant else {})


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint folder, fp32 artifact with traced.onnx and fused.onnx)."""
    root = tmp_path_factory.mktemp("variant")
    folder = make_checkpoint(root / "checkpoint", **config_json(VARIANTS[request.param]))
    artifact = root / "artifact"
    checkpoint = open_checkpoint(str(folder))
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32"))
    assert run_step(artifact, "fuse", {}, fuse_artifact).report["passed"] is True
    return folder, artifact


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, LENGTH)


@pytest.mark.parametrize("stage", ["traced", "fused"])
def test_graph_equals_the_model_that_transformers_loads(variant: tuple[Path, Path], ids: np.ndarray, stage: str) -> None:
    folder, artifact = variant
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    config = open_checkpoint(str(folder)).config
    runner = GraphRunner(artifact / f"{stage}.onnx", config, "fp32")
    for scenario in make_scenarios(config, ids, ids[:50])[:3]:  # prefill, cached decode, chunked
        ours = runner.run(scenario)[0].logits
        assert np.abs(ours - expected).max() <= TOLERANCE * np.abs(expected).max(), scenario.name


def test_each_variant_is_another_model(make_checkpoint: Callable[..., Path], ids: np.ndarray, tmp_path: Path) -> None:
    """Without its scaling or its biases the same weights give other logits: the comparison above would see them dropped."""
    for number, (name, fields) in enumerate(VARIANTS.items()):
        if name.startswith("mlp biases, dynamic"):  # within the tables dynamic scaling changes nothing: tests/exporter/test_rope.py
            continue
        folder = make_checkpoint(tmp_path / str(number), **config_json(fields))
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(ids)[None]).logits
            for module in theirs.modules():
                if isinstance(module, torch.nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            rotary = theirs.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq.clone() * 0 + rotary.compute_default_rope_parameters(theirs.config)[0]
            rotary.attention_scaling = 1.0
            plain = theirs(torch.from_numpy(ids)[None]).logits
        assert (plain - expected).abs().max() > 100 * TOLERANCE * expected.abs().max(), name


@pytest.fixture(scope="module")
def biased(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """An fp16 artifact with biases and YaRN, quantised."""
    root = tmp_path_factory.mktemp("biased")
    checkpoint = open_checkpoint(str(make_checkpoint(root / "checkpoint", **BIASES, rope_scaling=YARN)))
    artifact = root / "artifact"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    run_step(artifact, "fuse", {}, fuse_artifact)
    run_step(artifact, "quantize-int8", {}, quantize_int8)
    return checkpoint, artifact


def test_int8_keeps_the_biases(biased: tuple[Checkpoint, Path]) -> None:
    _, artifact = biased
    fused, int8 = (ir.load(artifact / f"{stage}.onnx").graph.initializers for stage in ("fused", "int8"))
    biases = {name for name in fused if name.endswith(".bias")}
    assert len(biases) == 4 * 2  # packed qkv, o, packed gate·up, down of two layers
    for name in biases:
        ours, theirs = int8[name].const_value, fused[name].const_value
        assert isinstance(ours, ir.ExternalTensor)
        assert isinstance(theirs, ir.ExternalTensor)
        assert (ours.dtype, ours.location, ours.offset, ours.length) == (ir.DataType.FLOAT16, theirs.location, theirs.offset, theirs.length)


def test_validate_passes_a_biased_model_at_every_stage(biased: tuple[Checkpoint, Path]) -> None:
    checkpoint, artifact = biased
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=None, text=None, tokens=None)
    assert [stage["stage"] for stage in report["stages"]] == ["traced", "fused", "int8"]
    failed = {stage["stage"]: [check for check in stage["checks"] if check["passed"] is False] for stage in report["stages"]}
    assert failed == {"traced": [], "fused": [], "int8": []}
    assert report["passed"] is True
