"""Saboteurs of every kind, in traced, fused and quantised graphs: each is narrowed down to its node, and a sound graph to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact import io_spec
from artifact.layout import MODULE_KEY
from exporter.weights import ROTARY_COS, ROTARY_SIN
from validation.bisect import layer, proof

pytestmark = pytest.mark.parity
Narrow = Callable[..., dict[str, Any]]
LAYER = "model.layers.1"


def node_of(model: ir.Model, module: str, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.metadata_props.get(MODULE_KEY) == module and node.op_type == op_type)


def constant(model: ir.Model, name: str, array: Any) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def insert_after(model: ir.Model, value: ir.Value, op_type: str, operand: ir.Value, name: str) -> None:
    users, made_by = list(value.uses()), value.producer()
    assert made_by is not None
    node = ir.node(op_type, [value, operand], name=name, metadata_props=dict(made_by.metadata_props))
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{name}.out", value.type, value.shape
    model.graph.append(node)
    for user, index in users:
        user.replace_input_with(index, node.outputs[0])
    model.graph.sort()


def replace_stored(model: ir.Model, name: str, change: Callable[[np.ndarray], None]) -> None:
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    change(array)
    value.const_value = ir.tensor(array, name=name)


@pytest.mark.parametrize("stage", ["traced", "fused", "int8"])
def test_a_sound_graph_has_nothing_to_narrow_and_says_what_was_compared(narrowed: Narrow, stage: str) -> None:
    report = narrowed(stage, worst_local_layer=1)
    assert report["complete"]
    assert report["found"] is None
    looked = report["looked_at"]
    assert (looked["layers"], looked["weights"], len(looked["calls"]), looked["notes"]) == (3, 3 * 9 + 5, 5, [])
    assert looked["tensors"] > 200
    assert looked["nearest"]["error"] < looked["nearest"]["allowed"] / 2
    assert report["words"].startswith(f"nothing to narrow: {looked['tensors']} tensors and 32 weights of 3 layers in 5 calls")


@pytest.mark.parametrize("stage", ["traced", "fused"])
def test_a_sound_static_graph_has_nothing_to_narrow(narrowed_static: Narrow, stage: str) -> None:
    report = narrowed_static(stage, worst_local_layer=1)
    assert (report["found"], report["looked_at"]["layers"]) == (None, 3)


@pytest.mark.parametrize(
    ("stage", "linear"), [("traced", "self_attn.k_proj"), ("traced", "mlp.down_proj"), ("fused", "self_attn.qkv_proj"), ("int8", "self_attn.o_proj")]
)
def test_a_scaled_linear_is_named(narrowed: Narrow, stage: str, linear: str) -> None:
    def scale(model: ir.Model) -> None:
        insert_after(
            model, node_of(model, f"{LAYER}.{linear}", "MatMul").outputs[0], "Mul", constant(model, "factor", _factor(model, linear)), "scaled"
        )

    found = narrowed(stage, scale, first_layer_outside=1)["found"]
    assert (found["kind"], found["layer"], found["node"], found["op"]) == ("arithmetic", 1, "scaled", "Mul")
    assert 0.02 > found["error"] > 10 * found["allowed"]
    assert found["why"] == "2 of 2 other layers have no such node"


def _factor(model: ir.Model, linear: str) -> Any:
    product = node_of(model, f"{LAYER}.{linear}", "MatMul")
    reads = product.inputs[0].producer()
    return np.float32(1.01) if reads is not None and reads.op_type == "Cast" else np.float16(1.01)


def test_a_linear_that_every_layer_scales_is_named_without_the_others_help(narrowed: Narrow) -> None:
    def scale(model: ir.Model) -> None:
        factor = constant(model, "factor", np.float16(1.01))
        for index in range(3):
            insert_after(model, node_of(model, f"model.layers.{index}.self_attn.v_proj", "MatMul").outputs[0], "Mul", factor, f"scaled.{index}")

    found = narrowed("traced", scale)["found"]
    assert (found["layer"], found["node"]) == (0, "scaled.0")


def test_a_wrong_epsilon_is_named(narrowed: Narrow) -> None:
    def fused(model: ir.Model) -> None:
        node_of(model, f"{LAYER}.post_attention_layernorm", "RMSNormalization").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)

    found = narrowed("fused", fused)["found"]
    assert (found["node"], found["layer"]) == (f"{LAYER}.post_attention_layernorm.RMSNormalization", 1)
    assert found["why"].startswith("epsilon=0.001")
    assert found["hint"] == "fusion rms_norm (7 of 7 fired)"

    def traced(model: ir.Model) -> None:
        for index in range(3):
            node = node_of(model, f"model.layers.{index}.input_layernorm", "Add")
            node.replace_input_with(1, constant(model, f"eps.{index}", np.float32(1e-3)))

    found = narrowed("traced", traced)["found"]
    assert (found["node"], found["layer"]) == ("model.layers.0.input_layernorm.Add", 0)
    assert len(found["suspects"]) > 3


@pytest.mark.parametrize(("stage", "op_type"), [("traced", "Gather"), ("fused", "RotaryEmbedding")])
def test_a_wrong_rope_constant_is_named(narrowed: Narrow, stage: str, op_type: str) -> None:
    def turn_faster(model: ir.Model) -> None:
        def change(table: np.ndarray) -> None:
            positions = np.arange(len(table), dtype=np.float32)[:, None]
            table[:] = np.cos(positions * 9000.0 ** -(np.arange(table.shape[1], dtype=np.float32) / table.shape[1]))

        replace_stored(model, ROTARY_COS, change)

    found = narrowed(stage, turn_faster)["found"]
    assert (found["kind"], found["op"], found["tensor"]) == ("weight", op_type, ROTARY_COS)
    assert "values are not the checkpoint's, the first at [1, " in found["why"]


def test_a_mask_that_is_wrong_in_decode_steps_alone_is_named(narrowed: Narrow) -> None:
    def hide_the_first_token(model: ir.Model) -> None:
        mask = next(node for node in model.graph if node.op_type == "Or").outputs[0]
        columns = next(node for node in model.graph if node.name == "model.Range").outputs[0]
        ids = next(value for value in model.graph.inputs if value.name == io_spec.INPUT_IDS)
        length = ir.node("Shape", [ids], {"start": 1, "end": 2})
        single = ir.node("Equal", [length.outputs[0], constant(model, "one", np.array([1], np.int64))])
        first = ir.node("Cast", [single.outputs[0]], {"to": ir.DataType.INT64})
        seen = ir.node("GreaterOrEqual", [columns, first.outputs[0]], name="seen")
        model.graph.extend([length, single, first, seen])
        insert_after(model, mask, "And", seen.outputs[0], "hides")

    for stage in ("traced", "fused"):
        found = narrowed(stage, hide_the_first_token)["found"]
        assert (found["node"], found["layer"], found["call"]) == ("seen", None, "decode, 1 token after 95")
        assert "hides (And, model)" in found["suspects"]


def test_positions_that_are_wrong_in_decode_steps_alone_are_named(narrowed: Narrow, shift_decode_positions: Callable[[ir.Model], None]) -> None:
    for stage in ("traced", "fused"):
        found = narrowed(stage, shift_decode_positions)["found"]
        assert (found["op"], found["layer"], found["call"]) == ("Sub", None, "decode, 1 token after 95")


def test_a_shared_value_that_is_another_of_the_trace_is_named(narrowed: Narrow) -> None:
    """The sines are the cosines, the mask is one of its own operands: values that the trace has, in the place of others."""

    def read_cosines(model: ir.Model) -> None:
        gather = next(node for node in model.graph if node.op_type == "Gather" and node.inputs[0].name == ROTARY_SIN)
        gather.replace_input_with(0, model.graph.initializers[ROTARY_COS])

    found = narrowed("traced", read_cosines)["found"]
    assert (found["op"], found["layer"], found["call"]) == ("Unsqueeze", None, "prefill, 96 tokens")
    assert any("Gather" in suspect for suspect in found["suspects"])

    def lose_an_operand(model: ir.Model) -> None:
        mask = next(node for node in model.graph if node.op_type == "Or")
        before = next(value for value in mask.inputs if value.producer().op_type == "And")
        mask.outputs[0].replace_all_uses_with(before)

    for stage in ("traced", "fused"):
        found = narrowed(stage, lose_an_operand)["found"]
        assert (found["op"], found["layer"], found["call"]) == ("And", None, "prefill, 96 tokens")


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_a_wrong_axis_is_named(narrowed: Narrow, layers: tuple[int, ...]) -> None:
    def swap(model: ir.Model) -> None:
        for index in layers:
            node_of(model, f"model.layers.{index}.self_attn", "Softmax").attributes["axis"] = ir.AttrInt64("axis", 1)

    found = narrowed("traced", swap)["found"]
    assert (found["layer"], found["node"]) == (layers[0], f"model.layers.{layers[0]}.self_attn.Softmax")
    assert ("axis=1 where 2 of 2 other layers have axis=-1" in found["why"]) is (len(layers) == 1)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_pairs_that_are_rotated_otherwise_are_named(narrowed: Narrow, layers: tuple[int, ...]) -> None:
    """Of the keys alone: between the packed projection and the cache, where no value is one of the trace's as it is."""

    def interleave(model: ir.Model) -> None:
        for index in layers:
            name = f"model.layers.{index}.self_attn.RotaryEmbedding_2"
            next(node for node in model.graph if node.name == name).attributes["interleaved"] = ir.AttrInt64("interleaved", 1)

    found = narrowed("fused", interleave)["found"]
    assert (found["layer"], found["node"]) == (layers[0], f"model.layers.{layers[0]}.self_attn.RotaryEmbedding_2")


