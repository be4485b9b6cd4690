from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from graphs.fusions import foreign_attention
from graphs.fusions._reading import apply_reader
from graphs.fusions._stacked_heads import NOT_STACKED

H, K, D, SCALE = 4, 2, 8, 0.25
HEAD = (
    f"agraph (float[2,{H},3,{D}] query, float[2,{K},2,{D}] past_key, float[2,{K},3,{D}] new_key, float[2,{K},2,{D}] past_value,\n"
    f" float[2,{K},3,{D}] new_value, bool[2,1,3,5] allowed) => (float[2,heads,3,{D}] y)\n"
    "<float scale = {0.25}, float root = {0.5}, float four = {4}, float zero = {0}, float one = {1}, float least = {-3.4028234663852886e+38},\n"
    " float ten = {10}, float loose = {-10000}, int64[1] two = {2}, int64[1] first = {1},\n"
    f" int64[5] repeated = {{2, {K}, 2, 5, {D}}}, int64[5] tiled = {{2, 2, {K}, 5, {D}}}, int64[4] joined = {{2, {H}, 5, {D}}},\n"
    " float billion = {-1000000000}, int64[4] each = {0, 0, 1, 1}, int64[5] groups = {1, 1, 2, 1, 1},\n"
    f" int64[4] rows = {{0, {K}, -1, 0}}, int64[4] heads = {{0, {H}, -1, 0}},\n"
    f" int64[3] flat = {{{2 * H}, 5, {D}}}, int64[3] crossed = {{4, 10, {D}}}, int64[4] unflat = {{2, {H}, {D}, 5}}>\n{{\n"
    "key = Concat<axis=2>(past_key, new_key)\n value = Concat<axis=-2>(past_value, new_value)\n"
)
KEYS = "key5 = Unsqueeze(key, two)\n key_more = Expand(key5, repeated)\n keys = Reshape(key_more, joined)\n"
VALUES = "value5 = Unsqueeze(value, two)\n value_more = Expand(value5, repeated)\n values = Reshape(value_more, joined)\n"
TURN = "turned = Transpose<perm=[0,1,3,2]>(keys)\n"
TURN_ON_THREE = "flat_keys = Reshape(keys, flat)\n flat_turned = Transpose<perm=[0,2,1]>(flat_keys)\n turned = Reshape(flat_turned, unflat)\n"
SCORES = "raw = MatMul(query, turned)\n scores = Mul(raw, scale)\n"
BIAS = "bias = Where(allowed, zero, least)\n masked = Add(scores, bias)\n"
END = "[softmax] weights = Softmax<axis=-1>(masked)\n y = MatMul(weights, values)\n}"
GUARDED = "[softmax] soft = Softmax<axis=-1>(masked)\n odd = IsNaN(soft)\n weights = Where(odd, zero, soft)\n y = MatMul(weights, values)\n}"
TEXT = HEAD + KEYS + VALUES + TURN + SCORES + BIAS + END
ONE_NODE = HEAD + KEYS + VALUES + "[softmax] y = Attention<scale=0.25>(query, keys, values, allowed)\n}"
STACKED = HEAD + (
    "stacked = Reshape(query, rows)\n turned = Transpose<perm=[0,1,3,2]>(key)\n"
    + SCORES.replace("query", "stacked")
    + "twice = Concat<axis=2>(allowed, allowed)\n"
    " masked = Where(twice, scores, least)\n [softmax] weights = Softmax(masked)\n both = MatMul(weights, value)\n y = Reshape(both, heads)\n}"
)
HALF_SCORES = (
    "query16 = Cast<to=10>(query)\n keys16 = Cast<to=10>(keys)\n turned16 = Transpose<perm=[0,1,3,2]>(keys16)\n"
    "raw16 = MatMul(query16, turned16)\n raw = Cast<to=1>(raw16)\n scores = Mul(raw, scale)\n"
)
PRODUCT = "banned = Not(allowed)\n number = Cast<to=1>(banned)\n bias = Mul(number, least)\n masked = Add(scores, bias)\n"
SUMMED = "bias = Where(allowed, zero, least)\n biases = Add(bias, bias)\n sum = Add(scores, biases)\n masked = Max(sum, least)\n"
WRITTEN = "written = ScatterElements<axis=2>(key, slots, new_key)\n key5 = Unsqueeze(written, two)"
SPLIT_SCALE = "half_query = Mul(query, root)\n half_turned = Mul(turned, root)\n scores = MatMul(half_query, half_turned)\n"


