"""The onnxruntime target on graphs that the real exporter made: counts, form, numbers, quantised stages and what validate says of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ParityMismatch, QuantizationError
from artifact.layout import MODULE_KEY, layer_of
from artifact.manifest import read_manifest
from artifact.steps import StepContext, run_step
from commands import graphs
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.partition import cut_layer, cut_shared, cut_tail, part_boundaries
from validation.lone.report import validate_graph
from validation.manner import Manner
from validation.node_runner import run_nodes
from validation.parity import validate_artifact

pytestmark = pytest.mark.trace
LAYERS = 2
TRACED = {"rms_norm": 2 * LAYERS + 1, "rotary": 2 * LAYERS, "attention": LAYERS, "constant_shape": 4 * LAYERS}
EXPECTED = {
    "dynamic": TRACED | {"group_query_attention": LAYERS, "pack_rotated_qkv": LAYERS, "pack_sliced_gate_up": LAYERS, "skip_rms_norm": 2 * LAYERS},
    "static": TRACED
    | {"static_attention": LAYERS, "grouped_static_attention": LAYERS, "pack_grouped_qkv": LAYERS}
    | {"pack_sliced_gate_up": LAYERS, "skip_rms_norm": 2 * LAYERS},
}
GROUPED = {"tie_word_embeddings": True}
WIDE = {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True, "mlp_bias": True}
VARIANTS = {
    "grouped-tied-fp16": (GROUPED, "fp16", "dynamic"),
    "multi-head-wide-biased-fp32": (WIDE, "fp32", "dynamic"),
    "grouped-tied-fp16-static": (GROUPED | {"head_dim": 16}, "fp16", "static"),
    "multi-head-wide-biased-fp32-static": (WIDE, "fp32", "static"),
}
LAYER_FORM = Counter(
    {"MatMul": 4, "Transpose": 4, "GroupQueryAttention": 1, "SkipSimplifiedLayerNormalization": 2, "Split": 1, "Sigmoid": 1, "Mul": 2},
)
ROTATION = {"dynamic": Counter({"Reshape": 2, "RotaryEmbedding": 1}), "static": Counter()}
SHARED_CHOICES = {"dynamic": 3, "static": 0}
"""Where: the bias, and cosines and sines by head."""
BIASES = Counter({"Add": 4})
STAGES = ("fused-onnxruntime", "int8-onnxruntime", "int4-onnxruntime")


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_checkpoint):
    """Variant → (checkpoint, artifact with all stages of the target, report of fuse); each is made once."""
    known = {}

    def make(variant):
        if variant not in known:
            fields, dtype, kv_cache = VARIANTS[variant]
            folder = tmp_path_factory.mktemp(variant)
            checkpoint = open_checkpoint(str(make_checkpoint(folder / "checkpoint", num_hidden_layers=LAYERS, **fields)))
            artifact = folder / "artifact"
            run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype=dtype, kv_cache=kv_cache))
            report = graphs.fuse(artifact, target="onnxruntime").report
            for scheme in ("int8", "int4"):
                graphs.quantize(artifact, scheme=scheme, target="onnxruntime")
            known[variant] = checkpoint, artifact, report
        return known[variant]

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_fires_and_every_layer_has_the_form(made, variant):
    _, artifact, report = made(variant)
    *_, dtype, kv_cache = VARIANTS[variant]
    assert {rule["rule"]: (rule["fired"], rule["expected"]) for rule in report["rules"]} == {rule: (n, n) for rule, n in EXPECTED[kv_cache].items()}
    graph = ir.load(artifact / "fused-onnxruntime.onnx").graph
    form = LAYER_FORM + ROTATION[kv_cache] + (BIASES if "biased" in variant else Counter())
    for layer in range(LAYERS):
        found = Counter(node.op_type for node in graph if layer_of(node.metadata_props[MODULE_KEY]) == layer)
        begins = Counter({"RMSNormalization": 1, "SkipSimplifiedLayerNormalization": -1}) if layer == 0 else Counter()
        expected = form.copy()
        expected.update(begins)  # the first norm reads no sum
        assert found == expected
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    assert [value.name for value in graph.inputs] == [value.name for value in io_spec.graph_inputs(config, dtype, kv_cache)]
    assert [value.name for value in graph.outputs] == [value.name for value in io_spec.graph_outputs(config, dtype, kv_cache)]
    assert sum(node.op_type == "Where" for node in graph) == SHARED_CHOICES[kv_cache]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
def test_beside_each_stage_is_its_graph_of_one_position(made, variant, stage):
    """Of the last layer only attention reads and gives every position; the residual is gathered with its result."""
    _, artifact, report = made(variant)
    assert report["one_position"]["file"] == "fused-onnxruntime-engine.onnx"
    assert [name.rsplit(".", 2)[-2] for name in report["one_position"]["gathered"]] == ["GroupQueryAttention", "SkipSimplifiedLayerNormalization"]
    graph = ir.load(artifact / f"{stage}-engine.onnx").graph
    gathered = [node.inputs[0].producer().op_type for node in graph if node.name.startswith("last_position") and "Gather" in node.op_type]
    assert sorted(gathered) == ["GroupQueryAttention", "SkipSimplifiedLayerNormalization"]
    assert str(graph.outputs[0].shape) == "[batch_size,1,64]"
    assert ("last_token_indices" in {value.name for value in graph.inputs}) is ("static" in variant)
    report = read_manifest(artifact)["steps"][f"quantize-{stage}" if stage != STAGES[0] else "fuse-onnxruntime"]
    assert f"{stage}-engine.onnx" in report["outputs"]


def test_what_is_made_again_takes_its_graph_of_one_position_along(tmp_path, make_checkpoint):
    """The stage that the step has just written is read, not the one that the manifest still knows."""
    artifact = tmp_path / "artifact"
    for layers in (1, 2):
        checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / f"checkpoint-{layers}", num_hidden_layers=layers)))
        run_step(artifact, "export", {"layers": layers}, lambda step, source=checkpoint: export_checkpoint(step, source, dtype="fp32"))
        assert graphs.fuse(artifact, target="onnxruntime").reason
        assert graphs.quantize(artifact, scheme="int8", target="onnxruntime").reason
    assert graphs.fuse(artifact, target="onnxruntime").up_to_date


def test_steps_of_both_targets_stand_beside_each_other(made):
    _, artifact, _ = made("grouped-tied-fp16")
    graphs.fuse(artifact)
    assert graphs.fuse(artifact, target="onnxruntime").up_to_date
    assert graphs.quantize(artifact, scheme="int8", target="onnxruntime").up_to_date
    assert {"fuse", "fuse-onnxruntime", "quantize-int8-onnxruntime", "quantize-int4-onnxruntime"} <= read_manifest(artifact)["steps"].keys()
    (artifact / "fused.onnx").unlink()


def test_heads_that_the_operator_can_not_rotate_are_refused(tmp_path, make_checkpoint):
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, head_dim=8)))
    run_step(tmp_path / "artifact", "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32", kv_cache="static"))
    with pytest.raises(ParityMismatch, match="are not of a multiple of 16 elements, as the operator needs"):
        graphs.fuse(tmp_path / "artifact", target="onnxruntime")
    assert not (tmp_path / "artifact" / "fused-onnxruntime.onnx").exists()


def test_scheme_that_a_target_has_not_is_refused(made):
    _, artifact, _ = made("grouped-tied-fp16")
    known = "tensorrt: int8, int8-smoothquant, int4; onnxruntime: int8, int4"
    with pytest.raises(QuantizationError, match=f"no scheme 'int8-smoothquant' for target 'onnxruntime'; there are: {known}"):
        graphs.quantize(artifact, scheme="int8-smoothquant", target="onnxruntime")


@pytest.mark.parametrize("variant", VARIANTS)
def test_validate_measures_and_passes_every_stage(made, variant):
    checkpoint, artifact, _ = made(variant)
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=None, text=None, tokens=None)
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert list(stages) == ["traced", *(name for stage in STAGES for name in (stage, f"{stage}-engine"))]
    failed = [(name, check["check"], check["value"]) for name, stage in stages.items() for check in stage["checks"] if check["passed"] is False]
    assert failed == []
    assert stages["fused-onnxruntime"]["passed"] is True
    if "fp16" in variant:
        before, after = (stages[name]["strict_noise_ratio"] for name in ("traced", "fused-onnxruntime"))
        assert after <= 1.1 * before
        assert len(stages["fused-onnxruntime"]["local_ratios"]) == LAYERS


@pytest.mark.parametrize("variant", ["multi-head-wide-biased-fp32", "multi-head-wide-biased-fp32-static", "grouped-tied-fp16-static"])
def test_sound_stages_have_nothing_to_narrow(made, variant):
    checkpoint, artifact, _ = made(variant)
    stages = ["fused-onnxruntime", "int8-onnxruntime"]
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=stages, text=None, tokens=None, manner=Manner(bisect=True))
    found = {stage["stage"]: check["value"] for stage in report["stages"] for check in stage["checks"] if check["check"] == "narrowed_faults"}
    assert found == dict.fromkeys(stages, 0)


def test_a_fault_in_a_static_cache_is_narrowed_to_its_attention(made, tmp_path):
    """Slots in use are compared, though unused ones are not."""
    checkpoint, artifact, _ = made("multi-head-wide-biased-fp32-static")
    shutil.copytree(artifact, tmp_path / "artifact")
    graph = tmp_path / "artifact" / "fused-onnxruntime.onnx"
    model = onnx.load(graph, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention" and ".1." in node.name)
    next(attribute for attribute in node.attribute if attribute.name == "do_rotary").i = 0
    onnx.save(model, graph)
    manner = Manner(bisect=True)
    report = validate_artifact(StepContext(tmp_path / "artifact"), checkpoint=checkpoint, stages=[graph.stem], text=None, tokens=None, manner=manner)
    assert report["passed"] is False
    assert "present.1.key" in json.dumps(report)
    assert "fusion grouped_static_attention (2 of 2 fired)" in json.dumps(report)


def test_a_lone_graph_is_asked_for_padding_on_the_left(made, tmp_path):
    """Unlike graphs of peers: the mask's columns are a bias, and every token is rotated by its own position."""
    checkpoint, artifact, _ = made("multi-head-wide-biased-fp32")
    report = validate_graph(artifact / "fused-onnxruntime.onnx", checkpoint, out=tmp_path, text=None, tokens=None)
    assert (report["passed"], report["verdict"], report["not_run"]) == (True, "passed: 4 of 4 scenarios ran whole", [])


