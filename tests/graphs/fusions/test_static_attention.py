from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import static_attention
from graphs.rewriting import apply_fusion

FLOAT32 = """
agraph (float[B,4,S,8] query, float[B,2,S,8] new_key, float[B,2,S,8] new_value, int64[B] cache_write_indices, int64[B] key_value_lengths,
        float[B,2,C,8] past_key, float[B,2,C,8] past_value) => (float[B,4,S,8] y, float[B,2,C,8] key, float[B,2,C,8] value)
<int64 zero = {0}, int64 one = {1}, int64[1] second = {1}, int64[2] middle = {1, 2}, int64[1] last = {3}, int64[4] unchanged = {0, 0, 0, 0},
 int64[C] slots, int64[S] row, int64[S,1] rows, int64[B] start, int64[B,1,1] start_3d, int64[B,1,1,1] start_4d, int64[B,1,S,1] up_to,
 int64[B,1,1] first_3d, int64[B,1,1,1] first_4d, int64[B,1,S,1] own_slot, bool[B,1,S,C] causal, bool[B,1,S,C] own, bool[B,1,S,C] mask,
 float[B,2,C,8] keys, float[B,2,C,8] values>
{
    new_size = Shape<start=2, end=3>(query)
    new = Squeeze(new_size)
    capacity_size = Shape<start=2, end=3>(past_key)
    capacity = Squeeze(capacity_size)
    slots = Range(zero, capacity, one)
    row = Range(zero, new, one)
    rows = Unsqueeze(row, second)
    start = Sub(key_value_lengths, new)
    start_3d = Unsqueeze(start, middle)
    start_4d = Unsqueeze(start_3d, last)
    up_to = Add(rows, start_4d)
    first_3d = Unsqueeze(cache_write_indices, middle)
    first_4d = Unsqueeze(first_3d, last)
    own_slot = Add(rows, first_4d)
    causal = LessOrEqual(slots, up_to)
    own = Equal(slots, own_slot)
    mask = Or(causal, own)
    key = TensorScatter<axis=-2, mode="linear">(past_key, new_key, cache_write_indices)
    value = TensorScatter<axis=-2, mode="linear">(past_value, new_value, cache_write_indices)
    keys = Reshape(key, unchanged)
    values = Reshape(value, unchanged)
    [attention] y = Attention<scale=1.0>(query, keys, values, mask)
}
"""
CAPACITY = 12
CASES = [([0, 0], 5), ([0, 0], 1), ([3, 3], 4), ([7, 2], 1), ([7, 2], 3), ([11, 0], 1), ([8, 1], 4)]
"""Write indices of two rows, and how many new tokens: prefill, chunks and decode, even and ragged, up to the last slot."""


def feeds(random, indices, new, n_kv_heads, dtype):
    caches = {name: random(2, n_kv_heads, CAPACITY, 8, dtype=dtype) for name in ("past_key", "past_value")}
    tokens = {name: random(2, n_kv_heads, new, 8, dtype=dtype) for name in ("new_key", "new_value")}
    numbers = {"cache_write_indices": np.array(indices), "key_value_lengths": np.array(indices) + new}
    return {"query": random(2, 4, new, 8, dtype=dtype), **tokens, **numbers, **caches}


