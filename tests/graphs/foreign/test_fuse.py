"""Graphs of other exporters, pinned: what fires, that the numbers and the names stay, and what is written."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from artifact.errors import FusionError, ParityMismatch
from artifact.io_spec import BATCH, CAPACITY
from artifact.steps import StepContext
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs import pipeline
from graphs.foreign.fuse import PACKING, PIPELINES, fuse_graph
from validation.node_runner import run_nodes
from validation.strict import run_strict

LAYERS = 2
SHAPE = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 32,
}
FIRED = {"rms_norm": 2 * LAYERS + 1, "rotary": 2 * LAYERS, "attention": LAYERS, "constant_shape": 4 * LAYERS, "accumulate": 0}
FIRED |= {"pack_qkv": 0, "pack_gate_up": 0}
FLOAT32 = ["dynamo-18-eager-float32", "dynamo-18-sdpa-float32", "dynamo-23-sdpa-float32", "optimum-14", "optimum-18"]
FLOAT16 = ["dynamo-18-eager-float16", "optimum-18-float16"]
HALF_FUSED = "dynamo-23-sdpa-float32"
"""torch's exporter writes norms and rotations in their fused form at opset 23, and attention with repeated heads and another scale."""
SCENARIOS = ["prefill", "batch", "decode", "chunk", "left-padded", "left-padded-decode"]


@pytest.mark.parametrize("name", [*FLOAT32, *FLOAT16])
def test_every_rule_fires_as_often_as_the_graph_says(pinned, fused, name) -> None:
    out, report = fused(pinned(name))
    already = {"rms_norm": 2 * LAYERS + 1, "rotary": 2 * LAYERS} if name == HALF_FUSED else {}
    half = {"accumulate": 7 * LAYERS + 1} if name.endswith("float16") else {}  # q, k, v, o, gate, up, down; lm_head
    if name == "optimum-18-float16":
        half = {"accumulate": 6 * LAYERS + 1}  # its o_proj is float32
    expected = {rule: count - already.get(rule, 0) for rule, count in (FIRED | half).items()}
    assert {rule["rule"]: rule["fired"] for rule in report["rules"]} == expected
    assert {rule["rule"]: rule["expected"] for rule in report["rules"]} == expected
    assert all(rule["refused"] == [] for rule in report["rules"] if not rule["rule"].startswith("pack"))
    assert report["passed"] is True
    assert report["model"] == SHAPE
    assert report["nothing_to_do"] == ""
    assert report["nodes_after"] == ir.load(out).graph.num_nodes() < report["nodes_before"]


@pytest.mark.parametrize("name", FLOAT32)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_numbers_stay(pinned, fused, tools, name, scenario) -> None:
    out, _ = fused(pinned(name))
    assert tools["worst_difference"](pinned(name), out, tools["scenarios"][scenario]) <= 1e-5


@pytest.mark.parametrize("name", FLOAT16)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_float16_numbers_stay_within_its_rounding(pinned, fused, tools, name, scenario) -> None:
    """The scale is rounded with the query, not with the scores; a wrong head or position would be off by 1."""
    out, _ = fused(pinned(name))
    assert tools["worst_difference"](pinned(name), out, tools["scenarios"][scenario]) <= 2**-7


@pytest.mark.parametrize("name", FLOAT16)
def test_float16_noise_does_not_grow(pinned, fused, tools, name) -> None:
    """Against the same graph in float32, every operation rounded; ONNX Runtime on CPU would compute most of a whole graph in float32."""
    before, after = ir.load(pinned(name)), ir.load(fused(pinned(name))[0])
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(before)  # a mask's -inf is no result
    noise = {"before": [], "after": []}
    for scenario in ("prefill", "batch", "decode", "chunk"):
        made = tools["feeds"](pinned(name), tools["scenarios"][scenario])
        exact = run_nodes(before, made, float32=True)["logits"]
        for which, model in (("before", before), ("after", after)):
            strict = run_strict(model, made)
            assert strict.nonfinite == 0
            noise[which].append(np.abs(strict.outputs["logits"].astype(np.float64) - exact).mean())
    assert 0 < np.mean(noise["after"]) <= 1.1 * np.mean(noise["before"])


@pytest.mark.parametrize("name", FLOAT32)
def test_inputs_and_outputs_stay(pinned, fused, tools, name) -> None:
    out, _ = fused(pinned(name))
    assert tools["interface"](out) == tools["interface"](pinned(name))