@pytest.fixture
def attention(graph):
    def make(text):
        return common_passes.ShapeInferencePass()(graph(text)).model

    return make


@pytest.fixture
def given(random):
    """No row is fully masked, and a row attends to itself: key 2 + i for query i."""
    allowed = np.array([[[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 1, 1, 1]]] * 2, bool)[:, None]
    allowed[0, 0, :, 0] = False
    return {"query": random(2, H, 3, D), **cache(random, K), "allowed": allowed}


def cache(random, heads):
    """Two past tokens and three new ones."""
    return {f"{age}_{kind}": random(2, heads, rows, D) for kind in ("key", "value") for age, rows in (("past", 2), ("new", 3))}


def fuse(model):
    return apply_reader(model, foreign_attention)


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        (TEXT, "", ""),
        (TEXT, TURN, TURN_ON_THREE),
        (TEXT, "Mul(raw, scale)", "Mul(scale, raw)"),
        (TEXT, "Mul(raw, scale)", "Div(raw, four)"),
        (TEXT, SCORES, SPLIT_SCALE),
        (TEXT, "raw = MatMul(query, turned)\n scores = Mul(raw, scale)", "scaled = Mul(query, scale)\n scores = MatMul(scaled, turned)"),
        (TEXT, "raw = MatMul(query, turned)\n scores = Mul(raw, scale)", "scaled = Mul(turned, scale)\n scores = MatMul(query, scaled)"),
        (TEXT, "Add(scores, bias)", "Add(bias, scores)"),
        (TEXT, TURN, "scaled = Mul(keys, scale)\n turned0 = Transpose<perm=[0,1,3,2]>(scaled)\n turned = Div(turned0, scale)\n"),
        (TEXT, SCORES + BIAS, "scaled = Mul(keys, scale)\n turned2 = Transpose<perm=[0,1,3,2]>(scaled)\n scores = MatMul(query, turned2)\n" + BIAS),
        (TEXT, BIAS, "masked = Where(allowed, scores, least)\n"),
        (TEXT, BIAS, "banned = Not(allowed)\n masked = Where(banned, least, scores)\n"),
        (TEXT, BIAS, "banned = Not(allowed)\n bias = Where(banned, least, zero)\n masked = Add(scores, bias)\n"),
        (TEXT, BIAS, BIAS.replace("masked = Add(scores, bias)", "once = Add(scores, bias)\n masked = Add(once, bias)")),
        (TEXT, END, GUARDED),
        (TEXT, END, END.replace("y = MatMul(weights", "same = Cast<to=1>(weights)\n y = MatMul(same")),
        (TEXT, END, END.replace("y = MatMul(weights", "once = Cast<to=1>(weights)\n same = Cast<to=1>(once)\n y = MatMul(same")),
        (TEXT, "Softmax<axis=-1>", "Softmax<axis=3>"),
        (TEXT, "Softmax<axis=-1>", "Softmax"),
        (TEXT, "Where(allowed, zero, least)", "Where(allowed, zero, billion)"),
        (TEXT, KEYS, "keys = Gather<axis=1>(key, each)\n"),
        (TEXT, VALUES, VALUES.replace("Expand(value5, repeated)", "Tile(value5, groups)")),
        (ONE_NODE, "", ""),
        (ONE_NODE, "keys, values, allowed)", "keys, values, bias)"),
        (STACKED, "", ""),
    ],
)
def test_fuses_every_spelling_and_keeps_the_numbers(attention, run, given, text, before, after) -> None:
    assert before in text
    changed = text.replace(before, after)
    if "values, bias" in changed:
        changed = changed.replace("[softmax] y", "bias = Where(allowed, zero, least)\n [softmax] y")
    model = attention(changed)
    unfused_y = run(model, given)[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    kinds = [node.op_type for node in model.graph]
    assert not {"Softmax", "MatMul", "Expand", "Transpose", "Where", "Reshape", "IsNaN"} & set(kinds)
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"scale": 1.0}
    assert [value.name for value in node.inputs[1:3]] == ["key", "value"]
    assert (node.inputs[0].shape, node.inputs[3].dtype, node.inputs[3].shape) == ([2, H, 3, D], ir.DataType.BOOL, [None, 1, 3, 5])
    scaled = node.inputs[0].producer()
    assert (scaled.op_type, scaled.inputs[0].name) == ("Mul", "query")
    assert scaled.inputs[1].const_value.numpy() == pytest.approx(SCALE)
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [PRODUCT, SUMMED, SUMMED.replace("(sum, least)", "(least, sum)")])
def test_a_mask_of_numbers_allows_what_it_holds_zero_for(attention, run, given, bias) -> None:
    """However they were put together: here by a product, and by a sum that overflows and is bounded again."""
    model = attention(TEXT.replace(BIAS, bias))
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    (node,) = (node for node in model.graph if node.op_type == "Equal" and node.inputs[0].dtype == ir.DataType.FLOAT)
    assert node.inputs[1].const_value.numpy() == 0
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-5, atol=1e-6)