def test_a_node_that_cannot_run_is_named(narrowed: Narrow, capfd: pytest.CaptureFixture[str]) -> None:
    def swap(model: ir.Model) -> None:
        attention = node_of(model, f"{LAYER}.self_attn", "Attention")
        attention.outputs[0].consumers()[0].attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])

    report = narrowed("fused", swap)
    assert (report["found"], report["complete"]) == (None, False)
    assert f"ONNX Runtime can't run {LAYER}.self_attn.Reshape_4" in report["words"]


def test_a_bad_scale_of_a_quantised_weight_is_named(narrowed: Narrow) -> None:
    def stretch(model: ir.Model) -> None:
        replace_stored(model, f"{LAYER}.mlp.gate_up_proj.weight_scale", lambda scale: np.multiply.at(scale, 50, np.float16(1.25)))

    found = narrowed("int8", stretch)["found"]
    assert (found["kind"], found["op"], found["tensor"]) == ("weight", "DequantizeLinear", f"{LAYER}.mlp.up_proj.weight")
    assert found["why"].startswith("row 2 is multiplied by 1.25")  # 48 rows of gate before
    assert f"{LAYER}.mlp.gate_up_proj.weight_scale" in found["inputs"]
    assert found["hint"] == "quantize --scheme int8"


def test_a_corrupted_weight_is_named(narrowed: Narrow) -> None:
    def flip(model: ir.Model) -> None:
        replace_stored(model, f"{LAYER}.self_attn.o_proj.weight", lambda weight: weight.__setitem__((3, 4), -weight[3, 4]))

    for stage in ("traced", "fused"):
        found = narrowed(stage, flip)["found"]
        assert (found["kind"], found["op"], found["tensor"]) == ("weight", "Transpose", f"{LAYER}.self_attn.o_proj.weight")
        assert found["why"].startswith("1 of 1,024 values are not the checkpoint's, the first at [3, 4]")


