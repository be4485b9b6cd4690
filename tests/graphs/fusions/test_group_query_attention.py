"""Attention, cache and head layout become one node: same numbers with padding, past and shared buffers; near-misses are refused in words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.fusions import group_query_attention
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import apply_reader

B, S, P, H, K, D = 2, 3, 4, 4, 2, 8
T = P + S
LAYER = """
    {n}qh = Reshape({n}q, qheads) {n}qt = Transpose<perm={turn}>({n}qh) {n}qr = RotaryEmbedding{form}({n}qt, cos, sin, p) {n}qs = Mul({n}qr, scale)
    {n}kh = Reshape({n}k, kheads) {n}kt = Transpose<perm=[0,2,1,3]>({n}kh) {n}kr = RotaryEmbedding({n}kt, cos, {ksin}, p)
    {n}vh = Reshape({n}v, kheads) {n}vt = Transpose<perm=[0,2,1,3]>({n}vh)
    {n}K = Concat<axis={axis}>({n}pk, {n}kr) {n}V = Concat<axis=2>({n}pv, {n}vt) {n}Ku = Reshape({n}K, same) {n}Vu = Reshape({n}V, same)
    {n}a = Attention<scale={attention_scale}>({n}qs, {n}Ku, {n}Vu, mask) {n}at = Transpose<perm={turn}>({n}a) {n}y = Reshape({n}at, joined)"""
MASK = """
    sizeS = Shape<start=1, end=2>(ids) s = Squeeze(sizeS) sizeT = Shape<start=1, end=2>(m) t = Squeeze(sizeT)
    sizeP = Shape<start=2, end=3>(apk) past = Squeeze(sizeP) columns = Range(zero, t, {step}) new = Range(zero, s, one)
    turned = Unsqueeze(new, axis1) rows = Add(turned, past) before = {before}(columns, rows) itself = Equal(columns, rows)
    held = Unsqueeze(m, axes) tokens = Cast<to=9>(held) seen = And(before, tokens) mask = Or(seen, itself)"""
DEFAULTS = {"turn": "[0,2,1,3]", "form": "<interleaved=0>", "ksin": "sin", "axis": 2, "attention_scale": 1.0, "step": "one", "before": "Less"}


def text(dtype: str, layers: str = "a", **changes: object) -> str:
    """One layer or more on a mask that all share."""
    heads = "".join(
        f", {dtype}[B,S,{H * D}] {n}q, {dtype}[B,S,{K * D}] {n}k, {dtype}[B,S,{K * D}] {n}v, {dtype}[B,{K},P,{D}] {n}pk, {dtype}[B,{K},P,{D}] {n}pv"
        for n in layers
    )
    outputs = ", ".join(f"{dtype}[B,S,{H * D}] {n}y, {dtype}[B,{K},T,{D}] {n}K, {dtype}[B,{K},T,{D}] {n}V" for n in layers)
    constants = "int64[4] qheads, int64[4] kheads, int64[4] same, int64[3] joined, int64 zero, int64 one, int64 two, int64[1] axis1, int64[2] axes"
    constants += f", {dtype} scale, {dtype}[16,{D // 2}] cos, {dtype}[16,{D // 2}] sin, {dtype}[16,{D // 2}] other"
    body = MASK.format(**DEFAULTS | changes) + "".join(LAYER.format(n=n, **DEFAULTS | changes) for n in layers)
    return f"g (int64[B,S] ids, int64[B,T] m, int64[B,S] p{heads}, {constants}) => ({outputs}) {{{body}\n}}"


def make(graph, dtype="float", layers="a", **changes) -> ir.Model:
    angle = np.arange(16)[:, None] * 0.3 ** np.arange(D // 2)
    floats = np.float32 if dtype == "float" else np.float16
    tables = {"cos": np.cos(angle).astype(floats), "sin": np.sin(angle).astype(floats), "other": np.sin(angle).astype(floats)}
    shapes = {"qheads": [0, 0, H, D], "kheads": [0, 0, K, D], "same": [0] * 4, "joined": [0, 0, H * D], "axis1": [1], "axes": [1, 2]}
    constants = {name: np.array(values, np.int64) for name, values in (shapes | {"zero": 0, "one": 1, "two": 2}).items()}
    model = graph(text(dtype, layers, **changes), constants | tables | {"scale": np.array(0.3, floats)})
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name, shape in {"tokens": ["B", 1, 1, "T"], "mask": ["B", 1, "S", "T"], **{f"{n}y": ["B", "S", H * D] for n in layers}}.items():
        values[name].shape = ir.Shape(shape)
    values["tokens"].type = ir.TensorType(ir.DataType.BOOL)
    for node in model.graph:
        node.metadata_props["module"] = f"model.layers.{'ab'.index(node.outputs[0].name[0])}" if node.outputs[0].name[1:] in ("y", "a") else "model"
        node.name = node.outputs[0].name
    return model


def feeds(random, dtype=np.float32, layers="a") -> dict[str, np.ndarray]:
    """Row 1 is padded by two columns on the left."""
    mask = np.ones((B, T), np.int64)
    mask[1, :2] = 0
    known = {"ids": np.zeros((B, S), np.int64), "m": mask, "p": np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, P:]}
    shapes = {"q": (B, S, H * D), "k": (B, S, K * D), "v": (B, S, K * D), "pk": (B, K, P, D), "pv": (B, K, P, D)}
    return known | {n + name: random(*shape, dtype=dtype) for n in layers for name, shape in shapes.items()}


def single(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The padded row alone: several new tokens over a past need a batch of one."""
    return {name: array[1:] for name, array in given.items()}


