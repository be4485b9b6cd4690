from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import pack_qkv
from graphs.rewriting import apply_fusion

LAYER = "model.layers.3.self_attn"
NAMES = {short: f"{LAYER}.{short}_proj.weight" for short in "qkv"}
TEXT = """
agraph (float[B,S,6] x, float[8,6] w_q, float[4,6] w_k, float[4,6] w_v) => (float[B,4,S,2] query, float[B,2,S,2] key, float[B,2,S,2] value)
<int64[4] query_heads = {0, 0, 4, 2}, int64[4] key_heads = {0, 0, 2, 2}>
{
    q_turned = Transpose<perm=[1,0]>(w_q)
    q = MatMul(x, q_turned)
    q_heads = Reshape(q, query_heads)
    [q_last] query = Transpose<perm=[0,2,1,3]>(q_heads)
    k_turned = Transpose<perm=[1,0]>(w_k)
    k = MatMul(x, k_turned)
    k_heads = Reshape(k, key_heads)
    [k_last] key = Transpose<perm=[0,2,1,3]>(k_heads)
    v_turned = Transpose<perm=[1,0]>(w_v)
    v = MatMul(x, v_turned)
    v_heads = Reshape(v, key_heads)
    [v_last] value = Transpose<perm=[0,2,1,3]>(v_heads)
}
"""
ROWS = {"q": 8, "k": 4, "v": 4}


@pytest.fixture
def projections(graph, random):
    """The graph with its weights in one file, in ``order``, by Hugging Face's names."""

    def make(text=TEXT, dtype=np.float32, order="qkv", rows=ROWS, gap=0, names=NAMES):
        weights = {f"w_{short}": random(rows[short], 6, dtype=dtype) for short in order}
        model = graph(text if dtype == np.float32 else text.replace("float[", "float16["), stored=weights, gap=gap)
        for short in order:
            model.graph.initializers[f"w_{short}"].name = names[short]
        for node in model.graph:
            node.metadata_props[MODULE_KEY] = LAYER
        return model

    return make


def fuse(model):
    return apply_fusion(model, pack_qkv.RULES, pack_qkv.is_candidate)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_packs_into_one_linear_and_keeps_the_numbers(projections, run, random, dtype) -> None:
    model = projections(dtype=dtype)
    feeds = {"x": random(2, 5, 6, dtype=dtype)}
    before = run(model, feeds)
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    nodes = {node.outputs[0].name: node for node in model.graph}
    query, cache = nodes["query"], nodes["key"]
    apart, turned = query.inputs[0].producer(), cache.inputs[0].producer()
    heads = apart.inputs[0].producer()
    linear = heads.inputs[0].producer()
    weight = linear.inputs[1].producer()
    assert set(model.graph) == {weight, linear, heads, apart, query, turned, cache}
    assert [node.op_type for node in (weight, linear, heads)] == ["Transpose", "MatMul", "Reshape"]
    assert [node.op_type for node in (apart, query, turned, cache)] == ["Split", "Transpose", "Transpose", "Split"]
    assert (dict(linear.attributes), dict(heads.attributes)) == ({}, {})
    assert [tuple(node.attributes.get_ints("perm")) for node in (weight, query, turned)] == [(1, 0), (0, 2, 1, 3), (0, 2, 1, 3)]
    assert [(split.attributes.get_int("axis"), set(split.attributes)) for split in (apart, cache)] == [(2, {"axis"}), (1, {"axis"})]
    assert heads.inputs[1].const_value.numpy().tolist() == [0, 0, 8, 2]
    assert [split.inputs[1].const_value.numpy().tolist() for split in (apart, cache)] == [[4, 4], [2, 2]]
    for fused, unfused in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(fused, unfused)


def test_packed_weight_is_a_view_of_the_same_bytes(projections) -> None:
    model = projections()
    parts = [model.graph.initializers[name].const_value for name in NAMES.values()]
    fuse(model)
    packed = model.graph.initializers[f"{LAYER}.qkv_proj.weight"].const_value
    assert isinstance(packed, ir.ExternalTensor)
    assert (packed.location, packed.offset, packed.length) == ("weights.bin", 16, sum(part.nbytes for part in parts))
    np.testing.assert_array_equal(packed.numpy(), np.concatenate([part.numpy() for part in parts]))
    assert set(NAMES.values()).isdisjoint(model.graph.initializers)