@pytest.mark.parametrize(("indices", "new"), CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 2**-9)], ids=["float32", "float16"])
@pytest.mark.parametrize("n_kv_heads", [2, 4], ids=["grouped", "multi-head"])
def test_masks_by_lengths_and_keeps_the_numbers(graph, run, random, dtype, tolerance, n_kv_heads, indices, new) -> None:
    text = FLOAT32.replace("[B,2,", f"[B,{n_kv_heads},").replace("float[", "float16[" if dtype == np.float16 else "float[")
    model = graph(text, opset=24)
    inputs = feeds(random, indices, new, n_kv_heads, dtype)
    unfused = run(model, inputs)
    result = apply_fusion(model, static_attention.RULES, static_attention.is_candidate)
    assert (result.fired, result.refused) == (1, [])
    node = model.graph.outputs[0].producer()
    assert (node.domain, node.op_type) == ("", "Attention")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"is_causal": 1, "scale": 1.0}
    assert [value and value.name for value in node.inputs] == ["query", "keys", "values", None, None, None, "key_value_lengths"]
    assert sorted(node.op_type for node in model.graph) == ["Attention", "Reshape", "Reshape", "TensorScatter", "TensorScatter"]  # the mask is gone
    assert [str(value.shape) for value in model.graph.outputs[1:]] == [f"[B,{n_kv_heads},C,8]"] * 2
    fused = run(model, inputs)
    np.testing.assert_allclose(fused[0], unfused[0], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(fused[1:], unfused[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_keeps_the_module_and_takes_a_cache_that_attention_reads_itself(graph) -> None:
    model = graph(FLOAT32.replace("(query, keys, values, mask)", "(query, key, value, mask)"), opset=24)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "model.layers.3.self_attn"
    assert apply_fusion(model, static_attention.RULES, static_attention.is_candidate).fired == 1
    node = model.graph.outputs[0].producer()
    assert [value.name for value in node.inputs[:3]] == ["query", "key", "value"]
    assert node.metadata_props[MODULE_KEY] == "model.layers.3.self_attn"


def test_layers_share_the_mask_until_the_last_has_lengths(graph) -> None:
    text = FLOAT32.replace("float[B,4,S,8] y,", "float[B,4,S,8] y, float[B,4,S,8] z,")
    model = graph(text.replace("    [attention]", "    z = Attention<scale=1.0>(query, keys, values, mask)\n    [attention]"), opset=24)
    assert apply_fusion(model, static_attention.RULES, static_attention.is_candidate).fired == 2
    assert not {"Or", "Range", "Shape"} & {node.op_type for node in model.graph}


CAUSAL_OR_OWN = "the mask is not Or(LessOrEqual, Equal): slots up to a token, or its own"
SLOTS = "the mask does not count the slots 0 … C−1 of the cache"
ROWS = "the mask does not count the new tokens 0 … S−1 from a start of each row"
UP_TO_LENGTHS = "the mask is not causal up to key_value_lengths − S"
OWN = "beside the slots up to a token the mask allows others than its own, from cache_write_indices"
NOT_WRITTEN = "keys or values are no cache that TensorScatter writes into"
NOT_IN_PLACE = "the cache is not written in place: it is no graph input, or the written one no graph output"
NOT_LINEAR = "TensorScatter does not write into slots that follow each other (axis -2, mode linear)"


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"Attention<scale=1.0>": "Attention<scale=0.5>"}, "attention has other attributes than scale = 1"),
        ({"Attention<scale=1.0>": "Attention<scale=1.0, is_causal=1>"}, "attention has other attributes than scale = 1"),
        ({"Attention<scale=1.0>": "Attention<scale=1.0, softcap=30.0>"}, "attention has other attributes than scale = 1"),
        ({'key = TensorScatter<axis=-2, mode="linear">(past_key, new_key, cache_write_indices)': "key = Identity(past_key)"}, NOT_WRITTEN),
        ({'value = TensorScatter<axis=-2, mode="linear">(past_value, new_value, cache_write_indices)': "value = Identity(past_value)"}, NOT_WRITTEN),
        ({'value = TensorScatter<axis=-2, mode="linear">': 'value = TensorScatter<axis=-2, mode="circular">'}, NOT_LINEAR),
        ({'key = TensorScatter<axis=-2, mode="linear">': 'key = TensorScatter<axis=1, mode="linear">'}, NOT_LINEAR),
        ({"(past_key, new_key,": "(copied, new_key,", "    key = Tensor": "    copied = Identity(past_key)\n    key = Tensor"}, NOT_IN_PLACE),
        ({", float[B,2,C,8] value)": ")"}, NOT_IN_PLACE),
        ({"(past_value, new_value, cache_write_indices)": "(past_value, new_value, start)"}, "the cache is not written from cache_write_indices on"),
        ({"(past_value, new_value, cache_write_indices)": "(past_value, new_value)"}, "the cache is not written from cache_write_indices on"),
        ({"bool[B,1,S,C] mask": "bool[B,4,S,C] mask"}, "the mask is not [B, 1, S, C]"),
        ({"float[B,2,C,8] keys": "float[B,2,U,8] keys"}, "the mask is not [B, 1, S, C]"),
        ({" float[B,2,C,8] keys,": ""}, "the shapes of query and keys are not known"),
        ({"mask = Or(causal, own)": "mask = And(causal, own)"}, CAUSAL_OR_OWN),
        ({"mask = Or(causal, own)": "mask = Or(own, causal)"}, CAUSAL_OR_OWN),
        ({"causal = LessOrEqual": "causal = Less"}, CAUSAL_OR_OWN),
        ({"own = Equal(slots, own_slot)": "own = LessOrEqual(slots, own_slot)"}, CAUSAL_OR_OWN),
        ({"slots = Range(zero,": "slots = Range(one,"}, SLOTS),
        ({"slots = Range(zero, capacity, one)": "slots = Range(zero, capacity, two)", "int64 one = {1}": "int64 one = {1}, int64 two = {2}"}, SLOTS),
        ({"slots = Range(zero, capacity": "slots = Range(zero, new"}, SLOTS),
        ({"slots = Range(zero, capacity, one)": "counted = Range(zero, capacity, one)\n    slots = Identity(counted)"}, SLOTS),
        ({",C,8]": ",?,8]", "S,C]": "S,?]", "int64[C]": "int64[?]"}, SLOTS),  # an unknown size is equal to no other
        ({"own = Equal(slots,": "own = Equal(row,"}, SLOTS),
        ({"causal = LessOrEqual(slots,": "causal = LessOrEqual(row,"}, SLOTS),
        ({"row = Range(zero,": "row = Range(one,"}, ROWS),
        ({"row = Range(zero, new": "row = Range(zero, capacity"}, ROWS),
        ({"up_to = Add(": "up_to = Sub("}, ROWS),
        ({"int64[B,1,S,1] own_slot": "int64[1,B,S,1] own_slot"}, ROWS),
        ({"start = Sub(key_value_lengths, new)": "start = Sub(key_value_lengths, one)"}, UP_TO_LENGTHS),
        ({"start = Sub(key_value_lengths, new)": "start = Sub(cache_write_indices, new)"}, UP_TO_LENGTHS),
        ({"start = Sub(key_value_lengths, new)": "start = Sub(key_value_lengths, capacity)"}, UP_TO_LENGTHS),
        ({"start = Sub(": "start = Add("}, UP_TO_LENGTHS),
        ({"first_3d = Unsqueeze(cache_write_indices": "first_3d = Unsqueeze(key_value_lengths"}, OWN),
    ],
)
def test_refuses_with_a_reason(graph, edits, reason) -> None:
    text = FLOAT32
    for before, after in edits.items():
        assert before in text
        text = text.replace(before, after)
    model = graph(text, opset=24)
    before_nodes = [node.op_type for node in model.graph]
    result = apply_fusion(model, static_attention.RULES, static_attention.is_candidate)
    assert result.fired == 0
    (refusal,) = result.refused
    assert refusal.node == "attention"
    assert reason in refusal.reason
    assert [node.op_type for node in model.graph if node.op_type == "Attention"] == [op for op in before_nodes if op == "Attention"]


