"""The whole pipeline on graphs that the real exporter made: what fires, that the numbers stay, and what happens when something does not fire."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ArtifactError, FusionError, ParityMismatch
from artifact.layout import MODULE_KEY, PACKED, tensor_shapes
from artifact.manifest import fingerprint, read_manifest, write_manifest
from artifact.steps import StepContext, run_step
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import PIPELINES, fuse_artifact

pytestmark = pytest.mark.trace
LAYERS = 3
EXPECTED = {
    "rms_norm": 2 * LAYERS + 1,
    "rotary": 2 * LAYERS,
    "attention": LAYERS,
    "constant_shape": 4 * LAYERS,
    "pack_qkv": LAYERS,
    "pack_gate_up": LAYERS,
    "accumulate": 0,
}
SUMMED = 4 * LAYERS + 1
"""qkv, o, gate·up and down of every layer, and lm_head: where weights are float16, each adds up in float32."""
VARIANTS = {
    "grouped-untied-wide-fp32": ({"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}, "fp32"),
    "multi-head-tied-fp16": ({"num_key_value_heads": 4, "tie_word_embeddings": True}, "fp16"),
    "grouped-biased-yarn-fp32": (
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
        | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}},
        "fp32",
    ),
}
LAYER_FORM = Counter(
    # norms, packed qkv, rotary and cache, attention, o_proj, residuals, packed gate·up, SwiGLU, down_proj
    {"RMSNormalization": 2, "MatMul": 4, "Transpose": 7, "Reshape": 3, "Split": 3, "RotaryEmbedding": 2, "Concat": 2, "Attention": 1}
    | {"Mul": 3, "Squeeze": 2, "Sigmoid": 1, "Add": 2}
)
GROUPED_HEADS = Counter({"Reshape": 2})  # keys and values, before attention
CASTS = Counter({"Cast": 12})  # of what four linears multiply, and of their sums
BIASES = Counter({"Add": 4})
"""qkv_proj, o_proj, gate_up_proj, down_proj: packed projections have packed biases."""


@pytest.fixture(scope="module")
def fused(tmp_path_factory, make_checkpoint):
    """Variant name → (artifact with traced.onnx and fused.onnx, report); each is made once."""
    made = {}

    def make(variant):
        if variant not in made:
            fields, dtype = VARIANTS[variant]
            folder = tmp_path_factory.mktemp(variant)
            checkpoint = open_checkpoint(str(make_checkpoint(folder / "checkpoint", num_hidden_layers=LAYERS, **fields)))
            run_step(folder / "artifact", "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype=dtype))
            made[variant] = folder / "artifact", run_step(folder / "artifact", "fuse", {}, fuse_artifact).report
        return made[variant]

    return make


def config_of(artifact):
    return LlamaConfig(**read_manifest(artifact)["model"]["config"])


def operators(artifact, layer):
    """Operator counts of one decoder layer of fused.onnx."""
    prefix = f"model.layers.{layer}."
    return Counter(node.op_type for node in ir.load(artifact / "fused.onnx").graph if f"{node.metadata_props[MODULE_KEY]}.".startswith(prefix))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_fires_as_often_as_the_config_says(fused, variant) -> None:
    artifact, report = fused(variant)
    half = VARIANTS[variant][1] == "fp16"
    assert {rule["rule"]: rule["fired"] for rule in report["rules"]} == EXPECTED | ({"accumulate": SUMMED} if half else {})
    assert all(rule["fired"] == rule["expected"] and rule["refused"] == [] for rule in report["rules"])
    assert report["passed"] is True
    assert report["target"] == "tensorrt"
    assert (report["nodes_before"], report["nodes_after"]) == tuple(
        ir.load(artifact / f"{stage}.onnx").graph.num_nodes() for stage in ("traced", "fused")
    )
    assert (sum(report["ops_before"].values()), sum(report["ops_after"].values())) == (report["nodes_before"], report["nodes_after"])
    config = config_of(artifact)
    grouped = config.num_key_value_heads < config.num_attention_heads
    form = LAYER_FORM + (GROUPED_HEADS if grouped else Counter()) + (BIASES if config.attention_bias else Counter()) + (CASTS if half else Counter())
    assert [operators(artifact, layer) for layer in range(LAYERS)] == [form] * LAYERS


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_expanded_sliced_or_computed_twice(fused, variant) -> None:
    artifact, _ = fused(variant)
    graph = ir.load(artifact / "fused.onnx").graph
    kinds = Counter(node.op_type for node in graph)
    assert not {"Expand", "Softmax", "Where", "Pow", "ReduceMean", "Sub", "Slice"} & kinds.keys()
    assert (kinds["Range"], kinds["Or"], kinds["Gather"], kinds["Shape"]) == (2, 1, 1, 3)  # one mask; the embedding; S, P and T
    for node in graph:
        assert all(output.uses() or output.is_graph_output() for output in node.outputs)
        if node.op_type == "Split":
            rank = len(node.inputs[0].shape)
            assert node.attributes.get_int("axis") in range(rank - 1)
        if node.op_type == "Reshape":
            assert node.inputs[1].const_value is not None
        if node.op_type == "Attention":
            assert node.attributes.get_float("scale") == 1.0
            assert node.inputs[3].name == "model.Or"
    assert all(value.uses() for value in graph.initializers.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_packed_views_and_complete(fused, variant) -> None:
    artifact, _ = fused(variant)
    config = config_of(artifact)
    initializers = ir.load(artifact / "fused.onnx").graph.initializers
    traced = ir.load(artifact / "traced.onnx").graph.initializers
    stored = [value.const_value for value in initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
    assert (
        sum(tensor.size for tensor in stored)
        == sum(np.prod(shape) for shape in tensor_shapes(config).values()) + config.max_position_embeddings * config.head_dim
    )
    n_rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        packed = initializers[f"{prefix}self_attn.qkv_proj.weight"].const_value
        parts = [traced[f"{prefix}self_attn.{short}_proj.weight"].const_value.numpy() for short in "qkv"]
        assert tuple(packed.shape) == (n_rows, config.hidden_size)
        np.testing.assert_array_equal(packed.numpy(), np.concatenate(parts))
        packed = initializers[f"{prefix}mlp.gate_up_proj.weight"].const_value
        parts = [traced[f"{prefix}mlp.{name}_proj.weight"].const_value.numpy() for name in ("gate", "up")]
        assert tuple(packed.shape) == (2 * config.intermediate_size, config.hidden_size)
        np.testing.assert_array_equal(packed.numpy(), np.concatenate(parts))
        if config.attention_bias:
            for packed_name, names in PACKED.items():
                packed = initializers[f"{prefix}{packed_name}.bias"].const_value
                parts = [traced[f"{prefix}{name}.bias"].const_value for name in names]
                assert (packed.location, packed.offset) == (parts[0].location, parts[0].offset)
                np.testing.assert_array_equal(packed.numpy(), np.concatenate([part.numpy() for part in parts]))
    small = [value.const_value for value in initializers.values() if not isinstance(value.const_value, ir.ExternalTensor)]
    assert len({(tensor.dtype, tuple(tensor.shape), tensor.tobytes()) for tensor in small}) == len(small)


@pytest.mark.parametrize("variant", VARIANTS)
def test_interface_names_and_metadata_are_kept(fused, variant) -> None:
    artifact, _ = fused(variant)
    model = ir.load(artifact / "fused.onnx")
    traced = ir.load(artifact / "traced.onnx")
    for ours, theirs in ((model.graph.inputs, traced.graph.inputs), (model.graph.outputs, traced.graph.outputs)):
        assert [(value.name, value.dtype, value.shape) for value in ours] == [(value.name, value.dtype, value.shape) for value in theirs]
    assert dict(model.opset_imports) == dict(traced.opset_imports) == {"": io_spec.OPSETS["dynamic"]}
    assert all(set(node.metadata_props) == {MODULE_KEY} for node in model.graph)
    assert all(node.name.startswith(node.metadata_props[MODULE_KEY]) for node in model.graph)
    assert all(value.dtype is not None and value.shape is not None for node in model.graph for value in node.outputs)
    names = {node.name: (node.op_type, node.metadata_props[MODULE_KEY]) for node in model.graph}
    assert len(names) == model.graph.num_nodes()
    layer = "model.layers.2"
    assert names[f"{layer}.self_attn.Attention"] == ("Attention", f"{layer}.self_attn")
    assert names[f"{layer}.self_attn.qkv_proj.MatMul"] == ("MatMul", f"{layer}.self_attn.qkv_proj")
    assert names[f"{layer}.mlp.gate_up_proj.MatMul"] == ("MatMul", f"{layer}.mlp.gate_up_proj")
    assert names[f"{layer}.input_layernorm.RMSNormalization"] == ("RMSNormalization", f"{layer}.input_layernorm")
    assert names["model.norm.RMSNormalization"] == ("RMSNormalization", "model.norm")


def session(artifact, stage):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(artifact / f"{stage}.onnx", options, providers=["CPUExecutionProvider"])


def feeds(config, dtype, past, new, padding):
    """Random ids and cache, batch 2; the second row has ``padding`` positions of left padding."""
    generator = np.random.default_rng(0)
    attention_mask = np.ones((2, past + new), np.int64)
    attention_mask[1, :padding] = 0
    positions = np.maximum(attention_mask.cumsum(1) - 1, 0)
    shape = (2, config.num_key_value_heads, past, config.head_dim)
    cache = {io_spec.past_name(i, kind): generator.standard_normal(shape).astype(dtype) for i in range(LAYERS) for kind in io_spec.CACHE_KINDS}
    ids = generator.integers(0, config.vocab_size, (2, new))
    return {io_spec.INPUT_IDS: ids, io_spec.ATTENTION_MASK: attention_mask, io_spec.POSITION_IDS: positions[:, past:], **cache}


@pytest.mark.parametrize(
    ("past", "new", "padding"),
    [(0, 7, 0), (0, 7, 3), (5, 1, 0), (5, 4, 2), (5, 4, 7)],
    ids=["prefill", "padded-prefill", "decode", "chunked", "padded-over-the-past"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_cache_equal_those_of_the_traced_graph(fused, variant, past, new, padding) -> None:
    artifact, _ = fused(variant)
    dtype, tolerance = (np.float32, 1e-5) if variant.endswith("fp32") else (np.float16, 5e-3)
    inputs = feeds(config_of(artifact), dtype, past, new, padding)
    fused_values, traced_values = (session(artifact, stage).run(None, inputs) for stage in ("fused", "traced"))
    for fused_value, traced_value in zip(fused_values, traced_values, strict=True):
        assert fused_value.dtype == dtype
        assert fused_value.shape == traced_value.shape
        difference = np.abs(fused_value.astype(np.float32) - traced_value.astype(np.float32)).max()
        assert difference <= tolerance * np.abs(traced_value).max()


@pytest.fixture
def unfused(fused, tmp_path):
    """A copy of an artifact without fused.onnx, to be changed."""
    artifact, _ = fused("multi-head-tied-fp16")
    shutil.copytree(artifact, tmp_path / "artifact")
    (tmp_path / "artifact" / "fused.onnx").unlink()
    return tmp_path / "artifact"


def change_graph(artifact, change):
    """Rewrite traced.onnx as another exporter might have."""
    model = ir.load(artifact / "traced.onnx")
    change({node.name: node for node in model.graph}, model.graph.initializers)
    ir.save(model, artifact / "traced.onnx")
    manifest = read_manifest(artifact)
    manifest["steps"]["export"]["outputs"]["traced.onnx"] = fingerprint(artifact / "traced.onnx")
    write_manifest(artifact, manifest)


def move_key_weight(_, initializers):
    """The key weight of layer 1 lies elsewhere: in the file of layer 0."""
    weight = initializers["model.layers.1.self_attn.k_proj.weight"]
    weight.const_value = ir.ExternalTensor(
        initializers["model.layers.0.self_attn.k_proj.weight"].const_value.location,
        weight.const_value.offset,
        weight.const_value.length,
        weight.dtype,
        shape=weight.shape,
        name=weight.name,
    )


def soften_softmax(nodes, _):
    """The softmax of layer 2 is over the queries."""
    nodes["model.layers.2.self_attn.Softmax"].attributes["axis"] = ir.AttrInt64("axis", 2)


PARTIAL = [
    (
        move_key_weight,
        "pack_qkv",
        "fusion pack_qkv fired 2 times, expected 3",
        "model.layers.1.self_attn.k_proj.weight does not lie behind model.layers.1.self_attn.q_proj.weight",
    ),
    (
        soften_softmax,
        "attention",
        "fusion attention fired 2 times, expected 3",
        "model.layers.2.self_attn.Softmax: the softmax is not over the last axis",
    ),
]


@pytest.mark.parametrize(("change", "rule", "message", "reason"), PARTIAL, ids=["weights-apart", "softmax-axis"])
def test_partial_fusion_is_refused_and_nothing_is_written(unfused, change, rule, message, reason) -> None:
    change_graph(unfused, change)
    before = sorted(path.name for path in unfused.rglob("*"))
    with pytest.raises(ParityMismatch, match="fired 2 times") as failure:
        fuse_artifact(StepContext(unfused))
    assert failure.value.exit_code == 3
    assert message in str(failure.value)
    assert reason in str(failure.value)
    assert "--allow-partial" in str(failure.value.hint)
    assert sorted(path.name for path in unfused.rglob("*")) == before


@pytest.mark.parametrize(("change", "rule", "message", "reason"), PARTIAL, ids=["weights-apart", "softmax-axis"])
def test_partial_fusion_is_written_when_allowed(unfused, change, rule, message, reason) -> None:
    change_graph(unfused, change)
    report = fuse_artifact(StepContext(unfused), allow_partial=True)
    entry = next(entry for entry in report["rules"] if entry["rule"] == rule)
    assert (entry["fired"], entry["expected"], report["passed"]) == (2, 3, False)
    assert [reason.rsplit(": ", maxsplit=1)[-1] in refusal["reason"] for refusal in entry["refused"]] == [True]
    assert (unfused / "fused.onnx").is_file()
    session(unfused, "fused")


def test_a_model_of_another_depth_is_refused(unfused) -> None:
    """More fired than the config says is as wrong as fewer: the graph is not this model's."""
    manifest = read_manifest(unfused)
    assert manifest["model"]["config"]["num_hidden_layers"] == LAYERS
    path = unfused / "manifest.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(ParityMismatch, match="rms_norm fired 7 times, expected 5; no candidate is left"):
        fuse_artifact(StepContext(unfused))


def test_artifact_without_a_trace_names_the_command(unfused) -> None:
    (unfused / "traced.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"has no traced\.onnx") as failure:
        fuse_artifact(StepContext(unfused))
    assert "cli.py export" in str(failure.value.hint)


def test_unknown_target_is_refused(unfused) -> None:
    with pytest.raises(FusionError, match="no fusions for target 'openvino'; there are: tensorrt"):
        fuse_artifact(StepContext(unfused), target="openvino")


def test_fusing_never_opens_a_weight(unfused) -> None:
    """70B is fused where its weights are not: the files may be absent."""
    shutil.rmtree(unfused / "weights")
    assert fuse_artifact(StepContext(unfused))["passed"] is True


def test_fusing_twice_writes_the_same_bytes(unfused) -> None:
    texts = []
    for _ in range(2):
        fuse_artifact(StepContext(unfused))
        texts.append((unfused / "fused.onnx").read_bytes())
    assert texts[0] == texts[1]


def test_every_rule_has_an_expected_count() -> None:
    assert [fusion.rule for fusion in PIPELINES["tensorrt"]] == list(EXPECTED)
