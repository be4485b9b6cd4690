"""Three projections in front of a GroupQueryAttention become one over the same bytes; near-misses are refused in words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.fusions import pack_rotated_qkv
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import apply_reader

B, S, E, H, K, D = 1, 3, 6, 4, 2, 8
WIDTHS = {"q": H * D, "k": K * D, "v": K * D}
MODULE = "model.layers.3.self_attn"
INPUTS = f"float[B,S,{E}] x, float[B,S,{E}] x2, int64[B,S] p, float[B,{K},P,{D}] pk, float[B,{K},P,{D}] pv, int32[B] lengths, int32 total"
CONSTANTS = "float[16,4] cos, float[16,4] sin, float[16,4] other"
BODY = """
    qt = Transpose<perm={turn}>({q}) qm = MatMul(x, qt) {qb} qr = RotaryEmbedding<num_heads=4, interleaved=0>(qo, cos, sin, p)
    kt = Transpose<perm=[1,0]>({k}) km = MatMul({kx}, kt) {kb} kr = RotaryEmbedding<num_heads=2, interleaved=0>(ko, cos, {ksin}, p)
    vt = Transpose<perm=[1,0]>({v}) vm = MatMul(x, vt) {vb}
    y, pk2, pv2 = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, scale=0.3, do_rotary=0>(qr, kr, vo, pk, pv, lengths, total)"""
NAMES = {part: f"{MODULE}.{part}_proj.weight" for part in WIDTHS}
BIASES = {part: f"{MODULE}.{part}_proj.bias" for part in WIDTHS}


def make(graph, random, biases="", order="qkv", gap=0, **changes) -> ir.Model:
    """``biases``: which of q, k, v have one; ``order``: how the weights lie in the file."""
    fields = {"turn": "[1,0]", "kx": "x", "ksin": "sin", **{part: part for part in WIDTHS}} | changes
    fields |= {f"{part}b": f"{part}o = Add({part}m, {part}bias)" if part in biases else f"{part}o = Identity({part}m)" for part in WIDTHS}
    weights = {part: random(WIDTHS[part], E) for part in order} | {f"{part}bias": random(WIDTHS[part]) for part in order if part in biases}
    declared = ", ".join(f"float[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items())
    outputs = f"float[B,S,{H * D}] y, float[B,{K},T,{D}] pk2, float[B,{K},T,{D}] pv2"
    text = f"g ({INPUTS}, {CONSTANTS}, {declared}) => ({outputs}) {{{BODY.format(**fields)}\n}}"
    tables = {name: random(16, 4) for name in ("cos", "sin", "other")}
    model = graph(text, tables, weights, gap)
    for node in list(model.graph):
        if node.op_type == "Identity":
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)
    for part in WIDTHS:
        for old, new in ((part, NAMES[part]), (f"{part}bias", BIASES[part])):
            if old in model.graph.initializers:
                model.graph.initializers[old].name = new
    for node in model.graph:
        node.metadata_props["module"] = MODULE
        width = WIDTHS.get(node.outputs[0].name[0])
        if node.op_type in ("MatMul", "Add", "RotaryEmbedding"):
            node.outputs[0].shape = ir.Shape(["B", "S", width])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.opset_imports[CONTRIB] = 1
    return model


def feeds(random) -> dict[str, np.ndarray]:
    cache = {name: random(B, K, 2, D) for name in ("pk", "pv")}
    return cache | {
        "x": random(B, S, E), "x2": random(B, S, E), "p": np.array([[2, 3, 4]]),
        "lengths": np.array([4], np.int32), "total": np.array(5, np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("biases", ["", "qkv"])
def test_packs_to_one_linear_and_keeps_the_numbers(graph, run, random, biases):
    model, given = make(graph, random, biases), feeds(random)
    before = run(model, given)
    result = apply_reader(model, pack_rotated_qkv)
    assert (result.fired, result.refused) == (1, [])
    ops = [node.op_type for node in model.graph]
    assert {op: ops.count(op) for op in ("MatMul", "Transpose", "RotaryEmbedding", "Split", "GroupQueryAttention", "Add")} == {
        "MatMul": 1, "Transpose": 1, "RotaryEmbedding": 1, "Split": 2, "GroupQueryAttention": 1, "Add": bool(biases),
    }  # fmt: skip
    weight = model.graph.initializers[f"{MODULE}.qkv_proj.weight"]
    assert isinstance(weight.const_value, ir.ExternalTensor)
    assert (weight.const_value.offset, tuple(weight.shape)) == (16, (sum(WIDTHS.values()), E))
    (rotation,) = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert {name: attribute.value for name, attribute in rotation.attributes.items()} == {"interleaved": 0, "num_heads": H + K}
    splits = [node for node in model.graph if node.op_type == "Split"]
    assert [node.attributes["axis"].value for node in splits] == [2, 2]
    assert [tuple(node.inputs[1].const_value.numpy()) for node in splits] == [((H + K) * D, K * D), (H * D, K * D)]
    assert {node.metadata_props["module"] for node in model.graph} == {MODULE, f"{MODULE}.qkv_proj"}
    assert {value.dtype for node in (*splits, rotation) for value in node.outputs} == {ir.DataType.FLOAT}
    assert [value.shape for node in (*splits, rotation) for value in node.outputs] == [
        ["B", "S", width] for width in ((H + K) * D, K * D, H * D, K * D, (H + K) * D)
    ]
    assert [node.inputs[1].name for node in splits] == [f"{MODULE}.parts", f"{MODULE}.rotated"]
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


REFUSED = {
    "the query's weight": ({"turn": "[0,1]"}, "the query is not projected by a transposed weight [out, in]"),
    "another table": ({"ksin": "other"}, "query and key are not rotated by the same tables and positions in front of it"),
    "another input": ({"kx": "x2"}, "query, key and value are projected from different inputs"),
    "some biases": ({"biases": "qv"}, "some of query, key and value have a bias and some have none"),
    "apart": ({"gap": 4}, "a packed weight would be a copy"),
    "other order": ({"order": "kqv"}, "does not lie behind"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, random, changes, reason):
    model = make(graph, random, **changes)
    result = apply_reader(model, pack_rotated_qkv)
    assert result.fired == 0
    assert reason in result.refused[0].reason


def test_refuses_what_is_not_a_projection_or_is_read_elsewhere(graph, random):
    def reason(edit):
        model = make(graph, random)
        edit(model, {node.outputs[0].name: node for node in model.graph})
        result = apply_reader(model, pack_rotated_qkv)
        assert result.fired == 0
        return result.refused[0].reason

    for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
        unprojected = f"the {name} is not projected by a transposed weight [out, in]"
        x, reader, operand = ("qm", "y", 2) if part == "v" else ("vm", f"{part}r", 0)
        assert reason(lambda _, nodes, at=(x, reader, operand): nodes[at[1]].replace_input_with(at[2], nodes[at[0]].inputs[0])) == unprojected
        assert reason(lambda _, nodes, part=part: nodes[f"{part}m"].replace_input_with(1, nodes[f"{part}t"].inputs[0])) == unprojected
    for index, part in enumerate("qk"):
        unrotated = "query and key are not rotated by the same tables and positions in front of it"
        assert reason(lambda _, nodes, at=(index, f"{part}m"): nodes["y"].replace_input_with(at[0], nodes[at[1]].outputs[0])) == unrotated
        read_twice = "a rotated query or key is read elsewhere too"
        assert reason(lambda model, nodes, rotated=f"{part}r": model.graph.append(ir.node("Identity", [nodes[rotated].outputs[0]]))) == read_twice


def test_attention_over_a_packed_input_is_no_candidate(graph, random):
    model = make(graph, random)
    apply_reader(model, pack_rotated_qkv)
    (attention,) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert [node for node in model.graph if pack_rotated_qkv.is_candidate(node)] == [attention]
    attention.replace_input_with(1, None)
    assert not pack_rotated_qkv.is_candidate(attention)


def test_operators_of_other_names_or_domains_are_no_candidates(graph, random):
    attention = next(node for node in make(graph, random).graph if node.op_type == "GroupQueryAttention")
    attention.op_type = "MultiHeadAttention"
    assert not pack_rotated_qkv.is_candidate(attention)
    attention.op_type, attention.domain = "GroupQueryAttention", "com.example"
    assert not pack_rotated_qkv.is_candidate(attention)
