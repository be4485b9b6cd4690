"""The pipeline for a static cache on graphs that the real exporter made: what fires, the form it leaves, the numbers, and the cache in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import FusionError
from artifact.layout import MODULE_KEY
from artifact.manifest import read_manifest
from artifact.steps import StepContext, run_step
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact, fuse_model

pytestmark = pytest.mark.trace
LAYERS, CAPACITY = 2, 32
EXPECTED = {
    "rms_norm": 2 * LAYERS + 1,
    "rotary": 2 * LAYERS,
    "attention": LAYERS,
    "constant_shape": 4 * LAYERS,
    "pack_qkv": LAYERS,
    "pack_gate_up": LAYERS,
    "accumulate": 0,
    "static_attention": LAYERS,
}
SUMMED = {"accumulate": 4 * LAYERS + 1}
"""Of float16: qkv, o, gate·up and down of every layer, and lm_head."""
LAYER_FORM = Counter(
    # norms, packed qkv, rotary, cache, attention, o_proj, residuals, packed gate·up, SwiGLU, down_proj
    {"RMSNormalization": 2, "MatMul": 4, "Transpose": 7, "Reshape": 3, "Split": 3, "RotaryEmbedding": 2, "TensorScatter": 2, "Attention": 1}
    | {"Mul": 3, "Squeeze": 2, "Sigmoid": 1, "Add": 2}
)
VARIANTS = {
    "grouped-untied-fp32": ({"num_key_value_heads": 2}, "fp32", LAYER_FORM + Counter({"Reshape": 2})),
    "multi-head-tied-biased-fp16": (
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "fp16",
        LAYER_FORM + Counter({"Add": 4, "Cast": 12}),  # biases; of what four linears multiply, and of their sums
    ),
}
CALLS = [([0, 0], 9), ([9, 4], 1), ([10, 5], 1), ([11, 6], 4), ([CAPACITY - 1, 10], 1)]
"""Write indices of two rows, and new tokens: a right-padded prefill of rows of 9 and 4, then steps, a chunk, and a step into the last slot."""
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Variant name → (artifact with traced.onnx and fused.onnx, report); each is made once."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(variant: str) -> tuple[Path, dict[str, Any]]:
        if variant not in made:
            fields, dtype, _ = VARIANTS[variant]
            folder = tmp_path_factory.mktemp(variant)
            checkpoint = open_checkpoint(str(make_checkpoint(folder / "checkpoint", num_hidden_layers=LAYERS, **fields)))
            run_step(folder / "artifact", "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype=dtype, kv_cache="static"))
            made[variant] = folder / "artifact", run_step(folder / "artifact", "fuse", {}, fuse_artifact).report
        return made[variant]

    return make


def config_of(artifact: Path) -> LlamaConfig:
    return LlamaConfig(**read_manifest(artifact)["model"]["config"])


def session(graph: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3  # it warns of every cache that it copies
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_fires_as_often_as_the_config_says(fused, variant) -> None:
    artifact, report = fused(variant)
    assert {rule["rule"]: rule["fired"] for rule in report["rules"]} == EXPECTED | (SUMMED if VARIANTS[variant][1] == "fp16" else {})
    assert all(rule["fired"] == rule["expected"] and rule["refused"] == [] for rule in report["rules"])
    nodes = ir.load(artifact / "fused.onnx").graph
    for layer in range(LAYERS):
        own = [node for node in nodes if f"{node.metadata_props[MODULE_KEY]}.".startswith(f"model.layers.{layer}.")]
        assert Counter(node.op_type for node in own) == VARIANTS[variant][2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_masks_and_positions_are_gone_and_the_capacity_stays_symbolic(fused, variant) -> None:
    artifact, _ = fused(variant)
    model, config = ir.load(artifact / "fused.onnx"), config_of(artifact)
    outside = Counter(node.op_type for node in model.graph if ".layers." not in node.metadata_props[MODULE_KEY])
    dtype = VARIANTS[variant][1]
    casts = {"Cast": 3} if dtype == "fp16" else {}
    assert outside == {"Gather": 1, "RMSNormalization": 1, "Transpose": 1, "MatMul": 1} | casts  # embedding, last norm, lm_head
    assert model.opset_imports[""] == io_spec.OPSETS["static"]
    for values, specs in (
        (model.graph.inputs, io_spec.graph_inputs(config, dtype, "static")),
        (model.graph.outputs, io_spec.graph_outputs(config, dtype, "static")),
    ):
        assert [(value.name, str(value.shape)) for value in values] == [(spec.name, f"[{','.join(map(str, spec.shape))}]") for spec in specs]
    for node in (node for node in model.graph if node.op_type == "Attention"):
        assert {name: attribute.value for name, attribute in node.attributes.items()} == {"is_causal": 1, "scale": 1.0}
        assert node.inputs[6].name == io_spec.KEY_VALUE_LENGTHS
    for node in (node for node in model.graph if node.op_type == "TensorScatter"):
        assert node.inputs[0].is_graph_input()
        assert node.outputs[0].is_graph_output()


def feeds(config: LlamaConfig, indices: list[int], new: int, seed: int) -> Arrays:
    starts = np.array(indices)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, new))
    positions = starts[:, None] + np.arange(new)
    return {"input_ids": ids, "position_ids": positions, "cache_write_indices": starts, "key_value_lengths": starts + new}


def caches(config: LlamaConfig, dtype: str) -> Arrays:
    """Slots that are not in use hold something finite."""
    shape = (2, config.num_key_value_heads, CAPACITY, config.head_dim)
    kinds = {"fp16": np.float16, "fp32": np.float32}
    names = [io_spec.past_name(layer, kind) for layer in range(LAYERS) for kind in io_spec.CACHE_KINDS]
    return {name: np.full(shape, 3.0, kinds[dtype]) for name in names}


@pytest.mark.parametrize(("variant", "tolerance"), [("grouped-untied-fp32", 1e-5), ("multi-head-tied-biased-fp16", 2**-8)])
def test_numbers_are_those_of_the_trace(fused, variant, tolerance) -> None:
    artifact, _ = fused(variant)
    config, past = config_of(artifact), caches(config_of(artifact), VARIANTS[variant][1])
    traced, ours = session(artifact / "traced.onnx"), session(artifact / "fused.onnx")
    for seed, (indices, new) in enumerate(CALLS):
        inputs = feeds(config, indices, new, seed)
        theirs_y, *presents = traced.run(None, {**inputs, **past})
        ours_y, *ours_presents = ours.run(None, {**inputs, **past})
        for mine, other in zip((ours_y, *ours_presents), (theirs_y, *presents), strict=True):
            assert np.abs(mine.astype(np.float32) - other).max() <= tolerance * np.abs(other).max()
        past = dict(zip(past, presents, strict=True))


def test_past_and_present_in_one_buffer_give_the_same_bits(fused) -> None:
    artifact, _ = fused("grouped-untied-fp32")
    config, runner = config_of(artifact), session(artifact / "fused.onnx")
    past = caches(config, "fp32")
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(cache.copy()) for name, cache in past.items()}
    for seed, (indices, new) in enumerate(CALLS):
        inputs = feeds(config, indices, new, seed)
        logits, *presents = runner.run(None, {**inputs, **past})
        past = dict(zip(past, presents, strict=True))
        binding = runner.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output(io_spec.LOGITS)
        runner.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.get_outputs()[-1].numpy(), logits)
        for name, cache in past.items():
            np.testing.assert_array_equal(buffers[name].numpy(), cache)


def test_a_target_without_static_rules_is_named(fused) -> None:
    artifact, _ = fused("grouped-untied-fp32")
    with pytest.raises(FusionError, match="no fusions for target 'openvino' with a static cache; there are: tensorrt, onnxruntime"):
        fuse_artifact(StepContext(artifact), target="openvino")


def test_an_older_release_is_refused_with_why_and_what_to_do(fused) -> None:
    artifact, _ = fused("grouped-untied-fp32")
    before = (artifact / "fused.onnx").read_bytes()
    with pytest.raises(FusionError, match=r"written in place by TensorScatter, which TensorRT takes from 10\.15 on") as caught:
        fuse_artifact(StepContext(artifact), min_tensorrt="10.14")
    assert caught.value.hint == "--min-tensorrt 10.15, or export into another folder with --kv-cache dynamic"
    assert (artifact / "fused.onnx").read_bytes() == before
    assert fuse_artifact(StepContext(artifact), min_tensorrt="10.15")["lowered"] == {}


def test_the_dynamic_pipeline_is_not_that_of_a_static_graph(fused) -> None:
    """The mask stays: what the static form adds is one rule."""
    artifact, report = fused("grouped-untied-fp32")
    model = ir.load(artifact / "traced.onnx")
    without = fuse_model(model, config_of(artifact), kv_cache="dynamic")
    assert [rule.rule for rule in without.rules] == list(EXPECTED)[:-1]
    assert {"Or", "Range"} <= without.ops_after.keys()
    assert report["nodes_after"] < without.nodes_after
