"""Graphs of other exporters in ONNX Runtime's operators: what fires, that the numbers and the names stay, and a cache that is one buffer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact.errors import ParityMismatch, UsageError
from graphs.foreign.fuse import fuse_graph

LAYERS = 2
FLOAT32 = ["dynamo-18-eager-float32", "dynamo-18-sdpa-float32", "dynamo-23-sdpa-float32", "optimum-14", "optimum-18", "torchscript-4.36-float32"]
FLOAT32 += ["pairs-18-float32"]
FLOAT16 = ["dynamo-18-eager-float16", "torchscript-4.46-float16", "torchscript-4.30-float16", "pairs-18-repeated-float16"]
SCENARIOS = ["prefill", "batch", "decode", "left-padded", "left-padded-decode"]
NO_SUMS = "torchscript-4.30-float16"
"""It casts what a norm reads, so that the norm reads no sum."""


@pytest.fixture
def fused_for_ort(fused):
    """A pinned graph → (file, report) for ONNX Runtime."""
    return partial(fused, target="onnxruntime")


@pytest.mark.parametrize("name", [*FLOAT32, *FLOAT16])
def test_every_attention_and_every_sum_before_a_norm_is_fused(pinned, fused_for_ort, name) -> None:
    out, report = fused_for_ort(pinned(name))
    rules = {rule["rule"]: (rule["fired"], rule["expected"]) for rule in report["rules"]}
    assert (report["passed"], report["target"], report["nothing_to_do"]) == (True, "onnxruntime", "")
    assert rules["group_query_attention"] == (LAYERS, LAYERS)
    assert rules["past_length"] == (1, 1)
    sums = 0 if name == NO_SUMS else 2 * LAYERS
    assert rules["skip_rms_norm"] == (sums, sums)
    (note,) = [rule["note"] for rule in report["rules"] if "note" in rule]
    assert note == "ONNX Runtime takes several new tokens over a past in a batch of one alone, and a mask of as many columns as past and new tokens"
    assert [rule["rule"] for rule in report["rules"] if rule["refused"]] == ["pack_rotated_qkv", "pack_sliced_gate_up"]
    onnx.checker.check_model(out)
    graph = ir.load(out).graph
    assert report["nodes_after"] == graph.num_nodes() < report["nodes_before"]
    kinds = [node.op_type for node in graph]
    assert [kinds.count(one) for one in ("GroupQueryAttention", "Attention", "Softmax")] == [LAYERS, 0, 0]
    assert {node.domain for node in graph} == {"", "com.microsoft"}


@pytest.mark.parametrize("name", FLOAT32)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_numbers_stay(pinned, fused_for_ort, tools, name, scenario) -> None:
    out, _ = fused_for_ort(pinned(name))
    assert tools["worst_difference"](pinned(name), out, tools["scenarios"][scenario]) <= 1e-5


@pytest.mark.parametrize("name", FLOAT16)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_float16_numbers_stay_within_its_rounding(pinned, fused_for_ort, tools, name, scenario) -> None:
    out, _ = fused_for_ort(pinned(name))
    assert tools["worst_difference"](pinned(name), out, tools["scenarios"][scenario]) <= 2**-7


def test_a_piece_of_a_prompt_over_a_past_is_for_a_batch_of_one(pinned, fused_for_ort, tools) -> None:
    out, _ = fused_for_ort(pinned("optimum-18"))
    chunk = tools["scenarios"]["chunk"]
    assert tools["worst_difference"](pinned("optimum-18"), out, replace(chunk, batch=1)) <= 1e-5
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        tools["worst_difference"](pinned("optimum-18"), out, chunk)


@pytest.mark.parametrize("name", FLOAT32)
def test_inputs_and_outputs_stay(pinned, fused_for_ort, tools, name) -> None:
    out, _ = fused_for_ort(pinned(name))
    assert tools["interface"](out) == tools["interface"](pinned(name))


def spoiled_norm(pinned, tmp_path):
    """The square of the first norm is of another power, so that rule rms_norm refuses it."""
    model = ir.load(pinned("dynamo-18-eager-float32"))
    mean = next(node for node in model.graph if node.op_type == "ReduceMean")
    epsilon = next(use.node for use in mean.outputs[0].uses() if use.node.op_type == "Add")
    shifted = ir.node("Add", [epsilon.inputs[1], epsilon.inputs[1]])
    moved = ir.node("Mul", [shifted.outputs[0], mean.outputs[0]])
    model.graph.insert_before(epsilon, [shifted, moved])
    epsilon.replace_input_with(1, moved.outputs[0])
    ir.save(model, tmp_path / "spoiled.onnx")
    return tmp_path / "spoiled.onnx"


def test_after_a_rule_that_fired_too_rarely_nothing_is_claimed(pinned, tools, tmp_path) -> None:
    spoiled = spoiled_norm(pinned, tmp_path)
    report = fuse_graph(spoiled, tmp_path / "out.onnx", target="onnxruntime", allow_partial=True)
    rules = {rule["rule"]: (rule["fired"], rule["expected"]) for rule in report["rules"]}
    assert (rules["rms_norm"], rules["group_query_attention"]) == ((2 * LAYERS, 2 * LAYERS + 1), (LAYERS, LAYERS))
    assert tools["worst_difference"](spoiled, tmp_path / "out.onnx", tools["scenarios"]["batch"]) <= 1e-5


def test_a_sum_that_is_not_of_two_hidden_states_is_named_and_stays(pinned, tools, tmp_path) -> None:
    """Learned positions [1, 1, E] are added to the tokens before the first norm."""
    model = ir.load(pinned("dynamo-18-eager-float32"))
    embedding = next(node for node in model.graph if node.op_type == "Gather" and node.inputs[0].shape == ir.Shape([32, 16]))
    added = ir.Value(name="added", const_value=ir.tensor(np.full((1, 1, 16), 0.5, np.float32), name="added"))
    added.type, added.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 1, 16])
    model.graph.register_initializer(added)
    total = ir.node("Add", [embedding.outputs[0], added])
    ir.convenience.replace_all_uses_with(embedding.outputs[0], total.outputs[0])
    total.replace_input_with(0, embedding.outputs[0])
    model.graph.insert_after(embedding, total)
    ir.save(model, tmp_path / "added.onnx")
    report = fuse_graph(tmp_path / "added.onnx", tmp_path / "out.onnx", target="onnxruntime")
    sums = next(rule for rule in report["rules"] if rule["rule"] == "skip_rms_norm")
    assert (report["passed"], sums["fired"], sums["expected"], len(sums["refused"])) == (True, 2 * LAYERS, 2 * LAYERS, 1)
    assert "not of two hidden states [B, S, E]" in sums["refused"][0]["reason"]
    assert tools["worst_difference"](tmp_path / "added.onnx", tmp_path / "out.onnx", tools["scenarios"]["batch"]) <= 1e-5


@pytest.mark.parametrize("name", [*FLOAT32[1:], *FLOAT16])
def test_past_and_present_may_be_one_buffer(pinned, fused_for_ort, tools, name) -> None:
    """A step of a left-padded batch in buffers of 40 rows, against the graph as it was."""
    out, _ = fused_for_ort(pinned(name))
    scenario = tools["scenarios"]["left-padded-decode"]
    made = tools["feeds"](pinned(name), scenario)
    before = ort.InferenceSession(pinned(name), providers=["CPUExecutionProvider"])
    expected = before.run(None, made)
    after = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    binding, buffers = after.io_binding(), {}
    binding.bind_output("logits")
    pasts = [value.name for value in after.get_inputs() if value.name.startswith("past")]
    for past, present in zip(pasts, [value.name for value in after.get_outputs()][1:], strict=True):
        batch, heads, filled, size = made[past].shape
        rows = np.zeros((batch, heads, 40, size), made[past].dtype)
        rows[:, :, :filled] = made[past]
        buffers[past] = ort.OrtValue.ortvalue_from_numpy(rows)
        binding.bind_ortvalue_input(past, buffers[past])
        binding.bind_ortvalue_output(present, buffers[past])
    for value in after.get_inputs():
        if value.name not in buffers:
            binding.bind_cpu_input(value.name, made[value.name])
    after.run_with_iobinding(binding)
    close = {"rtol": 2**-7, "atol": 2**-6} if name.endswith("float16") else {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], expected[0], **close)
    total = scenario.past + scenario.new
    for past, present in zip(pasts, expected[1:], strict=True):
        np.testing.assert_allclose(buffers[past].numpy()[:, :, :total], present, **close)
        assert not buffers[past].numpy()[:, :, total:].any()


REFUSED = {
    "dynamo-18-bare": "the key is not the past and the new ones behind it, joined on axis 2",
    "optimum-18-float16": "but read by Cast",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_the_operator_can_not_hold_is_refused_and_nothing_is_written(pinned, tools, tmp_path, name, reason) -> None:
    with pytest.raises(ParityMismatch, match=f"fusion group_query_attention fired 0 times, expected {LAYERS}") as failure:
        fuse_graph(pinned(name), tmp_path / "out.onnx", target="onnxruntime")
    assert reason in str(failure.value)
    assert list(tmp_path.iterdir()) == []
    report = fuse_graph(pinned(name), tmp_path / "out.onnx", target="onnxruntime", allow_partial=True)
    assert report["passed"] is False
    scenario = tools["scenarios"]["batch"]
    assert tools["worst_difference"](pinned(name), tmp_path / "out.onnx", scenario) <= (2**-7 if name.endswith("float16") else 1e-5)
    lengths = next(rule for rule in report["rules"] if rule["rule"] == "past_length")
    assert (lengths["fired"], lengths["expected"]) == (0, 0)
    assert all(refusal["reason"].endswith("can't be one buffer") for refusal in lengths["refused"])
    assert bool(lengths["refused"]) == (name == "optimum-18-float16")


def test_a_graph_that_was_fused_so_is_left_alone(pinned, fused_for_ort, tmp_path) -> None:
    report = fuse_graph(fused_for_ort(pinned("optimum-18"))[0], tmp_path / "again.onnx", target="onnxruntime")
    assert report["nothing_to_do"] == "attention is com.microsoft::GroupQueryAttention already: it was fused for ONNX Runtime"


def test_a_graph_that_was_fused_for_tensorrt_is_taken_further(pinned, fused, tools, tmp_path) -> None:
    report = fuse_graph(fused(pinned("optimum-18"))[0], tmp_path / "out.onnx", target="onnxruntime")
    assert {rule["rule"]: rule["fired"] for rule in report["rules"]}["group_query_attention"] == LAYERS
    assert tools["worst_difference"](pinned("optimum-18"), tmp_path / "out.onnx", tools["scenarios"]["left-padded"]) <= 1e-5


def test_layers_are_those_between_norms_that_sum(pinned, fused_for_ort) -> None:
    out, report = fused_for_ort(pinned("dynamo-18-sdpa-float32"))
    found = report["layer_operators"]
    assert found["known_by"] == "norms"
    assert [group["layers"] for group in found["groups"]] == [[0], [1]]  # the first norm of all reads the embedding, and no sum
    expected = {"MatMul": 7, "RotaryEmbedding": 2, "com.microsoft::GroupQueryAttention": 1, "com.microsoft::SkipSimplifiedLayerNormalization": 2}
    for group in found["groups"]:
        assert {name: group["operators"][name] for name in expected} == expected
    assert sum(sum(group["operators"].values()) for group in found["groups"]) + sum(found["outside"].values()) == ir.load(out).graph.num_nodes()


def test_a_release_of_tensorrt_is_refused(pinned, tmp_path) -> None:
    with pytest.raises(UsageError, match="--min-tensorrt is of --target tensorrt, not of onnxruntime"):
        fuse_graph(pinned("optimum-18"), tmp_path / "out.onnx", target="onnxruntime", min_tensorrt="10.0")
