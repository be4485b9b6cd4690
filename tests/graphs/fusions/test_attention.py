from __future__ import annotations

import numpy as np
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import attention
from graphs.rewriting import apply_fusion

FLOAT32 = """
agraph (float[B,4,S,8] query, float[B,4,T,8] key, float[B,4,T,8] value, bool[B,1,S,T] mask, float fill) => (float[B,4,S,8] y)
<float[B,4,S,T] weights>
{
    turned = Transpose<perm=[0,1,3,2]>(key)
    scores = MatMul(query, turned)
    masked = Where(mask, scores, fill)
    [softmax] weights = Softmax<axis=-1>(masked)
    y = MatMul(weights, value)
}
"""
GROUPED_FLOAT16 = """
agraph (float16[B,6,S,8] query, float16[B,2,T,8] key, float16[B,2,T,8] value, bool[B,1,S,T] mask, float16 fill) => (float16[B,6,S,8] y)
<int64[1] two = {2}, int64[1] three = {3}, int64[1] six = {6}, int64[1] eight = {8}, int64[1] new_axis = {2}, float[B,6,S,T] weights,
 float16[B,2,3,T,8] key_repeated, float16[B,6,T,8] key_heads, float16[B,2,3,T,8] value_repeated, float16[B,6,T,8] value_heads>
{
    batch = Shape<start=0, end=1>(key)
    total = Shape<start=2, end=3>(key)
    repeated = Concat<axis=0>(batch, two, three, total, eight)
    joined = Concat<axis=0>(batch, six, total, eight)
    key_5d = Unsqueeze(key, new_axis)
    key_repeated = Expand(key_5d, repeated)
    key_heads = Reshape(key_repeated, joined)
    turned = Transpose<perm=[0,1,3,2]>(key_heads)
    scores = MatMul(query, turned)
    masked = Where(mask, scores, fill)
    scores32 = Cast<to=1>(masked)
    [softmax] weights = Softmax<axis=-1>(scores32)
    weights16 = Cast<to=10>(weights)
    value_5d = Unsqueeze(value, new_axis)
    value_repeated = Expand(value_5d, repeated)
    value_heads = Reshape(value_repeated, joined)
    y = MatMul(weights16, value_heads)
}
"""
GROUPED_FLOAT32 = (
    GROUPED_FLOAT16.replace("float16", "float")
    .replace("    scores32 = Cast<to=1>(masked)\n", "")
    .replace("    weights16 = Cast<to=10>(weights)\n", "")
    .replace("Softmax<axis=-1>(scores32)", "Softmax<axis=-1>(masked)")
    .replace("MatMul(weights16", "MatMul(weights")
)
SMALLEST = {dtype: {"fill": np.array(np.finfo(dtype).min)} for dtype in (np.float16, np.float32)}


@pytest.mark.parametrize(
    ("text", "dtype", "n_kv_heads", "tolerance"),
    [
        (FLOAT32, np.float32, 4, 1e-6),
        (GROUPED_FLOAT32, np.float32, 2, 1e-6),
        (GROUPED_FLOAT16, np.float16, 2, 2**-9),  # scores and weights are rounded to float16 at other places
    ],
    ids=["float32", "grouped-float32", "grouped-float16"],
)
@pytest.mark.parametrize("past", [0, 3])
def test_fuses_to_one_node_and_keeps_the_numbers(graph, run, random, text, dtype, n_kv_heads, tolerance, past) -> None:
    model = graph(text, constants=SMALLEST[dtype])
    batch, new, total = 2, 5, 5 + past
    mask = np.tril(np.ones((batch, 1, new, total), bool), past)
    mask[1, :, :, :2] = False  # left padding; a row always attends to itself
    mask[1, :, :, past:] |= np.eye(new, dtype=bool)
    keys = {name: random(batch, n_kv_heads, total, 8, dtype=dtype) for name in ("key", "value")}
    n_heads = model.graph.inputs[0].shape[1]
    feeds = {"query": random(batch, n_heads, new, 8, dtype=dtype), **keys, "mask": mask}
    unfused_y = run(model, feeds)[0]
    result = apply_fusion(model, attention.RULES, attention.is_candidate)
    assert (result.fired, result.refused) == (1, [])
    *behind, node = model.graph
    assert node.op_type == "Attention"
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"scale": 1.0}
    assert [(unchanged.op_type, unchanged.inputs[1].const_value.numpy().tolist()) for unchanged in behind] == [("Reshape", [0] * 4)] * len(behind)
    sources = {unchanged.outputs[0]: unchanged.inputs[0].name for unchanged in behind}
    assert [sources.get(value, value.name) for value in node.inputs] == ["query", "key", "value", "mask"]
    assert list(sources.values()) == (["key", "value"] if n_kv_heads < n_heads else [])
    assert all((value.dtype, str(value.shape)) == (model.graph.inputs[1].dtype, str(model.graph.inputs[1].shape)) for value in sources)
    fused_y = run(model, feeds)[0]
    assert fused_y.dtype == dtype
    np.testing.assert_allclose(fused_y, unfused_y, rtol=tolerance, atol=tolerance)