def test_two_masks_become_one(attention, run, given) -> None:
    """What each query may see, and which keys are padding."""
    text = TEXT.replace("bool[2,1,3,5] allowed)", "bool[2,1,3,5] allowed, bool[2,1,1,5] real)")
    both = BIAS.replace("masked = Add(scores, bias)", "seen = Add(scores, bias)\n masked = Where(real, seen, least)")
    model = attention(text.replace(BIAS, both))
    given["real"] = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], bool)[:, None, None]
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    assert [node.op_type for node in model.graph].count("And") == 1
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-5, atol=1e-6)


def test_multi_head_attention_that_is_scaled_already_gets_no_product(attention, run, random) -> None:
    text = TEXT.replace(f"float[2,{K},", f"float[2,{H},").replace(
        "turned = Transpose<perm=[0,1,3,2]>(keys)", "turned = Transpose<perm=[0,1,3,2]>(key)"
    )
    text = (
        text.replace(KEYS, "")
        .replace(VALUES, "")
        .replace("MatMul(weights, values)", "MatMul(weights, value)")
        .replace("Mul(raw, scale)", "Mul(raw, one)")
    )
    model = attention(text)
    given = {"query": random(2, H, 3, D), **cache(random, H), "allowed": np.ones((2, 1, 3, 5), bool)}
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert [value.name for value in node.inputs[:3]] == ["query", "key", "value"]
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softmax", [END, GUARDED], ids=["plain", "guarded"])
def test_a_fully_masked_row_attends_to_itself(attention, run, given, softmax) -> None:
    """Query i is the same token as key T − S + i; the other rows do not change."""
    given["allowed"][1, 0, 1] = False
    model = attention(TEXT.replace(END, softmax))
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    y = run(model, given)[0]
    np.testing.assert_allclose(y[1, :, 1], given["new_value"][1, [0, 0, 1, 1], 1], rtol=1e-6)
    np.testing.assert_allclose(np.delete(y, 1, axis=2), np.delete(unfused_y, 1, axis=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "before", "after", "reason"),
    [
        (TEXT, "Softmax<axis=-1>", "Softmax<axis=2>", "the soft-max is not over the last axis"),
        (TEXT, "y = MatMul(weights, values)", "y = Mul(query, query)\n left = Exp(weights)", "the soft-max's result is not multiplied by values"),
        (TEXT, BIAS, "odd = Exp(raw)\n masked = Where(allowed, odd, least)\n", "the scores come from Exp"),
        (TEXT, "bias = Where(allowed, zero, least)\n masked = Add(scores, bias)", "masked = Identity(scores)", "the scores come from Identity"),
        (TEXT, BIAS + END, END.replace("(masked)", "(scores)"), "there is no mask"),
        (TEXT, "Where(allowed, zero, least)", "Where(allowed, zero, loose)", "the mask is added as numbers other than 0 and the smallest"),
        (TEXT, "Where(allowed, zero, least)", "Where(allowed, least, one)", "the mask is added as numbers other than 0 and the smallest"),
        (TEXT, "Where(allowed, zero, least)", "Where(allowed, loose, zero)", "the mask is added as numbers other than 0 and the smallest"),
        (TEXT, "Where(allowed, zero, least)", "Where(allowed, one, least)", "the mask is added as numbers other than 0 and the smallest"),
        (TEXT, "Where(allowed, zero, least)", "Cast<to=1>(allowed)", "numbers other than 0 and the smallest: [0.0, 1.0]"),
        (TEXT, "Where(allowed, zero, least)", "Exp(scores)", "the mask is added as numbers that come from Exp, maybe others than 0"),
        (TEXT, BIAS, "masked = Where(allowed, scores, loose)\n", "masked scores are not set to the smallest number"),
        (
            TEXT,
            END,
            END.replace("y = MatMul(weights", "half = Cast<to=10>(weights)\n same = Cast<to=1>(half)\n y = MatMul(same"),
            "the soft-max's result is rounded to FLOAT16 on its way to values of FLOAT",
        ),
        (TEXT, BIAS, SUMMED.replace("(sum, least)", "(sum, loose)"), "the scores come from Max"),
        (
            TEXT,
            BIAS,
            SUMMED.replace("Where(allowed, zero, least)", "Where(allowed, zero, loose)"),
            "other than 0 and the smallest: [-20000.0, -10000.0, 0.0]",
        ),
        (
            TEXT,
            "masked = Add(scores, bias)",
            "sum = Add(scores, bias)\n masked = Mul(sum, scale)",
            "masked scores are scaled: the mask would be scaled too",
        ),
        (
            TEXT,
            BIAS,
            SUMMED.replace("masked = Max", "late = Max") + "masked = Mul(late, scale)\n",
            "masked scores are scaled: the mask would be scaled too",
        ),
        (
            TEXT,
            TURN,
            "late = Transpose<perm=[0,2,1,3]>(keys)\n turned = Transpose<perm=[0,2,3,1]>(late)\n",
            "the key is transposed otherwise than on its last two axes",
        ),
        (TEXT, TURN, TURN_ON_THREE.replace("keys, flat", "keys, crossed"), "the key is not transposed, but comes from Reshape"),
        (TEXT, TURN, TURN_ON_THREE.replace("[0,2,1]", "[0,1,2]"), "the key is not transposed, but comes from Reshape"),
        (
            TEXT,
            TURN,
            "turned3 = Transpose<perm=[0,2,1]>(flat3)\n turned = Reshape(turned3, unflat)\n",
            "the key is not transposed, but comes from Re",
        ),
        (TEXT, TURN, "turned = Reshape(keys, unflat)\n", "the key is not transposed, but comes from Reshape"),
        (TEXT, "bool[2,1,3,5]", f"bool[2,{H},3,5]", "the mask is [2, 4, 3, 5], not [B, 1, S, T]"),
        (TEXT, "bool[2,1,3,5]", "bool[2,1,1,5]", "no mask has a row for each query"),
        (TEXT, "Unsqueeze(key, two)", "Unsqueeze(key, first)", "heads are tiled (0, 1, 0, 1), not repeated on a new axis behind their own"),
        (TEXT, "MatMul(weights, values)", "MatMul(weights, query5)", "4 query heads can't share 2 key heads and 4 value heads"),
        (TEXT, "Where(odd, zero, soft)", "Where(odd, one, soft)", "the soft-max's result is replaced where it is not NaN"),
        (TEXT, "IsNaN(soft)", "IsInf(soft)", "the soft-max's result is replaced where it is not NaN"),
        (TEXT, BIAS, "masked = Where(allowed, fed, least)\n", "the soft-max is not of a product of query and key"),
        (TEXT, SCORES, HALF_SCORES, "the query is FLOAT16, the value FLOAT"),
        (TEXT, "Unsqueeze(key, two)", "Unsqueeze(slim, two)", "more than the heads changes"),
        (TEXT, BIAS, "masked0 = Where(allowed, scores, least)\n masked = Mul(masked0, scale)\n", "masked scores are scaled: the mask would be"),
        (TEXT, BIAS, "wide = Cast<to=11>(scores)\n back = Cast<to=1>(wide)\n" + BIAS.replace("Add(scores", "Add(back"), "the scores come from Cast"),
        (TEXT, BIAS, SUMMED.replace("Max(sum", "Min(sum"), "the scores come from Min"),
        (TEXT, "raw = MatMul(query, turned)", "raw = MatMul(query, left_key)", "the key is not transposed, but comes from an input"),
        (ONE_NODE, "keys, values, allowed", "key, longer, allowed", "there are 3 queries, 5 keys and 6 values: not known, or not alike"),
        (ONE_NODE, "(query, keys, values", "(query, some_heads, some_heads", "4 query heads can't share K key heads and K value heads"),
        (ONE_NODE, "(query, keys, values", "(some_queries, keys, values", "H query heads can't share 2 key heads and 2 value heads"),
        (ONE_NODE, "(query, keys, values", "(few, keys, values", "there are None queries, 5 keys and 5 values: not known"),
        (ONE_NODE, "y = Attention", "y, k, v = Attention", "the Attention node has 4 inputs and 3 outputs"),
        (TEXT, "Reshape(value_more, joined)", "Reshape(value_more, fed4)", "query, key and value are not [B, heads"),
        (ONE_NODE, "(query, keys, values", "(three, key, value", "3 query heads can't share 2 key heads and 2 value heads"),
        (ONE_NODE, "scale=0.25>(query, key", "scale=0.25, q_num_heads=4, kv_num_heads=4>(rank3, key", "query, key and value are not [B, heads"),
        (ONE_NODE, "scale=0.25", "scale=0.25, is_causal=1", "causal from its first key on"),
        (ONE_NODE, "scale=0.25", "scale=0.25, softcap=10.0", "causal from its first key on, or caps its scores"),
        (ONE_NODE, "keys, values, allowed", "keys, values", "the Attention node has 3 inputs"),
        (ONE_NODE, "<scale=0.25>(query, keys, values", "(unknown, keys, values", "the scale is not given, and head_dim is not known"),
        (TEXT, "Unsqueeze(key, two)", "Unsqueeze(fixed, two)", "there are 5 keys; expected as many as past and new tokens"),
        (TEXT, "Unsqueeze(value, two)", "Unsqueeze(fixed, two)", "there are 5 values; expected as many as past and new tokens"),
        (TEXT, "Concat<axis=2>(past_key, new_key)", "Concat<axis=2>(new_key, past_key)", "keys end with [2, 2, 2, 8]; expected the 3 new rows"),
        (TEXT, "key5 = Unsqueeze(key, two)", WRITTEN, "keys come from ScatterElements: a cache of fixed capacity"),
        (ONE_NODE, "(query, keys, values", "(query, unknown, unknown", "keys and None values: not known, or not alike"),
        (STACKED, "Concat<axis=2>(allowed, allowed)", "Concat<axis=2>(allowed, allowed5)", NOT_STACKED),
    ],
)
def test_refuses_with_a_reason(attention, text, before, after, reason) -> None:
    text = text if before in text else text.replace(END, GUARDED)
    assert before in text
    changed = text.replace(before, after)
    fed = {
        "query5": f"float[2,{H},5,{D}]",
        "unknown": f"float[2,{H},?,{'?' if '(unknown' in after else D}]",
        "three": f"float[2,3,3,{D}]",
        "rank3": f"float[2,3,{H * D}]",
        "flat3": f"float[{2 * H},5,{D}]",
        "left_key": f"float[2,{H},{D},5]",
        "longer": f"float[2,{K},6,{D}]",
        "some_heads,": f"float[2,K,5,{D}]",
        "some_queries": f"float[2,H,3,{D}]",
        "few": f"float[2,{H},?,{D}]",
        "slim": f"float[2,{K},1,{D}]",
        "fixed": f"float[2,{K},5,{D}]",
        "slots": f"int64[2,{K},3,{D}]",
        "fed,": f"float[2,{H},3,5]",
        "fed4": "int64[N]",
        "allowed5": "bool[2,1,3,5]",
    }
    for name, type_ in fed.items():
        if name in after:
            changed = changed.replace("bool[2,1,3,5] allowed)", f"bool[2,1,3,5] allowed, {type_} {name.strip(',')})")
    result = fuse(attention(changed))
    assert result.fired == 0
    (refusal,) = result.refused
    assert refusal.node == "softmax"
    assert reason in refusal.reason


