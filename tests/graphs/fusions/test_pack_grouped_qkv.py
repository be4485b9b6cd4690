"""Three projections in front of a GroupQueryAttention that rotates become one over the same bytes; near-misses are refused in words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.fusions import pack_grouped_qkv
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import apply_reader

B, E, H, K, D, C = 2, 6, 4, 2, 16, 12
WIDTHS = {"q": H * D, "k": K * D, "v": K * D}
WORDS = {"q": "query", "k": "key", "v": "value"}
N_POSITIONS = 16
MODULE = "model.layers.3.self_attn"
INPUTS = f"float[B,S,{E}] x, float[B,S,{E}] x2, float[B,{K},C,{D}] pk, float[B,{K},C,{D}] pv, int32[B] lengths, int32 total, int64[B,S] p"
CONSTANTS = f"float[{N_POSITIONS},{D // 2}] cos, float[{N_POSITIONS},{D // 2}] sin"
LINEAR = "{part}t = Transpose<perm={turn}>({part}) {part}m = MatMul({x}, {part}t) {part}o = {add}"
ATTENTION = """
    y, pk2, pv2 = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, scale=0.3, do_rotary=1>(
        qo, ko, vo, pk, pv, lengths, total, cos, sin, p)"""


def make(graph, random, biases="", order="qkv", gap=0, turned="", elsewhere="") -> ir.Model:
    """``biases``: which of q, k, v have one; ``order``: how the weights lie in the file; ``turned``, ``elsewhere``: which are so, or read x2."""
    lines = [
        LINEAR.format(
            part=part,
            turn="[0,1]" if part in turned else "[1,0]",
            x="x2" if part in elsewhere else "x",
            add=f"Add({part}m, {part}bias)" if part in biases else f"Identity({part}m)",
        )
        for part in WIDTHS
    ]
    weights = {part: random(WIDTHS[part], E) for part in order} | {f"{part}bias": random(WIDTHS[part]) for part in order if part in biases}
    declared = ", ".join(f"float[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items())
    outputs = f"float[B,S,{H * D}] y, float[B,{K},C,{D}] pk2, float[B,{K},C,{D}] pv2"
    text = f"g ({INPUTS}, {CONSTANTS}, {declared}) => ({outputs}) {{{' '.join(lines)}{ATTENTION}\n}}"
    model = graph(text, {name: random(N_POSITIONS, D // 2) for name in ("cos", "sin")}, weights, gap)
    for node in list(model.graph):
        if node.op_type == "Identity":
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)
    for part in WIDTHS:
        for old, kind in ((part, "weight"), (f"{part}bias", "bias")):
            if old in model.graph.initializers:
                model.graph.initializers[old].name = f"{MODULE}.{part}_proj.{kind}"
    for node in model.graph:
        node.name = node.outputs[0].name
        node.metadata_props["module"] = MODULE
    model.graph.opset_imports[CONTRIB] = 1
    return model


def feeds(random, start, new) -> dict[str, np.ndarray]:
    begin = np.array(start)
    cache = {name: random(len(start), K, C, D) for name in ("pk", "pv")}
    counted = {"lengths": (begin + new - 1).astype(np.int32), "total": np.array(max(start) + new, np.int32)}
    tokens = {name: random(len(start), new, E) for name in ("x", "x2")}
    return cache | counted | tokens | {"p": begin[:, None] + np.arange(new)}


def attention_of(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    return node


CALLS = {"prompt": ([0, 0], 5), "decode": ([7, 2], 1), "chunk": ([3], 4)}


@pytest.mark.parametrize(("start", "new"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("biases", ["", "qkv"], ids=["plain", "biased"])
def test_packs_to_one_linear_and_keeps_the_numbers(graph, run, random, biases, start, new) -> None:
    model, given = make(graph, random, biases), feeds(random, start, new)
    before = run(model, given)
    operands = list(attention_of(model).inputs)
    result = apply_reader(model, pack_grouped_qkv)
    assert (result.fired, result.refused) == (1, [])
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", *(["Add"] if biases else []), "GroupQueryAttention"]
    attended, *written = run(model, given)
    np.testing.assert_array_equal(attended, before[0])
    for ours, theirs in zip(written, before[1:], strict=True):
        for row, length in enumerate(given["lengths"] + 1):  # what lies behind is nobody's
            np.testing.assert_array_equal(ours[row, :, :length], theirs[row, :, :length])
    node = attention_of(model)
    assert list(node.inputs[1:]) == [None, None, *operands[3:]]
    assert node.inputs[0].producer() is list(model.graph)[-2]
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "num_heads": H, "kv_num_heads": K, "scale": pytest.approx(0.3), "do_rotary": 1,
    }  # fmt: skip


@pytest.mark.parametrize("biases", ["", "qkv"], ids=["plain", "biased"])
def test_the_packed_weight_is_a_view(graph, random, biases) -> None:
    model = make(graph, random, biases)
    apply_reader(model, pack_grouped_qkv)
    width = (H + 2 * K) * D
    turned, product, *added, _ = model.graph
    (weight,) = turned.inputs
    assert (weight.name, tuple(weight.shape), turned.attributes["perm"].value) == (f"{MODULE}.qkv_proj.weight", (width, E), (1, 0))
    assert isinstance(weight.const_value, ir.ExternalTensor)
    assert (weight.const_value.offset, weight.const_value.length) == (16, width * E * 4)
    assert [value.name for value in (product.inputs[0], product.inputs[1])] == ["x", turned.outputs[0].name]
    for node in added:
        bias = node.inputs[1]
        assert (bias.name, tuple(bias.shape)) == (f"{MODULE}.qkv_proj.bias", (width,))
        assert (bias.const_value.offset, bias.const_value.length) == (16 + width * E * 4, width * 4)
    assert len(added) == (1 if biases else 0)
    for node in (turned, product, *added):
        assert node.metadata_props["module"] == f"{MODULE}.qkv_proj"
        assert node.outputs[0].dtype == ir.DataType.FLOAT
        assert node.outputs[0].shape == ([E, width] if node is turned else ["B", "S", width])


DIFFERENT_INPUTS = "query, key and value are projected from different inputs"
SOME_BIASES = "some of query, key and value have a bias and some have none"
SIZE = E * D * 4
APART = (
    f"{MODULE}.k_proj.weight does not lie behind {MODULE}.q_proj.weight: weights.bin bytes 16 to {16 + H * SIZE}, "
    f"weights.bin bytes {{}} to {{}}; a packed weight would be a copy"
)
REFUSED = {
    **{f"another input of {part}": ({"elsewhere": part}, DIFFERENT_INPUTS) for part in WIDTHS},
    **{f"biases of {parts}": ({"biases": parts}, SOME_BIASES) for parts in ("q", "qk", "kv", "qv")},
    "apart": ({"gap": 4}, APART.format(20 + H * SIZE, 20 + (H + K) * SIZE)),
    "other order": ({"order": "qvk"}, APART.format(16 + (H + K) * SIZE, 16 + (H + 2 * K) * SIZE)),
    **{f"{part} not turned": ({"turned": part}, f"the {WORDS[part]} is not projected by a transposed weight [out, in]") for part in WIDTHS},
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, random, changes, reason) -> None:
    model = make(graph, random, **changes)
    before = list(model.graph)
    result = apply_reader(model, pack_grouped_qkv)
    assert (result.fired, [(refusal.node, refusal.reason) for refusal in result.refused]) == (0, [("y", reason)])
    assert list(model.graph) == before


@pytest.mark.parametrize("part", WIDTHS)
def test_refuses_what_is_not_projected(graph, random, part) -> None:
    """An input of the attention that is fed, and a weight that is not transposed."""
    unprojected = f"the {WORDS[part]} is not projected by a transposed weight [out, in]"
    model = make(graph, random)
    attention_of(model).replace_input_with(list(WIDTHS).index(part), model.graph.inputs[0])
    assert [refusal.reason for refusal in apply_reader(model, pack_grouped_qkv).refused] == [unprojected]
    model = make(graph, random)
    (product,) = [node for node in model.graph if node.name == f"{part}m"]
    product.replace_input_with(1, product.inputs[1].producer().inputs[0])
    assert [refusal.reason for refusal in apply_reader(model, pack_grouped_qkv).refused] == [unprojected]


def test_attention_that_does_not_rotate_is_no_candidate(graph, random) -> None:
    attention = attention_of(make(graph, random))
    assert pack_grouped_qkv.is_candidate(attention)
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
    assert not pack_grouped_qkv.is_candidate(attention)
    del attention.attributes["do_rotary"]
    assert not pack_grouped_qkv.is_candidate(attention)


def test_attention_over_a_packed_input_is_no_candidate(graph, random) -> None:
    model = make(graph, random)
    apply_reader(model, pack_grouped_qkv)
    assert not pack_grouped_qkv.is_candidate(attention_of(model))


def test_attention_without_a_key_is_no_candidate(graph, random) -> None:
    attention = attention_of(make(graph, random))
    attention.replace_input_with(2, None)
    assert pack_grouped_qkv.is_candidate(attention)
    attention.replace_input_with(1, None)
    assert not pack_grouped_qkv.is_candidate(attention)


@pytest.mark.parametrize(("field", "value"), [("op_type", "MultiHeadAttention"), ("domain", "com.example"), ("domain", "")])
def test_operators_of_other_names_or_domains_are_no_candidates(graph, random, field, value) -> None:
    attention = attention_of(make(graph, random))
    setattr(attention, field, value)
    assert not pack_grouped_qkv.is_candidate(attention)