def test_past_and_present_in_one_buffer_give_the_same_tokens(made):
    """Bound in place, with room for more than is there, step by step."""
    _, artifact, _ = made("multi-head-wide-biased-fp32")
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    session = ort.InferenceSession(artifact / "fused-onnxruntime.onnx", providers=["CPUExecutionProvider"])
    ids, capacity, calls = np.arange(12)[None] % config.vocab_size, 20, (6, 1, 1, 4)
    shape = (1, config.num_key_value_heads, 0, config.head_dim)
    pasts = [value.name for value in io_spec.graph_inputs(config, "fp32")[3:]]
    presents = [value.name for value in io_spec.graph_outputs(config, "fp32")[1:]]
    grown = {name: np.zeros(shape, np.float32) for name in pasts}
    binding = session.io_binding()
    for past, present in zip(pasts, presents, strict=True):
        buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((*shape[:2], capacity, shape[3]), np.float32))
        binding.bind_ortvalue_input(past, buffer)
        binding.bind_ortvalue_output(present, buffer)
    start = 0
    for new in calls:
        end = start + new
        fed = {"input_ids": ids[:, start:end], "attention_mask": np.ones((1, end), np.int64), "position_ids": np.arange(start, end)[None]}
        expected, *caches = session.run(["logits", *presents], fed | grown)
        grown = dict(zip(pasts, caches, strict=True))
        for name, array in fed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        np.testing.assert_allclose(binding.get_outputs()[-1].numpy(), expected, rtol=1e-5, atol=1e-6)
        start = end