def test_fuses_float16_softmax_without_casts(graph) -> None:
    """Attention without softmax_precision is that by definition."""
    model = graph(GROUPED_FLOAT32.replace("float", "float16"), constants=SMALLEST[np.float16])
    assert apply_fusion(model, attention.RULES, attention.is_candidate).fired == 1


def test_keeps_the_module_and_the_cache_as_outputs(graph) -> None:
    """Keys that are outputs of the graph stay, and Attention reads them."""
    text = FLOAT32.replace("=> (float[B,4,S,8] y)", "=> (float[B,4,S,8] y, float[B,4,T,8] present)")
    text = text.replace("    turned = Transpose<perm=[0,1,3,2]>(key)", "    present = Identity(key)\n    turned = Transpose<perm=[0,1,3,2]>(present)")
    model = graph(text, constants=SMALLEST[np.float32])
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "model.layers.3.self_attn"
    apply_fusion(model, attention.RULES, attention.is_candidate)
    assert [(node.op_type, node.metadata_props[MODULE_KEY]) for node in model.graph] == [
        ("Identity", "model.layers.3.self_attn"),
        ("Attention", "model.layers.3.self_attn"),
    ]
    assert [value.name for value in model.graph.node(1).inputs] == ["query", "present", "value", "mask"]


@pytest.mark.parametrize(
    ("text", "edits", "reason"),
    [
        (FLOAT32, {"Softmax<axis=-1>": "Softmax<axis=2>"}, "the softmax is not over the last axis, the keys"),
        (GROUPED_FLOAT16, {"Cast<to=1>": "Cast<to=11>"}, "the softmax is DOUBLE, not FLOAT"),
        (GROUPED_FLOAT16, {"Cast<to=10>": "Cast<to=16>"}, "the softmax is cast to BFLOAT16, the query is FLOAT16"),
        (FLOAT32, {"bool[B,1,S,T] mask": "bool[S,T] mask"}, "the mask is not bool [B, 1, S, T]"),
        (FLOAT32, {"bool[B,1,S,T] mask": "bool[B,4,S,T] mask"}, "the mask is not bool [B, 1, S, T]"),
        (FLOAT32, {"bool[B,1,S,T] mask": "int64[B,1,S,T] mask"}, "the mask is not bool [B, 1, S, T]"),
        (FLOAT32, {"perm=[0,1,3,2]": "perm=[0,3,1,2]"}, "the key is not transposed on its last two axes"),
        (GROUPED_FLOAT16, {"new_axis = {2}": "new_axis = {1}"}, "heads are tiled (0, 1, 0, 1); Attention repeats each one (0, 0, 1, 1)"),
        (GROUPED_FLOAT16, {"new_axis = {2}": "new_axis = {3}"}, "heads are not repeated on a new axis behind their own"),
        (GROUPED_FLOAT16, {"key_5d = Unsqueeze(key, new_axis)": "key_5d = Reshape(key, repeated)"}, "heads are expanded, but not on a new axis"),
        (
            GROUPED_FLOAT16,
            {"float16[B,2,3,T,8] key_repeated": "float16[B,2,3,U,8] key_repeated"},
            "heads ['B', 2, 'T', 8] are repeated to ['B', 2, 3, 'U', 8] and ['B', 6, 'T', 8]: more than the heads changes",
        ),
        (
            GROUPED_FLOAT16,
            {"float16[B,6,T,8] value_heads": "float16[B,T,6,8] value_heads"},
            "are repeated to ['B', 2, 3, 'T', 8] and ['B', 'T', 6, 8]: more than the heads changes",
        ),
        (GROUPED_FLOAT16, {"[B,2,3,T,8] key_repeated": "[B,2,G,T,8] key_repeated"}, "more than the heads changes"),
        (GROUPED_FLOAT16, {"[B,6,T,8] key_heads": "[B,6,U,8] key_heads"}, "more than the heads changes"),
        (GROUPED_FLOAT16, {"[B,2,3,T,8] key_repeated": "[B,2,4,T,8] key_repeated"}, "more than the heads changes"),
        (GROUPED_FLOAT16, {"float16[B,2,T,8] key": "float16[B,K,T,8] key"}, "more than the heads changes"),
        (GROUPED_FLOAT16, {"float16[B,2,T,8] key": "float16[2,T,8] key"}, "heads are not repeated on a new axis behind their own"),
        (FLOAT32, {"bool[B,1,S,T] mask": "bool[B,1,T] mask"}, "the mask is not bool [B, 1, S, T]"),
        (FLOAT32, {"float": "double"}, "masked scores are not set to the smallest DOUBLE"),
        (FLOAT32, {"float[B,4,T,8] value": "float[B,K,T,8] value"}, "query, key and value are not [B, heads, ·, D] with known numbers of heads"),
        (GROUPED_FLOAT16, {" float16[B,2,3,T,8] key_repeated,": ""}, "the shapes of the repeated heads are not known"),
        (FLOAT32, {"float[B,4,T,8] key": "float[B,K,T,8] key"}, "query, key and value are not [B, heads, ·, D] with known numbers of heads"),
        (FLOAT32, {"float[B,4,S,8] query": "float[B,S,8] query"}, "query, key and value are not [B, heads, ·, D]"),
        (FLOAT32, {"float[B,4,T,8] value": "float[B,2,T,8] value"}, "4 query heads can't share 4 key heads and 2 value heads"),
        (FLOAT32, {"[B,4,T,8] key": "[B,3,T,8] key", "[B,4,T,8] value": "[B,3,T,8] value"}, "4 query heads can't share 3 key heads"),
        (FLOAT32, {"scores = MatMul": "[scaled] scores = Mul"}, "its structure differs: scaled is Mul, expected MatMul"),
        (
            FLOAT32,
            {"masked = Where(mask, scores, fill)": "[added] masked = Add(scores, fill)"},
            "its structure differs: added is Add, expected Where",
        ),
    ],
)
def test_refuses_with_a_reason(graph, text, edits, reason) -> None:
    dtype = np.float16 if text is GROUPED_FLOAT16 else np.float32
    for before, after in edits.items():
        assert before in text
        text = text.replace(before, after)
    model = graph(text, constants=SMALLEST[dtype])
    result = apply_fusion(model, attention.RULES, attention.is_candidate)
    assert result.fired == 0
    assert "Attention" not in {node.op_type for node in model.graph}
    (refusal,) = result.refused
    assert refusal.node == "softmax"
    assert reason in refusal.reason