def test_new_values_have_module_dtype_and_shape(projections) -> None:
    model = projections()
    fuse(model)
    assert [node.metadata_props[MODULE_KEY] for node in model.graph] == [f"{LAYER}.qkv_proj"] * 2 + [LAYER] * 5
    assert all(value.dtype == ir.DataType.FLOAT for node in model.graph for value in node.outputs)
    shapes = [str(value.shape) for node in model.graph for value in node.outputs]
    assert shapes == ["[6,16]", "[B,S,16]", "[B,S,8,2]", *["[B,S,4,2]"] * 2, *["[B,4,S,2]"] * 2, *["[B,2,S,2]"] * 2]


def test_packs_whatever_order_the_graph_has(projections, run, random) -> None:
    """The value branch comes first in the graph, and still last in the weight; consumers stand before the first branch's end."""
    start, first_k, first_v = (TEXT.index(f"    {branch}_turned") for branch in "qkv")
    branches = TEXT[start:first_k], TEXT[first_k:first_v], TEXT[first_v : TEXT.rindex("}")]
    reverse = (
        TEXT[:start].replace("float[B,2,S,2] value)", "float[B,2,S,2] used)")
        + branches[2]
        + "    used = Neg(value)\n"
        + branches[1]
        + branches[0]
        + "}"
    )
    model = projections(reverse)
    feeds = {"x": random(2, 5, 6)}
    before = run(model, feeds)
    assert fuse(model).fired == 1
    assert [node.op_type for node in model.graph].count("Split") == 2
    for fused, unfused in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(fused, unfused)


def test_packs_heads_of_equal_number(projections) -> None:
    """Without grouped heads nothing but the names tells query, key and value apart."""
    text = TEXT.replace("[4,6]", "[8,6]").replace("[B,2,S,2]", "[B,4,S,2]").replace("{0, 0, 2, 2}", "{0, 0, 4, 2}")
    model = projections(text, rows=dict.fromkeys("qkv", 8))
    assert fuse(model).fired == 1
    splits = [node for node in model.graph if node.op_type == "Split"]
    assert [split.inputs[1].const_value.numpy().tolist() for split in splits] == [[4, 8], [4, 4]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"gap": 4},
            f"{NAMES['k']} does not lie behind {NAMES['q']}: weights.bin bytes 16 to 208, weights.bin bytes 212 to 308",
        ),
        ({"order": "kqv"}, "are not named self_attn.q_proj, self_attn.k_proj, self_attn.v_proj of one layer"),
        ({"names": {short: f"w{short}" for short in "qkv"}}, "wq, wk, wv are not named self_attn.q_proj"),
        ({"names": NAMES | {"v": NAMES["v"].replace("3", "4")}}, "of one layer"),
        ({"text": TEXT.replace("[B,S,6] x", "[S,6] x")}, "the input is not [B, S, E]"),
        ({"text": TEXT.replace("{0, 0, 2, 2}", "{0, -1, 2, 2}")}, "the reshape to heads is not [0, 0, heads, head_dim]"),
        (
            {"text": TEXT.replace(", int64[4] key_heads = {0, 0, 2, 2}", "").replace("float[4,6] w_v)", "float[4,6] w_v, int64[4] key_heads)")},
            "the reshape to heads is not [0, 0, heads, head_dim]",
        ),
        (
            {"text": TEXT.replace("int64[4] key_heads = {0, 0, 2, 2}", "int64[5] key_heads = {0, 0, 2, 1, 2}")},
            "the reshape to heads is not [0, 0, heads, head_dim]",
        ),
        (
            {
                "text": TEXT.replace("w_v)\n    v =", "w_v)\n    v_moved = Neg(v_turned)\n    v =").replace(
                    "v = MatMul(x, v_turned)", "v = MatMul(x, v_moved)"
                )
            },
            "2 linears reshaped to heads",
        ),
        ({"text": TEXT.replace("{0, 0, 2, 2}", "{0, 0, 1, 4}")}, "query, key and value have different head_dim: [2, 4, 4]"),
        (
            {"text": TEXT.replace("v_heads)", "v_heads)\n    more = Neg(v)").replace("value)\n<", "value, float[B,S,4] more)\n<")},
            "2 linears reshaped to heads",
        ),
        (
            {"text": TEXT.replace("[v_last] value = Transpose<perm=[0,2,1,3]>", "value = Transpose<perm=[0,2,3,1]>")},
            "2 linears reshaped to heads read this input",
        ),
    ],
)
def test_refuses_with_a_reason(projections, options, reason) -> None:
    model = projections(**options)
    result = fuse(model)
    assert result.fired == 0
    assert "Split" not in {node.op_type for node in model.graph}
    (refusal,) = result.refused
    assert refusal.node == ("k_last" if options.get("order") == "kqv" else "q_last")
    assert reason in refusal.reason