@pytest.mark.parametrize("name", FLOAT32)
def test_one_mask_one_rotation_and_nothing_expanded(pinned, fused, name) -> None:
    out, _ = fused(pinned(name))
    graph = ir.load(out).graph
    kinds = Counter(node.op_type for node in graph)
    assert not {"Softmax", "Pow", "ReduceMean", "Neg", "IsNaN", "Slice", "Identity", "Constant"} & kinds.keys()
    assert (kinds["Cos"], kinds["Sin"], kinds["Or"]) == (1, 1, 1)
    for node in graph:
        if node.op_type == "Attention":
            assert {key: attribute.value for key, attribute in node.attributes.items()} == {"scale": 1.0}
            assert [value.producer().op_type for value in node.inputs] == ["Mul", "Concat", "Concat", "Or"]
        if node.op_type == "RotaryEmbedding":
            assert [value.producer().op_type for value in node.inputs[1:]] == ["Cos", "Sin"]
        assert all(output.uses() or output.is_graph_output() for output in node.outputs)
        assert node.domain == ""
    assert ir.load(out).opset_imports == {"": 23}
    assert all(value.uses() for value in graph.initializers.values())


@pytest.mark.parametrize("name", FLOAT32)
def test_no_row_is_fully_masked(pinned, fused, name, tmp_path) -> None:
    """Ask for the mask itself: the padded rows of a left-padded batch attend to themselves."""
    import onnxruntime as ort

    model = ir.load(fused(pinned(name))[0])
    mask = next(node.outputs[0] for node in model.graph if node.op_type == "Or")
    mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([None, None, None, None])
    model.graph.outputs.append(mask)
    ir.save(model, tmp_path / "mask.onnx")
    graph = ort.InferenceSession(tmp_path / "mask.onnx", providers=["CPUExecutionProvider"])
    new, past = 3, 2
    padded = np.array([[0, 0, 0, 1, 1]])
    made = {"input_ids": np.zeros((1, new), np.int64), "attention_mask": padded, "position_ids": np.array([[0, 0, 1]])}
    for value in graph.get_inputs()[3:]:
        made[value.name] = np.zeros((1, 2, past, 8), np.float32)
    (allowed,) = graph.run([mask.name], made)
    np.testing.assert_array_equal(allowed[0, 0], [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]])


@pytest.mark.parametrize("padding", [0, 5])
def test_a_graph_without_cache_and_positions_is_fused(pinned, fused, tools, padding) -> None:
    """Multi-head attention, T = S, one count of positions for all sequences."""
    out, report = fused(pinned("dynamo-18-bare"))
    assert {rule["rule"]: rule["fired"] for rule in report["rules"]} == FIRED
    assert report["model"] == SHAPE | {"num_key_value_heads": 4}
    scenario = tools["scenarios"]["left-padded" if padding else "batch"]
    assert tools["worst_difference"](pinned("dynamo-18-bare"), out, scenario) <= 1e-5


def test_linears_that_stay_apart_are_named(pinned, fused) -> None:
    _, report = fused(pinned("optimum-18"))
    refused = {rule["rule"]: rule["refused"] for rule in report["rules"]}
    _, half = fused(pinned("dynamo-18-eager-float16"))  # their casts are apart, what is cast is one
    assert [len(rule["refused"]) for rule in half["rules"] if rule["rule"].startswith("pack")] == [LAYERS, LAYERS]
    assert [refusal["node"] for refusal in refused["pack_qkv"]] == [f"/model/layers.{layer}/self_attn/q_proj/MatMul" for layer in range(LAYERS)]
    assert [refusal["node"] for refusal in refused["pack_gate_up"]] == [f"/model/layers.{layer}/mlp/gate_proj/MatMul" for layer in range(LAYERS)]
    assert "not packed" in refused["pack_qkv"][0]["reason"]


def test_graph_fused_for_another_runtime_is_left_alone(pinned, tmp_path) -> None:
    report = fuse_graph(pinned("genai"), tmp_path / "out.onnx")
    assert report["nothing_to_do"] == "attention is com.microsoft::GroupQueryAttention already: it was fused for ONNX Runtime"
    assert (report["passed"], report["rules"], report["out"]) == (True, [], None)
    assert report["nodes_before"] == report["nodes_after"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["optimum-18", "dynamo-18-eager-float16"])
def test_graph_that_was_fused_here_is_left_alone(pinned, fused, tmp_path, name) -> None:
    out, _ = fused(pinned(name))
    report = fuse_graph(out, tmp_path / "again.onnx")
    assert report["nothing_to_do"] == "every operator is in its fused form already"
    assert list(tmp_path.iterdir()) == []


