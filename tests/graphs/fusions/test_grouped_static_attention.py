"""Attention over a static cache becomes one node that writes and rotates: same numbers in prompt, chunk and ragged decode; near-misses refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.fusions import grouped_static_attention
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import apply_reader

B, H, K, D, C = 2, 4, 2, 16, 12
N_POSITIONS = 32
LAYER = """
    {n}qh = Reshape({n}q, qheads) {n}qt = Transpose<perm=[0,2,1,3]>({n}qh) {n}qr = RotaryEmbedding{form}({n}qt, cos, sin, p) {n}qs = Mul({n}qr, scale)
    {n}kh = Reshape({n}k, kheads) {n}kt = Transpose<perm=[0,2,1,3]>({n}kh) {n}kr = RotaryEmbedding{kform}({n}kt, {kcos}, {ksin}, {kp})
    {n}vh = Reshape({n}v, vheads) {n}vt = Transpose<perm=[0,2,1,3]>({n}vh)
    {n}K = {kwrite}({n}pk, {n}kr, {kfrom}) {n}V = {vwrite}({n}pv, {n}vt, {vfrom}) {n}Ku = Reshape({n}K, same) {n}Vu = Reshape({n}V, same)
    {n}a = Attention{attributes}({n}qs, {operands}) {n}at = Transpose<perm={turn_back}>({n}a) {n}y = Reshape({n}at, joined)"""
WRITE = 'TensorScatter<axis=-2, mode="linear">'
INDICES, LENGTHS = "cache_write_indices", "key_value_lengths"
DEFAULTS = {"form": "<interleaved=0>", "kform": "<interleaved=0>", "kcos": "cos", "ksin": "sin", "kp": "p", "turn_back": "[0,2,1,3]"}
DEFAULTS |= {"kwrite": WRITE, "vwrite": WRITE, "kfrom": INDICES, "vfrom": INDICES, "attributes": "<is_causal=1, scale=1.0>"}
DEFAULTS |= {"operands": "{n}Ku, {n}Vu, , , , key_value_lengths"}


def text(dtype: str, layers: str = "a", **changes: str) -> str:
    """One layer or more over the two numbers of each row that all share."""
    tokens = [(f"{n}{part}", f"B,S,{heads * D}") for n in layers for part, heads in (("q", H), ("k", K), ("v", K))]
    caches = [(f"{n}{part}", f"B,{K},C,{D}") for n in layers for part in ("pk", "pv")]
    given = "".join(f", {dtype}[{shape}] {name}" for name, shape in tokens + caches)
    results = ", ".join(f"{dtype}[B,S,{H * D}] {n}y, {dtype}[B,{K},C,{D}] {n}K, {dtype}[B,{K},C,{D}] {n}V" for n in layers)
    numbers = f"int64[B] {INDICES}, int64[B] {LENGTHS}, int64[B] others, int64[B,S] p, int64[B,S] p2, bool[B,1,S,C] mask"
    constants = "int64[4] qheads, int64[4] kheads, int64[4] vheads, int64[4] same, int64[3] joined"
    constants += f", {dtype} scale, {dtype}[{N_POSITIONS},{D // 2}] cos, {dtype}[{N_POSITIONS},{D // 2}] sin, {dtype}[{N_POSITIONS},{D // 2}] other"
    fields = DEFAULTS | changes
    body = "".join(LAYER.format(n=n, **fields | {"operands": fields["operands"].format(n=n)}) for n in layers)
    return f"g ({numbers}{given}, {constants}) => ({results}) {{{body}\n}}"


def make(graph, dtype="float", layers="a", **changes) -> ir.Model:
    angle = np.arange(N_POSITIONS)[:, None] * 0.3 ** np.arange(D // 2)
    floats = np.float32 if dtype == "float" else np.float16
    tables = {"cos": np.cos(angle).astype(floats), "sin": np.sin(angle).astype(floats), "other": np.sin(angle).astype(floats)}
    shapes = {"qheads": (0, 0, H, D), "kheads": (0, 0, K, D), "vheads": (0, 0, K, D), "same": (0, 0, 0, 0), "joined": (0, 0, H * D)}
    constants = {name: np.array(shape, np.int64) for name, shape in shapes.items()}
    model = graph(text(dtype, layers, **changes), constants | tables | {"scale": np.array(0.3, floats)}, opset=24)
    for node in model.graph:
        name = node.name = node.outputs[0].name
        node.metadata_props["module"] = f"model.layers.{'ab'.index(name[0])}.self_attn"
    return model


def feeds(random, indices, new, dtype=np.float32, layers="a") -> dict[str, np.ndarray]:
    """New tokens of each row from its own slot on, whose positions are their slots."""
    start = np.array(indices)
    positions = start[:, None] + np.arange(new)
    known = {INDICES: start, LENGTHS: start + new, "p": positions, "p2": positions, "others": start, "mask": np.ones((len(start), 1, new, C), bool)}
    shapes = {"q": (new, H * D), "k": (new, K * D), "v": (new, K * D), "pk": (K, C, D), "pv": (K, C, D)}
    return known | {n + name: random(len(start), *shape, dtype=dtype) for n in layers for name, shape in shapes.items()}


def fed(model: ir.Model, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the graph asks for."""
    return {value.name: given[value.name] for value in model.graph.inputs}