@pytest.mark.parametrize("variant", VARIANTS)
def test_boundaries_are_parted_where_the_graph_is_cut(made, variant):
    _, artifact, _ = made(variant)
    *_, dtype, kv_cache = VARIANTS[variant]
    model = ir.load(artifact / "fused-onnxruntime.onnx")
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    feeds = {"input_ids": np.arange(5)[None], "position_ids": np.arange(5)[None]}
    if kv_cache == "dynamic":
        feeds["attention_mask"] = np.ones((1, 5), np.int64)
    else:
        feeds |= {"cache_write_indices": np.array([0]), "key_value_lengths": np.array([5])}
    slots = {"dynamic": 0, "static": 8}[kv_cache]
    empty = np.zeros((1, config.num_key_value_heads, slots, config.head_dim), np.float16 if dtype == "fp16" else np.float32)
    feeds |= {past: empty for past, _ in io_spec.cache_names(config)}
    whole = run_nodes(model, feeds)
    assert part_boundaries(model) == LAYERS  # between two layers, and before the tail
    assert part_boundaries(model) == 0
    values = feeds | run_nodes(cut_shared(model), feeds)
    for cut in (*(cut_layer(model, layer) for layer in range(LAYERS)), cut_tail(model)):
        values |= run_nodes(cut, values)
    tolerance = 2e-3 if dtype == "fp16" else 1e-5
    for name, array in whole.items():
        np.testing.assert_allclose(values[name].astype(np.float32), array.astype(np.float32), rtol=tolerance, atol=tolerance)
