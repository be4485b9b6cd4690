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
    {n}vh = Reshape({n}v, vheads) {n}vt = Transpose<perm=[0,2,1,3]>({n}vh)
    {n}K = Concat<axis={axis}>({n}pk, {n}kr) {n}V = Concat<axis=2>({n}pv, {n}vt) {n}Ku = Reshape({n}K, same) {n}Vu = Reshape({n}V, same)
    {n}a = Attention{attributes}({n}qs, {operands}) {n}at = Transpose<perm={turn_back}>({n}a) {n}y = Reshape({n}at, joined)"""
MASK = """
    sizeS = Shape<start=1, end=2>(ids) s = Squeeze(sizeS) sizeT = Shape<start=1, end=2>(m) t = Squeeze(sizeT)
    sizeP = Shape<start=2, end=3>(apk) past = Squeeze(sizeP) columns = Range(zero, t, {step}) new = Range(zero, s, one)
    turned = Unsqueeze(new, axis1) rows = Add(turned, past) before = {before}(columns, rows) itself = Equal(columns, rows)
    held = Unsqueeze(m, axes) tokens = Cast<to=9>(held) seen = And(before, tokens) mask = Or(seen, itself)"""
TURN = "[0,2,1,3]"
DEFAULTS = {"turn": TURN, "turn_back": TURN, "form": "<interleaved=0>", "ksin": "sin", "axis": 2, "attributes": "<scale=1.0>"}
DEFAULTS |= {"operands": "{n}Ku, {n}Vu, mask", "step": "one", "before": "Less"}


def text(dtype: str, layers: str = "a", **changes: object) -> str:
    """One layer or more on a mask that all share."""
    heads = "".join(
        f", {dtype}[B,S,{H * D}] {n}q, {dtype}[B,S,{K * D}] {n}k, {dtype}[B,S,{K * D}] {n}v, {dtype}[B,{K},P,{D}] {n}pk, {dtype}[B,{K},P,{D}] {n}pv"
        for n in layers
    )
    outputs = ", ".join(f"{dtype}[B,S,{H * D}] {n}y, {dtype}[B,{K},T,{D}] {n}K, {dtype}[B,{K},T,{D}] {n}V" for n in layers)
    constants = "int64[4] qheads, int64[4] kheads, int64[4] vheads, int64[4] same, int64[3] joined"
    constants += ", int64 zero, int64 one, int64 two, int64[1] axis1, int64[2] axes"
    constants += f", {dtype} scale, {dtype}[16,{D // 2}] cos, {dtype}[16,{D // 2}] sin, {dtype}[16,{D // 2}] other"
    fields = DEFAULTS | changes
    body = MASK.format(**fields) + "".join(LAYER.format(n=n, **fields | {"operands": str(fields["operands"]).format(n=n)}) for n in layers)
    return f"g (int64[B,S] ids, int64[B,T] m, int64[B,S] p{heads}, {constants}) => ({outputs}) {{{body}\n}}"


def make(graph, dtype="float", layers="a", **changes) -> ir.Model:
    angle = np.arange(16)[:, None] * 0.3 ** np.arange(D // 2)
    floats = np.float32 if dtype == "float" else np.float16
    tables = {"cos": np.cos(angle).astype(floats), "sin": np.sin(angle).astype(floats), "other": np.sin(angle).astype(floats)}
    shapes = {
        "qheads": [0, 0, H, D],
        **dict.fromkeys(("kheads", "vheads"), (0, 0, K, D)),
        "same": [0] * 4,
        "joined": [0, 0, H * D],
        "axis1": [1],
        "axes": [1, 2],
    }
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
    assert [(value.dtype, value.shape) for value in node.outputs[:1]] == [(ir.DataType.from_numpy(np.dtype(floats)), ["B", "S", H * D])]
    assert node.metadata_props["module"] == "model.layers.0"
    assert model.graph.opset_imports[CONTRIB] == 1
    assert [value.name for value in model.graph.outputs] == ["ay", "aK", "aV"]
    assert not {"Attention", "Concat", "Transpose", "Mul", "Less", "And"} & {node.op_type for node in model.graph}
    rotations = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert [(node.attributes["num_heads"].value, node.attributes["interleaved"].value) for node in rotations] == [(H, 0), (K, 0)]
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("changes", [{"form": "<interleaved=1>"}, {"form": ""}, {"axis": -2}], ids=["pairs", "halves by default", "axis from behind"])
def test_keeps_the_rotation_and_reads_the_axis_from_either_end(graph, run, random, changes):
    model, given = make(graph, **changes), single(feeds(random))
    before = run(model, given)
    assert apply_reader(model, group_query_attention).fired == 1
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_all_layers_share_is_typed_and_adds_nothing_where_a_column_counts(graph):
    model = make(graph, "float16")
    apply_reader(model, group_query_attention)
    made = {name.partition(".")[2]: value.const_value.numpy().tolist() for name, value in model.graph.initializers.items() if "GroupQuery" in name}
    assert made == {"one": 1, "axis": [1], "zero": 0.0, "smallest": -65504.0, "one_int32": 1}
    (node,) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    bias, seqlens, total = (node.inputs[index] for index in (10, 5, 6))
    allowed = bias.producer().inputs[0]
    padding, itself = allowed.producer().inputs
    turned = itself.producer().inputs[1]
    rows, length, batch = turned.producer().inputs[0], *(value for value in seqlens.producer().inputs)
    assert padding.name == "tokens"
    described = {name: (value.dtype.name, value.shape) for name, value in locals().items() if isinstance(value, ir.Value) and name != "padding"}
    assert described == {
        "bias": ("FLOAT16", ["B", 1, "S", "T"]), "allowed": ("BOOL", ["B", 1, "S", "T"]), "itself": ("BOOL", ["S", "T"]),
        "turned": ("INT64", ["S", 1]), "rows": ("INT64", ["S"]), "seqlens": ("INT32", ["B"]), "total": ("INT32", []), "length": ("INT32", []),
        "batch": ("INT64", [1]),
    }  # fmt: skip
    assert batch.producer().attributes["end"].value == 1


def test_one_key_head_and_a_cache_that_attention_reads_itself(graph):
    """Multi-query attention; and no Reshape between the cache and Attention, as where heads are not grouped."""
    model = make(graph, operands="{n}K, {n}V, mask")
    for name in ("kheads", "vheads"):
        model.graph.initializers[name].const_value = ir.tensor(np.array([0, 0, 1, D]))
    for value in model.graph.inputs:
        if value.name in ("ak", "av"):
            value.shape = ir.Shape(["B", "S", D])
    assert apply_reader(model, group_query_attention).fired == 1
    (node,) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert (node.attributes["num_heads"].value, node.attributes["kv_num_heads"].value) == (H, 1)


def test_attention_of_another_domain_is_no_candidate(graph):
    model = make(graph)
    (node,) = [node for node in model.graph if group_query_attention.is_candidate(node)]
    node.domain = "com.microsoft"
    assert not group_query_attention.is_candidate(node)


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


def test_onnx_runtime_takes_no_heads_of_12(graph, run, random):
    """Its own limit, in its own words: why they are refused."""
    inputs = "float[B,S,48] q, float[B,S,24] k, float[B,S,24] v, float[B,2,P,12] pk, float[B,2,P,12] pv, int32[B] less, int32 total"
    node = "GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, pk, pv, less, total)"
    model = graph(f"g ({inputs}) => (float[B,S,48] y, float[B,2,T,12] pk2, float[B,2,T,12] pv2) {{ y, pk2, pv2 = com.microsoft.{node} }}")
    model.graph.opset_imports[CONTRIB] = 1
    shapes = {"q": (1, 1, 48), "k": (1, 1, 24), "v": (1, 1, 24), "pk": (1, 2, 3, 12), "pv": (1, 2, 3, 12)}
    given = {name: random(*shape) for name, shape in shapes.items()} | {"less": np.array([3], np.int32), "total": np.array(4, np.int32)}
    with pytest.raises(Exception, match="head_size must be a multiple of 8"):
        run(model, given)


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


NO_CACHE = "the {} is not the past and the new ones behind it, joined on axis 2"
NOT_PLAIN = "it has no mask, or other attributes than scale = 1"
NO_HEADS = "the query is not a linear's output [B, S, heads · D] that is reshaped and turned to [B, heads, S, D]"
NOT_JOINED = "its result is not turned and reshaped to [B, S, H · D]"
REFUSED = {
    "rescaled": ({"attributes": "<scale=0.5>"}, NOT_PLAIN),
    "the default scale": ({"attributes": ""}, NOT_PLAIN),
    "causal": ({"attributes": "<scale=1.0, is_causal=1>"}, NOT_PLAIN),
    "no mask": ({"operands": "{n}Ku, {n}Vu"}, NOT_PLAIN),
    "an empty mask": ({"operands": "{n}Ku, {n}Vu, , {n}pk, {n}pv"}, NOT_PLAIN),
    "in part": ({"form": "<rotary_embedding_dim=4>"}, "the query is rotated in part"),
    "other table": ({"ksin": "other"}, "query and key are rotated by different tables or positions"),
    "other axis": ({"axis": 0}, NO_CACHE.format("key")),
    "the axis before it": ({"axis": -3}, NO_CACHE.format("key")),
    "turned otherwise": ({"turn": "[1,2,0,3]"}, NO_HEADS),
    "turned back otherwise": ({"turn_back": "[1,2,0,3]"}, NOT_JOINED),
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
    edit({value.name: value for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))}, model)
    result = apply_reader(model, group_query_attention)
    assert result.fired == 0
    return result.refused[0].reason


def fed(reader: str, operand: int, source: str):
    """An edit: a node reads another value."""
    return lambda values, _: values[reader].producer().replace_input_with(operand, values[source])


def shaped(**shapes: list[int]):
    """An edit: constants that are shapes."""

    def edit(_, model) -> None:
        for name, shape in shapes.items():
            model.graph.initializers[name].const_value = ir.tensor(np.array(shape))

    return edit


def read_by(value: str):
    """An edit: somebody else reads a value too."""
    return lambda values, model: model.graph.append(ir.node("Identity", [values[value]]))


def sized(value: str, *shape: str | int):
    """An edit: a value is of another shape."""
    return lambda values, _: setattr(values[value], "shape", ir.Shape(shape))


def computed_shape(values, model) -> None:
    made = ir.node("Identity", [model.graph.initializers["qheads"]])
    model.graph.insert_before(values["aqh"].producer(), made)
    values["aqh"].producer().replace_input_with(1, made.outputs[0])


def three_are_joined(values, _) -> None:
    concat = values["aV"].producer()
    concat.resize_inputs(3)
    concat.replace_input_with(2, values["avt"])


ROTATED = "query and key are rotated, values are not: here it is otherwise"
HEADS = "the query is reshaped to {}, not to [0, 0, heads, D]"
UNLIKE = f"heads of unlike sizes: {H} query heads in {H * D} columns, {K} others in {{}} and {{}}"
EDITS = {
    "the query is not rotated": (fed("aqs", 0, "aqt"), ROTATED),
    "the key is not rotated": (fed("aK", 1, "akt"), ROTATED),
    "the value is rotated": (fed("aV", 1, "akr"), ROTATED),
    "the query is not turned": (fed("aqr", 0, "aqh"), NO_HEADS),
    "the query is not reshaped": (fed("aqt", 0, "apk"), NO_HEADS),
    "the query is no linear's output": (sized("aq", "B", H * D), NO_HEADS),
    "the shape has another axis": (shaped(qheads=[0, 5, H, D]), HEADS.format((0, 5, H, D))),
    "the shape has another batch": (shaped(qheads=[5, 0, H, D]), HEADS.format((5, 0, H, D))),
    "the shape has three axes": (shaped(qheads=[0, 0, H]), HEADS.format((0, 0, H))),
    "the number of heads is left open": (shaped(qheads=[0, 0, 0, D]), HEADS.format((0, 0, 0, D))),
    "the shape is computed": (computed_shape, HEADS.format(None)),
    "heads that do not divide": (shaped(qheads=[0, 0, 3, D]), "3 query heads can't share 2 key heads and 2 value heads"),
    "fewer value heads": (shaped(vheads=[0, 0, 1, 2 * D]), "4 query heads can't share 2 key heads and 1 value heads"),
    "heads of 12": (sized("aq", "B", "S", H * 12), "4 heads in 48 columns are not of a multiple of 8 elements, as the operator needs"),
    "larger keys": (sized("ak", "B", "S", K * 16), UNLIKE.format(K * 16, K * D)),
    "larger values": (
        sized("av", "B", "S", K * 16),
        UNLIKE.format(K * D, K * 16),
    ),
    "heads of any size": (sized("aq", "B", "S", "N"), "4 heads in N columns are not of a multiple of 8 elements, as the operator needs"),
    "the key has no past": (fed("aKu", 0, "akr"), NO_CACHE.format("key")),
    "the value has no past": (fed("aVu", 0, "avt"), NO_CACHE.format("value")),
    "the value joins three": (three_are_joined, NO_CACHE.format("value")),
    "keys behind another Reshape": (shaped(same=[0, 0, -1, 0]), NO_CACHE.format("key")),
    "padding by row": (sized("tokens", "B", 1, "S", "T"), "which columns hold tokens is BOOL ('B', 1, 'S', 'T'), not bool [B, 1, 1, T]"),
    "the result is read twice": (read_by("aa"), f"{NOT_JOINED}, but read by Transpose, Identity"),
    "the turned result is read twice": (read_by("aat"), f"{NOT_JOINED}, but read by Reshape, Identity"),
    "the result is not turned": (fed("ay", 0, "aa"), f"{NOT_JOINED}, but read by Transpose, Reshape"),
    "the result keeps its heads": (shaped(joined=[0, 0, H, D]), NOT_JOINED),
    "the result joins heads and positions": (shaped(joined=[0, -1, D]), NOT_JOINED),
}


@pytest.mark.parametrize(("edit", "reason"), EDITS.values(), ids=EDITS)
def test_refuses_parts_that_are_not_what_they_should_be(graph, edit, reason):
    assert edited(graph, edit) == reason