def test_refuses_a_query_of_unknown_shape(graph) -> None:
    model = graph(FLOAT32, opset=24)
    model.graph.inputs[0].shape = None
    result = apply_fusion(model, static_attention.RULES, static_attention.is_candidate)
    assert "the shapes of query and keys are not known" in result.refused[0].reason


@pytest.mark.parametrize(("name", "reason"), [("key_value_lengths", UP_TO_LENGTHS), ("cache_write_indices", "is not written from")])
def test_refuses_numbers_that_are_not_fed(graph, name, reason) -> None:
    """The contract of the graph's inputs makes a token's own slot one of those in use; constants have none."""
    model = graph(FLOAT32, constants={name: np.array([5, 5])}, opset=24)
    result = apply_fusion(model, static_attention.RULES, static_attention.is_candidate)
    assert result.fired == 0
    assert reason in result.refused[0].reason


@pytest.mark.parametrize(("op_type", "n_inputs", "expected"), [("Attention", 4, True), ("Attention", 3, False), ("Concat", 4, False)])
def test_only_attention_with_a_mask_is_a_candidate(op_type, n_inputs, expected) -> None:
    node = ir.node(op_type, [ir.Value(name=f"x{index}") for index in range(n_inputs)])
    assert static_attention.is_candidate(node) is expected


def test_attention_with_lengths_already_is_no_candidate(graph) -> None:
    model = graph(FLOAT32, opset=24)
    apply_fusion(model, static_attention.RULES, static_attention.is_candidate)
    result = apply_fusion(model, static_attention.RULES, static_attention.is_candidate)
    assert (result.fired, result.refused) == (0, [])