def spoil_one_softmax(path, out):
    """The soft-max of the second layer is over the queries."""
    model = ir.load(path)
    softmax = [node for node in model.graph if node.op_type == "Softmax"][1]
    softmax.attributes["axis"] = ir.AttrInt64("axis", 2)
    ir.save(model, out)
    return softmax.name


def test_partial_fusion_is_refused_and_nothing_is_written(pinned, tmp_path) -> None:
    node = spoil_one_softmax(pinned("dynamo-18-eager-float32"), tmp_path / "spoiled.onnx")
    with pytest.raises(ParityMismatch, match="fusion attention fired 1 times, expected 2") as failure:
        fuse_graph(tmp_path / "spoiled.onnx", tmp_path / "out.onnx")
    assert f"{node}: the soft-max is not over the last axis" in str(failure.value)
    assert failure.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.onnx"]


def test_partial_fusion_is_written_when_allowed(pinned, tools, tmp_path) -> None:
    spoil_one_softmax(pinned("dynamo-18-eager-float32"), tmp_path / "spoiled.onnx")
    report = fuse_graph(tmp_path / "spoiled.onnx", tmp_path / "out.onnx", allow_partial=True)
    assert report["passed"] is False
    assert tools["worst_difference"](tmp_path / "spoiled.onnx", tmp_path / "out.onnx", tools["scenarios"]["batch"]) <= 1e-5


def test_fusing_twice_writes_the_same_bytes(pinned, tmp_path) -> None:
    for name in ("one", "two"):
        fuse_graph(pinned("optimum-18"), tmp_path / name / "out.onnx")
    assert (tmp_path / "one" / "out.onnx").read_bytes() == (tmp_path / "two" / "out.onnx").read_bytes()


def test_unknown_target_is_refused(pinned, tmp_path) -> None:
    with pytest.raises(FusionError, match="no fusions of foreign graphs for target 'openvino'; there are: tensorrt, onnxruntime"):
        fuse_graph(pinned("optimum-18"), tmp_path / "out.onnx", target="openvino")


@pytest.mark.parametrize("target", PIPELINES)
def test_rules_are_named_as_for_our_own_graphs(target) -> None:
    ours, theirs = pipeline.PIPELINES[target], PIPELINES[target]
    assert {fusion.rule for fusion in theirs} - {"past_length"} == {fusion.rule for fusion in ours if not fusion.needs_layout}
    assert set(PACKING[target]) == {fusion.rule for fusion in ours if fusion.needs_layout}


@pytest.fixture(scope="module")
def static_graph(make_checkpoint, tmp_path_factory):
    """A decoder whose keys and values are written into a cache of fixed capacity, with sizes and names as another tool would give them."""
    folder = tmp_path_factory.mktemp("static")
    export_checkpoint(StepContext(folder), open_checkpoint(str(make_checkpoint(folder / "tiny"))), dtype="fp32", kv_cache="static")
    model = ir.load(folder / "traced.onnx")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([{BATCH: 1, CAPACITY: 8}.get(str(size), size) for size in value.shape])
        value.name = value.name.replace("cache_write_indices", "slot").replace("key_value_lengths", "lengths").replace("past_key_values", "cache")
    ir.save(model, folder / "static.onnx")
    return folder / "static.onnx"


def test_a_cache_of_fixed_capacity_is_refused(static_graph, tmp_path) -> None:
    """Its last slots are empty, and no row's own: every row would attend to zeros."""
    with pytest.raises(ParityMismatch, match="fusion attention fired 0 times") as failure:
        fuse_graph(static_graph, tmp_path / "out.onnx")
    assert "keys come from TensorScatter: a cache of fixed capacity" in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_fixed_capacity_keeps_its_numbers_where_partial_fusion_is_allowed(static_graph, tmp_path) -> None:
    import onnxruntime as ort

    fuse_graph(static_graph, tmp_path / "out.onnx", allow_partial=True)
    logits = []
    for path in (static_graph, tmp_path / "out.onnx"):
        graph = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        made = {value.name: np.zeros(value.shape, np.float32) for value in graph.get_inputs() if value.name.startswith("cache")}
        made |= {"input_ids": np.array([[3, 4, 5]]), "position_ids": np.arange(3)[None], "slot": np.array([0]), "lengths": np.array([3])}
        logits.append(graph.run(["logits"], made)[0])
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