def test_refuses_a_branch_that_is_used_elsewhere(projections) -> None:
    text = TEXT.replace("float[B,2,S,2] value)", "float[B,2,S,2] value, float[B,S,4] v)")
    result = fuse(projections(text))
    assert result.fired == 0
    assert "a value between its first and last node is used elsewhere too" in result.refused[0].reason


def test_refuses_weights_that_are_not_stored_outside(graph, random) -> None:
    model = graph(TEXT, constants={f"w_{short}": random(rows, 6) for short, rows in ROWS.items()})
    result = fuse(model)
    assert result.fired == 0
    assert "w_q is not a weight [out, in] stored outside the graph" in result.refused[0].reason


def test_cost_is_linear_in_depth(projections) -> None:
    """One layer tries one triple; the library's own search would try every triple of Transpose nodes of all layers."""
    tried = []

    class Counting(pack_qkv.SiblingMatcher):
        def _multi_match(self, candidate, check_removable):
            tried.append(candidate)
            return super()._multi_match(candidate, check_removable)

    model = projections()
    rule = pack_qkv.PackQKV.rule()
    rule._matcher = Counting(rule._target_pattern)
    assert rule.apply_to_model(model) == 1
    assert len(tried) == 1


BIASES = {short: f"{LAYER}.{short}_proj.bias" for short in "qkv"}
BIASED = (
    TEXT.replace("float[4,6] w_v)", "float[4,6] w_v, float[8] b_q, float[4] b_k, float[4] b_v)")
    .replace("q_heads = Reshape(q,", "q_biased = Add(q, b_q)\n    q_heads = Reshape(q_biased,")
    .replace("k_heads = Reshape(k,", "k_biased = Add(k, b_k)\n    k_heads = Reshape(k_biased,")
    .replace("v_heads = Reshape(v,", "v_biased = Add(v, b_v)\n    v_heads = Reshape(v_biased,")
)


@pytest.fixture
def biased(graph, random):
    """The same graph with biases behind the weights in the file, in ``order``."""

    def make(text=BIASED, dtype=np.float32, order="qkv", names=BIASES):
        stored = {f"w_{short}": random(ROWS[short], 6, dtype=dtype) for short in "qkv"}
        stored |= {f"b_{short}": random(ROWS[short], dtype=dtype) for short in order}
        model = graph(text if dtype == np.float32 else text.replace("float[", "float16["), stored=stored)
        for short in "qkv":
            model.graph.initializers[f"w_{short}"].name = NAMES[short]
            model.graph.initializers[f"b_{short}"].name = names[short]
        for node in model.graph:
            node.metadata_props[MODULE_KEY] = LAYER
        return model

    return make


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_packs_biases_into_one_and_keeps_the_numbers(biased, run, random, dtype) -> None:
    model = biased(dtype=dtype)
    feeds = {"x": random(2, 5, 6, dtype=dtype)}
    before = run(model, feeds)
    parts = [model.graph.initializers[name].const_value for name in BIASES.values()]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    assert [node.op_type for node in model.graph][:4] == ["Transpose", "MatMul", "Add", "Reshape"]
    assert [str(value.shape) for value in model.graph.node(2).outputs] == ["[B,S,16]"]
    assert model.graph.node(2).metadata_props[MODULE_KEY] == f"{LAYER}.qkv_proj"
    packed = model.graph.initializers[f"{LAYER}.qkv_proj.bias"].const_value
    assert (packed.location, packed.offset, packed.length) == (parts[0].location, parts[0].offset, sum(part.nbytes for part in parts))
    np.testing.assert_array_equal(packed.numpy(), np.concatenate([part.numpy() for part in parts]))
    assert set(model.graph.initializers) & (set(NAMES.values()) | set(BIASES.values())) == set()
    for fused, unfused in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(fused, unfused)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"order": "kqv"}, f"{BIASES['k']} does not lie behind {BIASES['q']}"),
        ({"names": BIASES | {"k": "bias"}}, "are not named self_attn.q_proj, self_attn.k_proj, self_attn.v_proj of one layer"),
        ({"names": {short: name.replace("3", "4") for short, name in BIASES.items()}}, "are not the biases of"),
        ({"text": BIASED.replace("float[4] b_v", "float[1] b_v")}, f"{BIASES['v']} is not a bias [out] stored outside the graph"),
        ({"text": BIASED.replace("Add(k, b_k)", "Sub(k, b_k)")}, "2 linears reshaped to heads read this input"),
        (
            {
                "text": BIASED.replace("v_biased = Add(v, b_v)\n    v_heads = Reshape(v_biased,", "v_heads = Reshape(v,")
                .replace("=> (", "=> (float[4] unused, ")
                .replace("{\n", "{\n    unused = Neg(b_v)\n", 1)
            },
            "its structure differs",
        ),
    ],
    ids=["order", "name", "layer", "shape", "subtracted", "one-without"],
)
def test_refuses_biases_with_a_reason(biased, options, reason) -> None:
    model = biased(**options)
    result = fuse(model)
    assert result.fired == 0
    assert "Split" not in {node.op_type for node in model.graph}
    assert reason in result.refused[0].reason