@pytest.mark.parametrize(("dtype", "floats", "tolerance"), [("float", np.float32, 1e-5), ("float16", np.float16, 4e-3)])
def test_fuses_to_one_node_and_keeps_the_numbers(graph, run, random, dtype, floats, tolerance):
    model, given = make(graph, dtype), single(feeds(random, floats))
    before = run(model, given)
    result = apply_reader(model, group_query_attention)
    assert (result.fired, result.refused) == (1, [])
    (node,) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "num_heads": H, "kv_num_heads": K, "scale": pytest.approx(0.3, rel=1e-3), "do_rotary": 0,
    }  # fmt: skip
    assert node.domain == CONTRIB
    assert node.metadata_props["module"] == "model.layers.0"
    assert model.graph.opset_imports[CONTRIB] == 1
    assert [value.name for value in model.graph.outputs] == ["ay", "aK", "aV"]
    assert not {"Attention", "Concat", "Transpose", "Mul", "Less", "And"} & {node.op_type for node in model.graph}
    rotations = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert [(node.attributes["num_heads"].value, node.attributes["interleaved"].value) for node in rotations] == [(H, 0), (K, 0)]
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=tolerance, atol=tolerance)


def test_left_padded_batch_keeps_the_numbers_in_prompt_and_decode(graph, run, random):
    given = feeds(random)
    prompt = given | {name: given[name][:, :, :0] for name in ("apk", "apv")} | {"m": given["m"][:, :S]}
    prompt["p"] = np.maximum(np.cumsum(prompt["m"], axis=1) - 1, 0)
    decode = {name: array[:, :1] if name in ("ids", "aq", "ak", "av") else array for name, array in given.items()}
    decode |= {"m": given["m"][:, : P + 1], "p": given["p"][:, :1]}
    for call in (prompt, decode):
        model = make(graph)
        before = run(model, call)
        apply_reader(model, group_query_attention)
        for ours, theirs in zip(run(model, call), before, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_several_new_tokens_over_a_past_need_a_batch_of_one(graph, run, random):
    """ONNX Runtime's own limit, in its own words; docs/adr/012 names it."""
    model = make(graph)
    apply_reader(model, group_query_attention)
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1"):
        run(model, feeds(random))


def test_past_longer_than_what_it_holds_is_not_read(graph, run, random):
    """Past and present may be one buffer of any capacity: only its first P columns count."""
    model, given = make(graph), {name: array[:1] for name, array in feeds(random).items()}
    apply_reader(model, group_query_attention)
    exact = run(model, given)
    room = {name: np.pad(given[name], ((0, 0), (0, 0), (0, 5), (0, 0)), constant_values=7.0) for name in ("apk", "apv")}
    roomy = run(model, given | room)
    np.testing.assert_allclose(roomy[0], exact[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(roomy[1][:, :, :T], exact[1])


def test_layers_share_what_depends_on_no_layer(graph):
    model = make(graph, layers="ab")
    assert apply_reader(model, group_query_attention).fired == 2
    counts = {op: sum(node.op_type == op for node in model.graph) for op in ("Where", "Or", "Expand", "GroupQueryAttention")}
    assert counts == {"Where": 1, "Or": 1, "Expand": 1, "GroupQueryAttention": 2}
    (bias,) = [node for node in model.graph if node.op_type == "Where"]
    assert bias.metadata_props["module"] == "model"
    first, second = (node for node in model.graph if node.op_type == "GroupQueryAttention")
    assert [first.inputs[index] for index in (5, 6, 10)] == [second.inputs[index] for index in (5, 6, 10)]


REFUSED = {
    "rescaled": ({"attention_scale": 0.5}, "it has no mask, or rescales query and key itself"),
    "interleaved": ({"form": "<interleaved=1>"}, "the query is rotated in interleaved pairs, or in part"),
    "in part": ({"form": "<rotary_embedding_dim=4>"}, "the query is rotated in interleaved pairs, or in part"),
    "other table": ({"ksin": "other"}, "query and key are rotated by different tables or positions"),
    "other axis": ({"axis": 0}, "the key is not the past and the new ones behind it, joined on axis 2"),
    "turned otherwise": (
        {"turn": "[1,2,0,3]"},
        "the query is not a linear's output [B, S, heads · D] that is reshaped and turned to [B, heads, S, D]",
    ),
    "later columns": ({"before": "Greater"}, "the mask is not: (column < row and the column holds a token) or column = row"),
    "every second": ({"step": "two"}, "columns and rows of the mask are not counted from 0 to the number of columns and of new tokens"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, changes, reason):
    model = make(graph, **changes)
    result = apply_reader(model, group_query_attention)
    assert (result.fired, [refusal.reason for refusal in result.refused]) == (0, [reason])


def edited(graph, edit) -> str:
    """The reason after an edit of the good graph."""
    model = make(graph)
    edit({value.name: value for node in model.graph for value in node.outputs}, model)
    result = apply_reader(model, group_query_attention)
    assert result.fired == 0
    return result.refused[0].reason


def test_refuses_parts_that_are_not_what_they_should_be(graph):
    def unrotated(values, _):
        values["aqs"].producer().replace_input_with(0, values["aqt"])

    def values_rotated(values, _):
        values["aV"].producer().replace_input_with(1, values["akr"])

    def mask_of_rows(values, _):
        values["tokens"].shape = ir.Shape(["B", 1, "S", "T"])

    def shape_of_three(_, model):
        model.graph.initializers["qheads"].const_value = ir.tensor(np.array([0, 5, H, D]))

    def heads_that_do_not_divide(_, model):
        model.graph.initializers["qheads"].const_value = ir.tensor(np.array([0, 0, 3, D]))

    def read_twice(values, model):
        model.graph.append(ir.node("Identity", [values["aa"]]))

    assert edited(graph, unrotated) == "query and key are rotated, values are not: here it is otherwise"
    assert edited(graph, values_rotated) == "query and key are rotated, values are not: here it is otherwise"
    assert edited(graph, mask_of_rows) == "which columns hold tokens is BOOL ('B', 1, 'S', 'T'), not bool [B, 1, 1, T]"
    assert edited(graph, shape_of_three) == "the query is reshaped to (0, 5, 4, 8), not to [0, 0, heads, D]"
    assert edited(graph, heads_that_do_not_divide) == "3 query heads can't share 2 key heads and 2 value heads"
    assert edited(graph, read_twice) == "its result is not turned and reshaped to [B, S, H · D]"