def grouped(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


CALLS = {"prompt": ([0, 0], 5), "one token": ([0, 0], 1), "decode": ([7, 2], 1), "last slot": ([11, 0], 1), "chunk": ([3], 4), "to the end": ([4], 8)}
"""Write indices of each row, and how many new tokens. A prompt that is padded on the right is as long in every row: its padding is written too."""


@pytest.mark.parametrize(("indices", "new"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float", 1e-5), ("float16", 4e-3)])
def test_keeps_the_numbers(graph, run, random, dtype, tolerance, indices, new) -> None:
    model = make(graph, dtype)
    given = fed(model, feeds(random, indices, new, np.float32 if dtype == "float" else np.float16))
    before = run(model, given)
    result = apply_reader(model, grouped_static_attention)
    assert (result.fired, result.refused) == (1, [])
    attended, *written = run(model, given)
    np.testing.assert_allclose(attended.astype(np.float32), before[0].astype(np.float32), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(written, before[1:], strict=True):
        assert ours.shape == theirs.shape == (len(indices), K, C, D)
        for row, length in enumerate(given[LENGTHS]):  # what lies behind is nobody's
            np.testing.assert_allclose(ours[row, :, :length], theirs[row, :, :length], rtol=tolerance, atol=tolerance)


def test_one_node_is_left_and_what_counts_for_it(graph) -> None:
    model = make(graph)
    result = apply_reader(model, grouped_static_attention)
    assert (result.fired, result.refused) == (1, [])
    assert sorted(node.op_type for node in model.graph) == ["Cast", "Cast", "GroupQueryAttention", "ReduceMax", "Sub"]
    (node,) = grouped(model)
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "num_heads": H, "kv_num_heads": K, "scale": pytest.approx(0.3), "do_rotary": 1,
    }  # fmt: skip
    assert (node.domain, model.graph.opset_imports[CONTRIB]) == (CONTRIB, 1)
    assert node.metadata_props["module"] == "model.layers.0.self_attn"
    *operands, seqlens, total, cos, sin, positions = node.inputs
    assert [value.name for value in (*operands, cos, sin, positions)] == ["aq", "ak", "av", "apk", "apv", "cos", "sin", "p"]
    assert list(node.outputs) == list(model.graph.outputs)
    assert [(value.name, value.dtype, value.shape) for value in node.outputs] == [
        ("ay", ir.DataType.FLOAT, ["B", "S", H * D]),
        ("aK", ir.DataType.FLOAT, ["B", K, "C", D]),
        ("aV", ir.DataType.FLOAT, ["B", K, "C", D]),
    ]
    (less_one,), (largest,) = seqlens.producer().inputs, total.producer().inputs
    assert [(value.dtype, value.shape) for value in (less_one, seqlens, largest, total)] == [
        (ir.DataType.INT64, ["B"]), (ir.DataType.INT32, ["B"]), (ir.DataType.INT64, []), (ir.DataType.INT32, []),
    ]  # fmt: skip
    assert (less_one.producer().op_type, less_one.producer().inputs[0].name) == ("Sub", LENGTHS)
    assert less_one.producer().inputs[1].const_value.numpy().tolist() == 1
    assert (largest.producer().op_type, largest.producer().inputs[0].name) == ("ReduceMax", LENGTHS)
    assert largest.producer().attributes["keepdims"].value == 0


def test_layers_share_what_depends_on_no_layer(graph, run, random) -> None:
    model = make(graph, layers="ab")
    given = fed(model, feeds(random, [7, 2], 1, layers="ab"))
    before = run(model, given)
    assert apply_reader(model, grouped_static_attention).fired == 2
    assert sorted(node.op_type for node in model.graph) == ["Cast", "Cast", "GroupQueryAttention", "GroupQueryAttention", "ReduceMax", "Sub"]
    first, second = grouped(model)
    assert first.inputs[5:] == second.inputs[5:]
    assert [value.name for value in model.graph.outputs] == ["ay", "aK", "aV", "by", "bK", "bV"]
    for ours, theirs in zip(run(model, given)[::3], before[::3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_takes_a_cache_that_attention_reads_itself(graph) -> None:
    """As where heads are not grouped: no Reshape between the cache and Attention."""
    model = make(graph, operands="{n}K, {n}V, , , , key_value_lengths")
    assert apply_reader(model, grouped_static_attention).fired == 1
    assert not {"TensorScatter", "Reshape"} & {node.op_type for node in model.graph}


def test_several_new_tokens_over_a_past_need_a_batch_of_one(graph, run, random) -> None:
    """ONNX Runtime's own limit, in its own words."""
    model = make(graph)
    apply_reader(model, grouped_static_attention)
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1"):
        run(model, fed(model, feeds(random, [3, 3], 4)))


def test_onnx_runtime_rotates_no_heads_of_8(graph, run, random) -> None:
    """Its own limit, in its own words: why they are refused."""
    inputs = "float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, float[B,2,C,8] pk, float[B,2,C,8] pv, int32[B] less, int32 total"
    node = "GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>(q, k, v, pk, pv, less, total, cos, sin)"
    model = graph(
        f"g ({inputs}, float[16,4] cos, float[16,4] sin) => (float[B,S,32] y, float[B,2,C,8] pk2, float[B,2,C,8] pv2) "
        f"{{ y, pk2, pv2 = com.microsoft.{node} }}",
        opset=24,
    )
    model.graph.opset_imports[CONTRIB] = 1
    shapes = {"q": (1, 1, 32), "k": (1, 1, 16), "v": (1, 1, 16), "pk": (1, 2, C, 8), "pv": (1, 2, C, 8), "cos": (16, 4), "sin": (16, 4)}
    given = {name: random(*shape) for name, shape in shapes.items()} | {"less": np.array([3], np.int32), "total": np.array(4, np.int32)}
    with pytest.raises(Exception, match="head_size shall be a multiple of 16"):
        run(model, given)


NOT_BY_LENGTHS = "it is not masked by lengths alone, causal and with scale = 1"
OTHER_LENGTHS = "its lengths are not the graph's key_value_lengths"
NO_CACHE = "the {} is no cache that TensorScatter writes into"
NOT_IN_PLACE = "the cache is not written in place: it is no graph input, or the written one no graph output"
NOT_LINEAR = "TensorScatter does not write into slots that follow each other (axis -2, mode linear)"
NOT_FROM = "the cache is not written from cache_write_indices on"
PAIRS = "the query or the key is rotated in interleaved pairs"
OTHER_TABLES = "query and key are rotated by different tables or positions"
ROTATED = "query and key are rotated, values are not: here it is otherwise"
NO_TABLES = "query and key are not rotated by tables [positions, D/2] that are read by positions"
NOT_JOINED = "its result is not turned and reshaped to [B, S, H · D]"
REFUSED = {
    "no lengths": ({"operands": "{n}Ku, {n}Vu"}, NOT_BY_LENGTHS),
    "a mask in their place": ({"operands": "{n}Ku, {n}Vu, mask"}, NOT_BY_LENGTHS),
    "one input before them": ({"operands": "{n}Ku, {n}Vu, , {n}pk, {n}pv"}, NOT_BY_LENGTHS),
    "a mask beside them": ({"operands": "{n}Ku, {n}Vu, mask, , , key_value_lengths"}, NOT_BY_LENGTHS),
    "not causal": ({"attributes": "<scale=1.0>"}, NOT_BY_LENGTHS),
    "causal by nothing": ({"attributes": "<is_causal=0, scale=1.0>"}, NOT_BY_LENGTHS),
    "rescaled": ({"attributes": "<is_causal=1, scale=0.5>"}, NOT_BY_LENGTHS),
    "the default scale": ({"attributes": "<is_causal=1>"}, NOT_BY_LENGTHS),
    "a softcap": ({"attributes": "<is_causal=1, scale=1.0, softcap=30.0>"}, NOT_BY_LENGTHS),
    "other numbers": ({"operands": "{n}Ku, {n}Vu, , , , others"}, OTHER_LENGTHS),
    "other axis of the key": ({"kwrite": 'TensorScatter<axis=1, mode="linear">'}, NOT_LINEAR),
    "a ring of values": ({"vwrite": 'TensorScatter<axis=-2, mode="circular">'}, NOT_LINEAR),
    "the key from elsewhere on": ({"kfrom": "others"}, NOT_FROM),
    "the value from elsewhere on": ({"vfrom": "others"}, NOT_FROM),
    "query in pairs": ({"form": "<interleaved=1>"}, PAIRS),
    "key in pairs": ({"kform": "<interleaved=1>"}, PAIRS),
    "in part": ({"form": "<rotary_embedding_dim=8>"}, "the query is rotated in part"),
    "another cosine": ({"kcos": "other"}, OTHER_TABLES),
    "another sine": ({"ksin": "other"}, OTHER_TABLES),
    "other positions": ({"kp": "p2"}, OTHER_TABLES),
    "turned back otherwise": ({"turn_back": "[1,2,0,3]"}, NOT_JOINED),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, changes, reason) -> None:
    model = make(graph, **changes)
    before = [node.op_type for node in model.graph]
    result = apply_reader(model, grouped_static_attention)
    assert (result.fired, [(refusal.node, refusal.reason) for refusal in result.refused]) == (0, [("aa", reason)])
    assert [node.op_type for node in model.graph if node.op_type in before] == [node.op_type for node in model.graph]


def reads(reader: str, operand: int, source: str):
    """An edit: a node reads another value."""
    return lambda values, _: values[reader].producer().replace_input_with(operand, values[source])


def shaped(**shapes: list[int]):
    """An edit: constants that are shapes."""

    def edit(_, model) -> None:
        for name, shape in shapes.items():
            model.graph.initializers[name].const_value = ir.tensor(np.array(shape))

    return edit


def sized(value: str, *shape: str | int):
    """An edit: a value is of another shape."""
    return lambda values, _: setattr(values[value], "shape", ir.Shape(shape))


def read_by(value: str):
    """An edit: somebody else reads a value too."""
    return lambda values, model: model.graph.append(ir.node("Identity", [values[value]]))


def no_output(name: str):
    """An edit: a written cache is not given out."""
    return lambda values, model: model.graph.outputs.remove(values[name])


def copied(name: str, *readers: str):
    """An edit: nodes read a copy of a value in its place."""

    def edit(values, model) -> None:
        copy = ir.node("Identity", [values[name]])
        model.graph.insert_before(next(iter(model.graph)), copy)
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name + "_copy", values[name].type, values[name].shape
        for reader in readers:
            node = values[reader].producer()
            node.replace_input_with(list(node.inputs).index(values[name]), copy.outputs[0])

    return edit


def no_positions(values, _) -> None:
    """An edit: rows of the tables are taken before, as RotaryEmbedding allows."""
    for name in ("aqr", "akr"):
        values[name].producer().resize_inputs(3)


EDITS = {
    "the key is not written": (reads("aKu", 0, "akr"), NO_CACHE.format("key")),
    "the value is not written": (reads("aVu", 0, "avt"), NO_CACHE.format("value")),
    "keys behind another Reshape": (shaped(same=[0, 0, -1, 0]), NO_CACHE.format("key")),
    "a past key that is no input": (copied("apk", "aK"), NOT_IN_PLACE),
    "a past value that is no input": (copied("apv", "aV"), NOT_IN_PLACE),
    "a present key that is no output": (no_output("aK"), NOT_IN_PLACE),
    "a present value that is no output": (no_output("aV"), NOT_IN_PLACE),
    "computed indices": (copied(INDICES, "aK"), NOT_FROM),
    "computed lengths": (copied(LENGTHS, "aa"), OTHER_LENGTHS),
    "the query is not rotated": (reads("aqs", 0, "aqt"), ROTATED),
    "the key is not rotated": (reads("aK", 1, "akt"), ROTATED),
    "the value is rotated": (reads("aV", 1, "akr"), ROTATED),
    "cosines of each token": (sized("cos", "B", "S", D // 2), NO_TABLES),
    "sines of each token": (sized("sin", "B", "S", D // 2), NO_TABLES),
    "no positions": (no_positions, NO_TABLES),
    "heads that do not divide": (shaped(qheads=[0, 0, 3, D]), "3 query heads can't share 2 key heads and 2 value heads"),
    "fewer value heads": (shaped(vheads=[0, 0, 1, 2 * D]), "4 query heads can't share 2 key heads and 1 value heads"),
    "heads of 8": (sized("aq", "B", "S", H * 8), "4 heads in 32 columns are not of a multiple of 16 elements, as the operator needs"),
    "heads of any size": (sized("aq", "B", "S", "N"), "4 heads in N columns are not of a multiple of 16 elements, as the operator needs"),
    "the result is read twice": (read_by("aa"), f"{NOT_JOINED}, but read by Transpose, Identity"),
    "the turned result is read twice": (read_by("aat"), f"{NOT_JOINED}, but read by Reshape, Identity"),
    "the result is not turned": (reads("ay", 0, "aa"), f"{NOT_JOINED}, but read by Transpose, Reshape"),
    "the result keeps its heads": (shaped(joined=[0, 0, H, D]), NOT_JOINED),
}


@pytest.mark.parametrize(("edit", "reason"), EDITS.values(), ids=EDITS)
def test_refuses_parts_that_are_not_what_they_should_be(graph, edit, reason) -> None:
    model = make(graph)
    known = (*model.graph.inputs, *model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs))
    edit({value.name: value for value in known}, model)
    result = apply_reader(model, grouped_static_attention)
    assert (result.fired, [refusal.reason for refusal in result.refused]) == (0, [reason])
    assert "Attention" in {node.op_type for node in model.graph}


def test_lengths_and_indices_that_are_not_fed_are_none(graph) -> None:
    """The contract is between two inputs of the graph; constants have none."""
    for name, reason in ((LENGTHS, OTHER_LENGTHS), (INDICES, NOT_FROM)):
        model = make(graph)
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.array([5, 5]), name=name)
        model.graph.initializers.add(value)
        result = apply_reader(model, grouped_static_attention)
        assert [refusal.reason for refusal in result.refused] == [reason]


@pytest.mark.parametrize(("op_type", "domain", "expected"), [("Attention", "", True), ("Attention", CONTRIB, False), ("Concat", "", False)])
def test_only_attention_of_the_standard_domain_is_a_candidate(op_type, domain, expected) -> None:
    assert grouped_static_attention.is_candidate(ir.node(op_type, [ir.Value(name="x")], domain=domain)) is expected