@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("text", [TEXT, BIASED], ids=["plain", "biased"])
def test_refuses_a_weight_that_is_not_turned(projections, biased, text, which) -> None:
    """Transpose<perm=[0,1]> changes nothing: the weight is [in, out]."""
    make = projections if text is TEXT else biased
    before = f"Transpose<perm=[1,0]>(w_{which})"
    assert before in text
    assert fuse(make(text.replace(before, f"Transpose<perm=[0,1]>(w_{which})"))).fired == 0


def test_what_is_multiplied_from_the_left_is_no_sibling(projections) -> None:
    """Here the input is the second operand, behind which heads would mean something else."""
    more = "    other = MatMul(square, x)\n    o_heads = Reshape(other, key_heads)\n    o_last = Transpose<perm=[0,2,1,3]>(o_heads)\n"
    more += "    gone = Exp(x)\n}"
    text = TEXT.replace("float[4,6] w_v)", "float[4,6] w_v, float[B,S,S] square)").replace(
        "float[B,2,S,2] value)", "float[B,2,S,2] value, o_last, gone)"
    )
    assert fuse(projections(text[: text.rindex("}")] + more)).fired == 1


def test_a_weight_that_is_computed_is_no_sibling(projections) -> None:
    text = TEXT.replace("    v_turned = Transpose<perm=[1,0]>(w_v)", "    moved = Neg(w_v)\n    v_turned = Transpose<perm=[1,0]>(moved)")
    (refusal,) = fuse(projections(text)).refused
    assert "2 linears reshaped to heads read this input" in refusal.reason


def test_one_linear_alone_is_no_candidate(graph, random) -> None:
    text = "agraph (float[B,S,6] x, float[8,6] w) => (y)\n<int64[4] heads = {0, 0, 4, 2}>\n{ turned = Transpose<perm=[1,0]>(w)\n"
    text += " linear = MatMul(x, turned)\n by_head = Reshape(linear, heads)\n y = Transpose<perm=[0,2,1,3]>(by_head) }"
    assert not any(pack_qkv.is_candidate(node) for node in graph(text, stored={"w": random(8, 6)}).graph)


@pytest.mark.parametrize("offset", [None, 0])
def test_the_beginning_of_a_file_comes_first(projections, offset) -> None:
    """An offset that is not given is 0, whatever order the graph has."""
    model = projections()
    for name, weight in zip(NAMES.values(), ((offset, 192), (192, 96), (288, 96)), strict=True):
        stored = model.graph.initializers[name]
        stored.const_value = ir.ExternalTensor("weights.bin", *weight, stored.dtype, shape=stored.shape, name=name)
    assert fuse(model).fired == 1
