"""graphs/parts.py: parts joined are the whole, and whatever is changed in one of them is found. Letters: E 8, one key head of 4."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from artifact.io_spec import CACHE_KINDS, past_name, present_name
from artifact.layout import MODULE_KEY
from graphs.parts import cut_part, parts_differ

LAYERS = 3
CACHE = "float16[batch_size,1,{axis},4]"
SHARED = """
size = Shape<start = 1, end = 2>(input_ids)
past = Shape<start = 2, end = 3>(past_key_values_0_key)
ends = Add(size, past)
h0 = Gather(embed, input_ids)
"""
LAYER = """
LI_turned = Transpose<perm = [1, 0]>(wI)
LI_linear = MatMul(hI, LI_turned)
LI_keys = Reshape(LI_linear, heads)
present_I_key = Concat<axis = 2>(past_key_values_I_key, LI_keys)
present_I_value = Concat<axis = 2>(past_key_values_I_value, LI_keys)
LI_sum = ReduceSum<keepdims = 1>(present_I_key, axes)
LI_flat = Reshape(LI_sum, flat)
LI_at = Cast<to = 10>(ends)
LI_moved = Mul(LI_flat, LI_at)
LI_added = Add(LI_linear, LI_moved)
hN = Add(hI, LI_added)
"""


def whole() -> ir.Model:
    body = SHARED + "".join(LAYER.replace("I", str(i)).replace("hN", f"h{i + 1}") for i in range(LAYERS))
    body += f"head = Transpose<perm = [1, 0]>(embed)\nlogits = MatMul(h{LAYERS}, head)\n"
    pasts = [f"{CACHE.format(axis='past_sequence_length')} past_key_values_{i}_{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    presents = [f"{CACHE.format(axis='total_sequence_length')} present_{i}_{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    weights = ", ".join(["float16[16,8] embed", *(f"float16[8,8] w{i}" for i in range(LAYERS))])
    constants = "int64[4] heads = {0, 0, 1, -1}, int64[1] axes = {2}, int64[3] flat = {0, 1, -1}"
    inputs = ", ".join(["int64[batch_size,sequence_length] input_ids", *pasts, weights])
    outputs = ", ".join(["float16[batch_size,sequence_length,16] logits", *presents])
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]>\ng ({inputs}) => ({outputs})\n<{constants}>\n{{{body}}}')
    graph, rng = model.graph, np.random.default_rng(0)
    for value in [value for value in graph.inputs if value.name == "embed" or str(value.name).startswith("w")]:
        graph.inputs.remove(value)
        value.const_value = ir.tensor(rng.standard_normal(value.shape.numpy()).astype(np.float16), name=value.name)  # type: ignore[union-attr]
        graph.register_initializer(value)
    names = {name(i, kind).replace(".", "_"): name(i, kind) for name in (past_name, present_name) for i in range(LAYERS) for kind in CACHE_KINDS}
    for value in [*graph.inputs, *graph.outputs]:
        value.name = names.get(str(value.name), value.name)
    _name_modules(graph)
    return model


def _name_modules(graph: ir.Graph) -> None:
    for node in graph:
        name = str(node.outputs[0].name)
        layer = name[1] if name.startswith("L") else name.split(".")[1] if name.startswith("present") else None
        if name.startswith("h") and name[1:].isdigit():
            layer = str(int(name[1:]) - 1) if name != "h0" else None
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(["batch_size", "sequence_length", 8]), ir.TensorType(ir.DataType.FLOAT16)
        node.metadata_props[MODULE_KEY] = "model.embed_tokens" if name == "h0" else f"model.layers.{layer}" if layer is not None else ""


CUTS = (((0, 2),), ((0, 0), (1, 2)), ((0, 1), (2, 2)), ((0, 0), (1, 1), (2, 2)))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_parts_joined_are_the_whole(cut: tuple[tuple[int, int], ...]) -> None:
    model = whole()
    parts = [cut_part(model, layers) for layers in cut]
    assert parts_differ(model, parts) == []
    for (first, last), part in zip(cut, parts, strict=True):
        inputs, outputs = ([str(value.name) for value in values] for values in (part.graph.inputs, part.graph.outputs))
        assert inputs[0] == (f"hidden_states.{first}" if first else "input_ids")
        assert outputs[0] == ("logits" if last == 2 else f"hidden_states.{last + 1}")
        assert [name for name in inputs[1:]] == [f"past_key_values.{i}.{kind}" for i in range(first, last + 1) for kind in ("key", "value")]


def test_cutting_leaves_the_whole_as_it_is() -> None:
    model = whole()
    before = ir.serde.serialize_model(model).SerializeToString()
    cut_part(model, (1, 2))
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_the_same_cut_gives_the_same_bytes() -> None:
    model = whole()
    first, again = (ir.serde.serialize_model(cut_part(model, (1, 2))).SerializeToString() for _ in range(2))
    assert first == again


def test_a_change_in_a_part_is_found_and_so_is_a_part_that_is_missing_or_out_of_turn() -> None:
    model = whole()
    first, second, third = (cut_part(model, (layer, layer)) for layer in range(3))
    assert parts_differ(model, [first, second]) == ["logits", "present.2.key", "present.2.value"]
    assert "logits" in parts_differ(model, [first, third, second])
    adds = [node for node in second.graph if node.op_type == "Add"]
    adds[-1].op_type = "Sub"
    assert "logits" in parts_differ(model, [first, second, third])
    adds[-1].op_type = "Add"
    assert parts_differ(model, [first, second, third]) == []


def test_a_size_of_another_axis_is_not_taken_for_the_same() -> None:
    model = whole()
    parts = [cut_part(model, layers) for layers in ((0, 0), (1, 2))]
    size = next(node for node in parts[1].graph if node.op_type == "Shape" and node.inputs[0] is parts[1].graph.inputs[0])
    size.attributes["start"], size.attributes["end"] = ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)
    assert "logits" in parts_differ(model, parts)


def test_layers_that_share_more_than_a_hidden_state_are_refused() -> None:
    model = whole()
    late = next(node for node in model.graph if str(node.outputs[0].name) == "L2_added")
    late.replace_input_with(0, next(node.outputs[0] for node in model.graph if node.outputs[0].name == "L0_linear"))
    with pytest.raises(FusionError, match="layer 0 must give one value to what follows"):
        cut_part(model, (0, 0))


@pytest.mark.parametrize("name", ["input_ids", past_name(0, "key")])
def test_refuses_sizes_of_axes_without_a_name(name: str) -> None:
    """Two axes without a name are two unknown sizes, not the same one."""
    model = whole()
    value = next(value for value in model.graph.inputs if value.name == name)
    assert value.shape is not None
    value.shape = ir.Shape([None if isinstance(size, ir.SymbolicDim) else size for size in value.shape])
    with pytest.raises(FusionError, match=f"of {name} has no name"):
        cut_part(model, (1, 1))