def test_refuses_heads_that_are_tiled(attention) -> None:
    """0, 1, 0, 1 instead of 0, 0, 1, 1: the same shapes, other heads."""
    text = TEXT.replace("Unsqueeze(value, two)", "Unsqueeze(value, first)").replace("Expand(value5, repeated)", "Expand(value5, tiled)")
    result = fuse(attention(text))
    assert result.fired == 0
    assert "heads are tiled (0, 1, 0, 1), not repeated on a new axis behind their own" in result.refused[0].reason


def test_attention_that_only_repeats_heads_is_a_candidate(attention, run, given) -> None:
    model = attention(ONE_NODE.replace("scale=0.25", "scale=1.0"))
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert [value.name for value in node.inputs[:3]] == ["query", "key", "value"]
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-5, atol=1e-6)


def test_finished_attention_is_no_candidate(attention) -> None:
    text = HEAD + "y = Attention<scale=1.0>(query, key, value, allowed)\n}"
    assert [foreign_attention.is_candidate(node) for node in attention(text).graph if node.op_type == "Attention"] == [False]


def test_attention_without_a_scale_gets_one_over_the_root_of_head_dim(attention, run, given) -> None:
    model = attention(ONE_NODE.replace("<scale=0.25>", ""))
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert node.inputs[0].producer().inputs[1].const_value.numpy() == pytest.approx(D**-0.5)
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-5, atol=1e-6)


