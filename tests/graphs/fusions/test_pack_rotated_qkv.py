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
    qt = Transpose<perm={turn}>({q}) qm = MatMul(x, qt) {qb} qr = RotaryEmbedding<num_heads=4, {style}>(qo, cos, sin, p)
    kt = Transpose<perm=[1,0]>({k}) km = MatMul({kx}, kt) {kb} kr = RotaryEmbedding<num_heads=2, interleaved=0>(ko, cos, {ksin}, p)
    vt = Transpose<perm=[1,0]>({v}) vm = MatMul(x, vt) {vb}
    y, pk2, pv2 = com.microsoft.GroupQueryAttention<{heads}, scale=0.3, do_rotary={rotates}>(qr, kr, vo, pk, pv, lengths, total)"""
NAMES = {part: f"{MODULE}.{part}_proj.weight" for part in WIDTHS}
BIASES = {part: f"{MODULE}.{part}_proj.bias" for part in WIDTHS}


def make(graph, random, biases="", order="qkv", gap=0, **changes) -> ir.Model:
    """``biases``: which of q, k, v have one; ``order``: how the weights lie in the file."""
    fields = {"turn": "[1,0]", "style": "interleaved=0", "kx": "x", "ksin": "sin", "heads": "num_heads=4, kv_num_heads=2", "rotates": 0}
    fields |= {part: part for part in WIDTHS} | changes
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


HEADS = H + 2 * K
FORM = ["Transpose", "MatMul", *("Gather", "Unsqueeze", "Where", "Reshape") * 2, "Reshape", "RotaryEmbedding", "Reshape", "GroupQueryAttention"]


@pytest.mark.parametrize("biases", ["", "qkv"])
def test_packs_to_one_linear_and_keeps_the_numbers(graph, run, random, biases):
    model, given = make(graph, random, biases), feeds(random)
    before = run(model, given)
    result = apply_reader(model, pack_rotated_qkv)
    assert (result.fired, result.refused) == (1, [])
    assert [node.op_type for node in model.graph] == [*FORM[:2], *(["Add"] if biases else []), *FORM[2:]]
    weight = model.graph.initializers[f"{MODULE}.qkv_proj.weight"]
    assert isinstance(weight.const_value, ir.ExternalTensor)
    assert (weight.const_value.offset, tuple(weight.shape)) == (16, (HEADS * D, E))
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_every_head_is_a_row_rotated_by_its_own(graph, random, dtype):
    model = make(graph, random)
    for name in ("cos", "sin"):
        model.graph.initializers[name].type = ir.TensorType(dtype)
    apply_reader(model, pack_rotated_qkv)
    *_, into_heads, rotation, out_of_heads, attention = model.graph
    spread = list(model.graph)[2:10]
    cos, sin = spread[:4], spread[4:]
    for (gather, unsqueeze, where, reshape), table, neutral in ((cos, "cos", 1), (sin, "sin", 0)):
        assert ([value.name for value in gather.inputs], gather.attributes["axis"].value) == ([table, "p"], 0)
        assert unsqueeze.inputs[1].const_value.numpy().tolist() == [2]
        assert where.inputs[0].const_value.numpy().tolist() == [[True]] * (H + K) + [[False]] * K
        assert where.inputs[0].const_value.dtype == ir.DataType.BOOL
        assert (where.inputs[2].const_value.numpy().tolist(), where.inputs[2].dtype) == (neutral, dtype)
        assert reshape.inputs[1].const_value.numpy().tolist() == [0, -1, D // 2]
        made = [node.outputs[0] for node in (gather, unsqueeze, where, reshape)]
        assert {value.dtype for value in made} == {dtype}
        shapes = [("B", "S", D // 2), ("B", "S", 1, D // 2), ("B", "S", HEADS, D // 2), ("B", None, D // 2)]
        assert [value.shape for value in made] == [ir.Shape(shape) for shape in shapes]
    assert cos[2].inputs[0] is sin[2].inputs[0]
    assert list(rotation.inputs) == [into_heads.outputs[0], cos[3].outputs[0], sin[3].outputs[0]]
    assert {name: attribute.value for name, attribute in rotation.attributes.items()} == {"interleaved": 0, "num_heads": 1}
    assert [node.inputs[1].const_value.numpy().tolist() for node in (into_heads, out_of_heads)] == [[0, -1, D], [0, -1, HEADS * D]]
    rows = [node.outputs[0] for node in (into_heads, rotation, out_of_heads)]
    assert {value.dtype for value in rows} == {ir.DataType.FLOAT}
    assert [value.shape for value in rows] == [ir.Shape(shape) for shape in (("B", None, D), ("B", None, D), ("B", "S", HEADS * D))]
    assert {node.metadata_props["module"] for node in (into_heads, rotation, out_of_heads, attention)} == {MODULE}
    assert [value if value is None else value.name for value in attention.inputs[1:5]] == [None, None, "pk", "pv"]
    assert attention.inputs[0] is out_of_heads.outputs[0]


def test_new_values_belong_to_the_module_that_the_tables_name(graph, random):
    model = make(graph, random)
    for name in ("cos", "sin"):
        model.graph.initializers[name].name = f"model.rotary_emb.{name}"
    apply_reader(model, pack_rotated_qkv)
    assert [node.metadata_props["module"] for node in list(model.graph)[2:10]] == ["model.rotary_emb"] * 8
    constants = [value.name for value in model.graph.initializers.values() if value.name and "rotary_emb" in value.name]
    added = [f"model.rotary_emb.{name}.{constant}" for name in ("cos", "sin") for constant in ("axis", "rows", "unrotated")]
    assert sorted(constants) == sorted(["model.rotary_emb.cos", "model.rotary_emb.sin", *added])


def second_layer(model: ir.Model, key_heads: int = K, positions: str = "p") -> None:
    """Another attention behind the first graph's inputs, whose weights lie where the first one's do."""
    named = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    other = MODULE.replace("3", "4")
    weights = {}
    for part in WIDTHS:
        old = model.graph.initializers[NAMES[part]]
        weights[part] = ir.Value(name=NAMES[part].replace("3", "4"), shape=old.shape, type=old.type, const_value=old.const_value)
        model.graph.register_initializer(weights[part])
    nodes, made = [], {}
    for part, width in WIDTHS.items():
        turned = ir.node("Transpose", [weights[part]], {"perm": (1, 0)})
        product = ir.node("MatMul", [named["x"], turned.outputs[0]])
        nodes += [turned, product]
        made[part] = product.outputs[0]
        if part != "v":
            heads = {"q": H, "k": key_heads}[part]
            rotation = ir.node("RotaryEmbedding", [made[part], named["cos"], named["sin"], named[positions]], {"num_heads": heads, "interleaved": 0})
            nodes.append(rotation)
            product.outputs[0].shape, product.outputs[0].type = ir.Shape(["B", "S", width]), ir.TensorType(ir.DataType.FLOAT)
            made[part] = rotation.outputs[0]
        made[part].shape, made[part].type = ir.Shape(["B", "S", width]), ir.TensorType(ir.DataType.FLOAT)
    rest = [named[name] for name in ("pk", "pv", "lengths", "total")]
    attributes = {"num_heads": H, "kv_num_heads": key_heads, "scale": 0.3, "do_rotary": 0}
    nodes.append(ir.node("GroupQueryAttention", [*made.values(), *rest], attributes, domain=CONTRIB, num_outputs=3))
    for node in nodes:
        node.metadata_props["module"] = other
    model.graph.extend(nodes)
    nodes[-1].outputs[0].name = "second"
    model.graph.outputs.append(nodes[-1].outputs[0])


def rotated_by(model: ir.Model) -> list[list[ir.Value]]:
    return [list(node.inputs[1:]) for node in model.graph if node.op_type == "RotaryEmbedding"]


def test_layers_share_what_their_heads_are_rotated_by(graph, random):
    model = make(graph, random)
    model.graph.append(ir.node("Identity", [model.graph.initializers["cos"]]))
    second_layer(model)
    assert apply_reader(model, pack_rotated_qkv).fired == 2
    first, second = rotated_by(model)
    assert first == second
    assert [node.op_type for node in model.graph].count("Gather") == 2


@pytest.mark.parametrize("other", [{"key_heads": 1}, {"positions": "p2"}], ids=["heads", "positions"])
def test_layers_of_other_heads_or_positions_have_their_own(graph, random, other):
    model = make(graph, random)
    model.graph.inputs.append(ir.Value(name="p2", shape=ir.Shape(["B", "S"]), type=ir.TensorType(ir.DataType.INT64)))
    second_layer(model, **other)
    assert apply_reader(model, pack_rotated_qkv).fired == 2
    first, second = rotated_by(model)
    assert not set(map(id, first)) & set(map(id, second))
    assert [node.op_type for node in model.graph].count("Gather") == 4


OTHER_HEADS = "the attention has other heads than are rotated in front of it, or rotates them itself"
REFUSED = {
    "the query's weight": ({"turn": "[0,1]"}, "the query is not projected by a transposed weight [out, in]"),
    "another table": ({"ksin": "other"}, "query and key are not rotated by the same tables and positions in front of it"),
    "pairs": ({"style": "interleaved=1"}, "the query or the key is rotated in interleaved pairs, or in part"),
    "in part": ({"style": "interleaved=0, rotary_embedding_dim=4"}, "the query or the key is rotated in interleaved pairs, or in part"),
    "other query heads": ({"heads": "num_heads=2, kv_num_heads=2"}, OTHER_HEADS),
    "other key heads": ({"heads": "num_heads=4, kv_num_heads=1"}, OTHER_HEADS),
    "rotated again": ({"rotates": 1}, OTHER_HEADS),
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


def test_refuses_tables_that_are_not_read_by_positions(graph, random):
    unread = "query and key are not rotated by tables [positions, D/2] that are read by positions"

    def refused(edit):
        model = make(graph, random)
        for node in model.graph:
            if node.op_type == "RotaryEmbedding":
                edit(model, node)
        result = apply_reader(model, pack_rotated_qkv)
        return result.fired == 0 and result.refused[0].reason == unread

    def replace(at, shape):
        rows = ir.Value(name="rows", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        return lambda _, node: node.replace_input_with(at, made.setdefault("rows", rows))

    assert refused(lambda _, node: node.resize_inputs(3))
    for at in (1, 2):
        made = {}
        assert refused(replace(at, ["B", "S", D // 2]))


def test_attention_over_a_packed_input_is_no_candidate(graph, random):
    model = make(graph, random)
    apply_reader(model, pack_rotated_qkv)
    assert not any(pack_rotated_qkv.is_candidate(node) for node in model.graph)


def test_attention_without_a_key_is_no_candidate(graph, random):
    attention = next(node for node in make(graph, random).graph if node.op_type == "GroupQueryAttention")
    attention.replace_input_with(2, None)
    assert pack_rotated_qkv.is_candidate(attention)
    attention.replace_input_with(1, None)
    assert not pack_rotated_qkv.is_candidate(attention)


def test_operators_of_other_names_or_domains_are_no_candidates(graph, random):
    attention = next(node for node in make(graph, random).graph if node.op_type == "GroupQueryAttention")
    attention.op_type = "MultiHeadAttention"
    assert not pack_rotated_qkv.is_candidate(attention)
    attention.op_type, attention.domain = "GroupQueryAttention", "com.example"
    assert not pack_rotated_qkv.is_candidate(attention)