@pytest.mark.parametrize("fill", [-1e4, -np.inf, np.finfo(np.float16).min])
def test_refuses_a_fill_that_is_not_the_smallest_number(graph, fill) -> None:
    model = graph(FLOAT32, constants={"fill": np.array(fill, np.float32)})
    result = apply_fusion(model, attention.RULES, attention.is_candidate)
    assert result.fired == 0
    assert "masked scores are not set to the smallest FLOAT" in result.refused[0].reason


def test_refuses_a_fill_that_is_fed(graph) -> None:
    assert apply_fusion(graph(FLOAT32), attention.RULES, attention.is_candidate).fired == 0


def test_heads_of_a_known_number_of_keys_are_fused(graph) -> None:
    """Where all sizes are numbers, those of the heads are still the ones that are compared."""
    model = graph(GROUPED_FLOAT16.replace(",T,", ",5,").replace(",T]", ",5]"), constants=SMALLEST[np.float16])
    assert apply_fusion(model, attention.RULES, attention.is_candidate).fired == 1


def test_a_softmax_is_over_the_last_axis_if_nothing_is_said(graph) -> None:
    model = graph(FLOAT32.replace("Softmax<axis=-1>", "Softmax"), constants=SMALLEST[np.float32])
    assert apply_fusion(model, attention.RULES, attention.is_candidate).fired == 1


@pytest.mark.parametrize(("name", "reason"), [("mask", "the mask is not bool [B, 1, S, T]"), ("key", "query, key and value are not [B, heads")])
def test_refuses_an_input_of_unknown_shape(graph, name, reason) -> None:
    model = graph(FLOAT32, constants=SMALLEST[np.float32])
    next(value for value in model.graph.inputs if value.name == name).shape = None
    assert reason in apply_fusion(model, attention.RULES, attention.is_candidate).refused[0].reason


def test_refuses_repeated_heads_of_unknown_shape(graph) -> None:
    model = graph(GROUPED_FLOAT16, constants=SMALLEST[np.float16])
    next(node.outputs[0] for node in model.graph if node.outputs[0].name == "value_heads").shape = None
    assert "the shapes of the repeated heads are not known" in apply_fusion(model, attention.RULES, attention.is_candidate).refused[0].reason