HALF_HEAD = HEAD.replace(" float[2,", " float16[2,").replace("(float[2,", "(float16[2,", 1)
HALF = HALF_HEAD + KEYS + VALUES + TURN + "raw = MatMul(query, turned)\n wide = Cast<to=1>(raw)\n scores = Mul(wide, scale)\n" + BIAS
WIDE_VALUES = "[softmax] weights = Softmax<axis=-1>(masked)\n wide_values = Cast<to=1>(values)\n y = MatMul(weights, wide_values)\n}"


def test_float16_values_that_are_widened_for_the_product_are_read_as_they_are(attention, run, given) -> None:
    half = {name: array if array.dtype == bool else array.astype(np.float16) for name, array in given.items()}
    model = attention(HALF + WIDE_VALUES)
    unfused_y = run(model, half)[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert [value.name for value in node.inputs[1:3]] == ["key", "value"]
    assert [value.dtype for value in (*node.inputs[:3], *node.outputs)] == [10, 10, 10, 10]
    (widened,) = (use.node for use in node.outputs[0].uses())
    assert (widened.op_type, widened.attributes["to"].value, widened.outputs[0].name) == ("Cast", 1, "y")
    fused_y = run(model, half)[0]
    assert (fused_y.dtype, unfused_y.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(fused_y, unfused_y, rtol=2**-8, atol=2**-9)


def test_refuses_values_that_are_widened_from_another_dtype(attention) -> None:
    narrowed = WIDE_VALUES.replace("wide_values = Cast<to=1>(values)", "long = Cast<to=11>(values)\n wide_values = Cast<to=1>(long)")
    result = fuse(attention(HALF + narrowed))
    assert result.fired == 0
    assert result.refused[0].reason == "the query is FLOAT16, the value FLOAT"


@pytest.mark.parametrize(
    ("inputs", "candidate"),
    [
        ("(query, keys, value, allowed)", True),
        ("(query, key, values, allowed)", True),
        ("(query, key, value, masks)", False),
        ("(query, keys, values, allowed)", True),
    ],
)
def test_attention_that_repeats_one_of_both_is_a_candidate(graph, inputs, candidate) -> None:
    text = HEAD + KEYS + VALUES + "masks = Reshape(allowed, shape)\n" + f"y = Attention<scale=1.0>{inputs}\n}}"
    model = graph(text.replace("<float scale", "<int64[4] shape = {2, 1, 3, 5}, float scale"))
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert foreign_attention.is_candidate(node) == candidate


def test_attention_of_a_runtime_is_no_candidate(attention) -> None:
    (node,) = (node for node in attention(ONE_NODE).graph if node.op_type == "Attention")
    node.domain = "com.microsoft"
    assert not foreign_attention.is_candidate(node)


def test_a_given_scale_needs_no_head_dim(attention) -> None:
    text = ONE_NODE.replace(f"float[2,{H},3,{D}] query", f"float[2,{H},3,?] query")
    assert fuse(attention(text)).fired == 1


def test_refuses_a_softmax_without_heads(attention) -> None:
    text = "agraph (float[2,3,5] scores, float[2,5,8] values) => (y) { [softmax] weights = Softmax<axis=-1>(scores)\n y = MatMul(weights, values) }"
    (refusal,) = fuse(attention(text)).refused
    assert "the soft-max is not over the last axis of [B, heads, S, T], the keys" in refusal.reason


def test_refuses_a_key_that_is_turned_on_three_axes_of_unknown_size(attention) -> None:
    """Whether heads stay apart can't be seen where the batch is not known."""
    model = attention(TEXT.replace(TURN, TURN_ON_THREE))
    for node in model.graph:
        for value in node.outputs:
            if value.name in ("keys", "turned"):
                value.shape = ir.Shape([None, *value.shape[1:]])
    assert "the key is not transposed, but comes from Reshape" in fuse(model).refused[0].reason


def test_refuses_weights_that_are_multiplied_from_the_left(attention) -> None:
    text = TEXT.replace(f"(float[2,heads,3,{D}] y)", "(y)").replace("allowed)", f"allowed, float[2,{H},{D},3] left)", 1)
    (refusal,) = fuse(attention(text.replace("y = MatMul(weights, values)", "y = MatMul(left, weights)"))).refused
    assert "the soft-max's result is not multiplied by values" in refusal.reason