def test_what_follows_the_layers_is_narrowed_too(narrowed: Narrow) -> None:
    def scale(model: ir.Model) -> None:
        node_of(model, "model.norm", "RMSNormalization").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)

    found = narrowed("fused", scale)["found"]
    assert (found["layer"], found["node"]) == (None, "model.norm.RMSNormalization")


@pytest.mark.parametrize(("stage", "linear"), [("traced", "up_proj"), ("fused", "gate_up_proj"), ("int8", "gate_up_proj")])
def test_what_float16_cannot_hold_is_named(narrowed: Narrow, stage: str, linear: str) -> None:
    """A large constant added and taken away again: the same in float32, and most bits are gone in float16."""

    def lose_bits(model: ir.Model) -> None:
        for name, shift in (("up", 512.0), ("down", -512.0)):
            value = [node for node in model.graph if node.metadata_props.get(MODULE_KEY) == f"{LAYER}.mlp.{linear}"][-1].outputs[0]
            insert_after(model, value, "Add", constant(model, f"shift {name}", np.float16(shift)), name)

    found = narrowed(stage, lose_bits, first_layer_outside=1)["found"]
    assert (found["kind"], found["layer"], found["node"]) == ("rounding", 1, "down")
    assert found["error"] > 0.05 > 4 * found["allowed"]


def test_a_trace_that_is_not_pytorch_s_own_layer_is_a_fault(narrowed: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = proof.torch_layer
    monkeypatch.setattr(proof, "torch_layer", lambda *args: exact(*args) * np.float32(1.02))
    found = narrowed("fused")["found"]
    assert (found["kind"], found["layer"], found["call"]) == ("exporter", 0, "prefill, 96 tokens")
    assert found["error"] > found["allowed"]


@pytest.mark.parametrize("form", ["narrowed", "narrowed_static"])
def test_a_trace_that_is_not_pytorch_s_own_in_steps_alone_is_a_fault(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Its proof there has the past of each row, without padding, whatever the cache."""
    exact = proof.torch_layer

    def other_steps(*args: Any) -> Any:
        output, past = exact(*args), args[4][0].shape[1]
        return output * np.float32(1.02) if past else output

    monkeypatch.setattr(proof, "torch_layer", other_steps)
    found = request.getfixturevalue(form)("fused")["found"]
    assert (found["kind"], found["layer"], found["call"]) == ("exporter", 0, "decode, 1 token after 95")


def test_a_weight_that_cannot_be_read_makes_the_look_incomplete(narrowed: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    read = layer.weights_of
    lost = f"{LAYER}.self_attn.o_proj.weight"
    monkeypatch.setattr(layer, "weights_of", lambda *args: {name: found for name, found in read(*args).items() if name != lost})
    report = narrowed("traced")
    assert (report["found"], report["complete"]) == (None, False)
    assert report["words"].startswith(f"not narrowed whole: 1 weights were not compared, {lost} first; ")
    why = "it can't be read of the graph, and the checkpoint's was taken in its place"
    assert report["looked_at"]["notes"] == [f"{lost} was not compared: {why}"]


def test_a_graph_that_cannot_be_cut_says_why(narrowed: Narrow) -> None:
    def forget_modules(model: ir.Model) -> None:
        for node in model.graph:
            node.metadata_props.clear()

    report = narrowed("traced", forget_modules)
    assert (report["found"], report["complete"]) == (None, False)
    assert report["words"].startswith("not narrowed: layer 0 must read one value of model.embed_tokens")
