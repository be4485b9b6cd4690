"""What the rules for foreign graphs leave of an attention becomes one GroupQueryAttention; near-misses are refused in words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.io_spec import BATCH, PAST, SEQUENCE, TOTAL
from graphs.fusions import foreign_group_query_attention
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import apply_reader

H, K, D, S, P = 4, 2, 8, 3, 2
LAYER = """
    {n}qh = Reshape({n}q, qheads) {n}qt = Transpose<perm=[0,2,1,3]>({n}qh) {n}qr = RotaryEmbedding{form}({n}qt, cos, sin) {n}qs = Mul({n}qr, scale)
    {n}kh = Reshape({n}k, kheads) {n}kt = Transpose<perm=[0,2,1,3]>({n}kh) {n}kr = RotaryEmbedding{form}({n}kt, cos, sin)
    {n}vh = Reshape({n}v, kheads) {n}vt = Transpose<perm=[0,2,1,3]>({n}vh)
    {n}K = Concat<axis=-2>({n}pk, {n}kr) {n}V = Concat<axis=2>({n}pv, {n}vt)
    {n}a = Attention{attributes}({n}qs, {n}K, {n}V{mask}) {n}at = Transpose<perm=[0,2,1,3]>({n}a) {n}y = Reshape({n}at, joined)"""
MASK = """
    sizeS = Shape<start=1>(ids) s = Squeeze(sizeS) sizeT = {total} t = Squeeze(sizeT) p = Sub(t, s)
    columns = Range(zero, t, one) counted = Range(p, t, one) rows = Unsqueeze(counted, axis1) held = Unsqueeze(attention_mask, axes)
    real = Cast<to=9>(held) before = {before}(columns, rows) seen = And(before, real) itself = Equal(columns, rows)
    mask = Or(seen, itself) number = Cast<to=1>(mask)"""
DEFAULTS = {"form": "<interleaved=0>", "attributes": "<scale=1.0>", "mask": ", mask", "before": "LessOrEqual"}
DEFAULTS |= {"total": "Shape<start=1>(attention_mask)", "heads": ""}
SIZES = {"B": BATCH, "S": SEQUENCE, "P": PAST, "T": TOTAL}


def make(graph, random, dtype="float", layers="a", **changes) -> ir.Model:
    """One layer or more on a mask that all share; values are typed as measuring types them."""
    floats, fields = np.float32 if dtype == "float" else np.float16, DEFAULTS | changes
    linears = {"q": H * D, "k": K * D, "v": K * D}
    inputs = [f"{dtype}[B,S,{width}] {n}{name}" for n in layers for name, width in linears.items()]
    inputs += [f"{dtype}[B,{K},P,{D}] {n}{name}" for n in layers for name in ("pk", "pv")]
    inputs += [f"{dtype}[B,S,{D // 2}] cos", f"{dtype}[B,S,{D // 2}] sin", "int64[B,S] ids", "int64[B,T] attention_mask"]
    constants = {"qheads": [0, 0, H, D], "kheads": [0, 0, K, D], "joined": [0, 0, H * D], "axis1": [1], "axes": [1, 2], "zero": 0, "one": 1}
    arrays = {name: np.array(values, np.int64) for name, values in constants.items()}
    inputs += [f"int64[{array.size}] {name}" if array.shape else f"int64 {name}" for name, array in arrays.items()] + [f"{dtype} scale"]
    outputs = ", ".join(f"{dtype}[B,S,{H * D}] {n}y, {dtype}[B,{K},T,{D}] {n}K, {dtype}[B,{K},T,{D}] {n}V" for n in layers)
    body = MASK.format(**fields) + "".join(LAYER.format(n=n, **fields) for n in layers)
    model = graph(f"g ({', '.join(inputs)}) => ({outputs}) {{{body}\n}}", arrays | {"scale": np.array(0.3, floats)})
    values = {value.name: value for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))}
    shapes = {"mask": ["B", 1, "S", "T"], "number": ["B", 1, "S", "T"]}
    for n in layers:
        shapes |= {f"{n}qs": ["B", H, "S", D], f"{n}K": ["B", K, "T", D]}
    for name, shape in shapes.items():
        values[name].shape = ir.Shape(shape)
    for name, kind in {"mask": ir.DataType.BOOL, "number": ir.DataType.FLOAT}.items():
        values[name].type = ir.TensorType(kind)
    for value in values.values():
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else SIZES[size.value] for size in value.shape])
    return model


def feeds(random, dtype=np.float32, layers="a", batch=1, new=S) -> dict[str, np.ndarray]:
    """The last row is padded by a column on the left."""
    mask = np.ones((batch, P + new), np.int64)
    mask[-1, :1] = 0
    shapes = {"q": (batch, new, H * D), "k": (batch, new, K * D), "v": (batch, new, K * D), "pk": (batch, K, P, D), "pv": (batch, K, P, D)}
    made = {n + name: random(*shape, dtype=dtype) for n in layers for name, shape in shapes.items()}
    tables = {name: random(batch, new, D // 2, dtype=dtype) for name in ("cos", "sin")}
    return made | tables | {"ids": np.zeros((batch, new), np.int64), "attention_mask": mask}


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


@pytest.mark.parametrize(("dtype", "floats", "tolerance"), [("float", np.float32, 1e-5), ("float16", np.float16, 4e-3)])
@pytest.mark.parametrize("call", [{}, {"batch": 2, "new": 1}], ids=["chunk", "decode"])
@pytest.mark.parametrize("form", ["<interleaved=0>", "<interleaved=1>", ""])
def test_fuses_to_one_node_and_keeps_the_numbers(graph, run, random, dtype, floats, tolerance, call, form):
    model, given = make(graph, random, dtype, form=form), feeds(random, floats, **call)
    before = run(model, given)
    result = apply_reader(model, foreign_group_query_attention)
    assert (result.fired, result.refused) == (1, [])
    (node,) = nodes(model, "GroupQueryAttention")
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    assert found == {"num_heads": H, "kv_num_heads": K, "scale": pytest.approx(0.3, rel=1e-3), "do_rotary": 0}
    assert (node.domain, model.graph.opset_imports[CONTRIB]) == (CONTRIB, 1)
    assert [value.name for value in model.graph.outputs] == ["ay", "aK", "aV"]
    assert not {"Attention", "Concat", "Transpose", "Mul"} & {node.op_type for node in model.graph}
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=tolerance, atol=tolerance)


FIXED = {"qheads": [1, -1, H, D], "kheads": [1, -1, K, D], "joined": [1, -1, H * D]}
MEASURED = {
    **{f"a{name}": [1, SEQUENCE, width] for name, width in {"q": H * D, "k": K * D, "v": K * D, "y": H * D}.items()},
    **{f"a{name}": [1, SEQUENCE, heads, D] for name, heads in {"qh": H, "kh": K, "vh": K, "at": H}.items()},
}


def fixed_batch(graph, random, **shapes) -> ir.Model:
    """A graph of one sequence, whose Reshapes say 1 where others keep what is there."""
    model = make(graph, random)
    for name, shape in FIXED.items():
        model.graph.initializers[name].const_value = ir.tensor(np.array(shape, np.int64), name=name)
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.name in MEASURED:
            value.shape = ir.Shape((MEASURED | shapes)[value.name])
    return model


@pytest.mark.parametrize("width", [H * D, None])
def test_shapes_are_as_they_were_measured(graph, run, random, width):
    model, given = fixed_batch(graph, random, ay=[1, SEQUENCE, width]), feeds(random)
    before = run(model, given)
    assert apply_reader(model, foreign_group_query_attention).fired == 1
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shapes",
    [{"aqh": [SEQUENCE, 1, H, D]}, {"aq": [1, None, H * D], "aqh": [1, None, H, D]}, {"aqh": [1, SEQUENCE, None, D]}, {"aqh": [1, SEQUENCE, H * D]}],
    ids=["turned", "of unknown length", "of unknown heads", "of three axes"],
)
def test_refuses_heads_that_were_measured_otherwise(graph, random, shapes):
    result = apply_reader(fixed_batch(graph, random, **shapes), foreign_group_query_attention)
    assert [refusal.reason for refusal in result.refused] == [f"the query is reshaped to {(1, -1, H, D)}, not to [0, 0, heads, D]"]


def test_refuses_a_result_that_was_measured_otherwise(graph, random):
    for shapes in ({"ay": [1, SEQUENCE, H, D]}, {"ay": [SEQUENCE, 1, H * D]}):
        result = apply_reader(fixed_batch(graph, random, **shapes), foreign_group_query_attention)
        assert [refusal.reason for refusal in result.refused] == ["its result is not turned and reshaped to [B, S, H · D]"]


def test_layers_share_the_bias_and_the_lengths(graph, run, random):
    model, given = make(graph, random, layers="ab"), feeds(random, layers="ab", batch=2, new=1)
    before = run(model, given)
    assert apply_reader(model, foreign_group_query_attention).fired == 2
    first, second = nodes(model, "GroupQueryAttention")
    assert [first.inputs[index] for index in (5, 6, 10)] == [second.inputs[index] for index in (5, 6, 10)]
    assert len(nodes(model, "Where")) == 1
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_chosen_by_elsewhere_is_no_bias(graph, random):
    model = make(graph, random)
    mask = next(value for node in model.graph for value in node.outputs if value.name == "mask")
    other = ir.node("Where", [mask, mask, mask])
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    other.outputs[0].name = "elsewhere"
    assert apply_reader(model, foreign_group_query_attention).fired == 1
    assert nodes(model, "GroupQueryAttention")[0].inputs[10] is not other.outputs[0]


@pytest.mark.parametrize(("dtype", "smallest"), [("float", np.finfo(np.float32).min), ("float16", -65504.0)])
def test_bias_is_the_smallest_number_where_the_mask_hides(graph, random, dtype, smallest):
    model = make(graph, random, dtype)
    apply_reader(model, foreign_group_query_attention)
    made = {name.partition(".")[2]: value.const_value.numpy().tolist() for name, value in model.graph.initializers.items() if "GroupQuery" in name}
    assert made == {"zero": 0.0, "smallest": pytest.approx(float(smallest)), "first_axis": [0], "one_int32": 1}
    bias = nodes(model, "GroupQueryAttention")[0].inputs[10]
    assert (bias.dtype.name, bias.shape) == ({"float": "FLOAT"}.get(dtype, "FLOAT16"), ir.Shape([BATCH, 1, SEQUENCE, TOTAL]))
    assert bias.producer().inputs[0].name == "mask"


def test_lengths_are_those_of_the_masks_columns(graph, run, random):
    model = make(graph, random)
    apply_reader(model, foreign_group_query_attention)
    (node,) = nodes(model, "GroupQueryAttention")
    for index, name, shape in ((5, "seqlens", ["B"]), (6, "total", [])):
        value = node.inputs[index]
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.INT32), ir.Shape(shape)
        model.graph.outputs.append(value)
    *_, seqlens, total = run(model, feeds(random, batch=2, new=1))
    assert (seqlens.tolist(), total.tolist(), total.shape) == ([P, P], P + 1, ())


NOT_PLAIN = "it has no mask, or other attributes than scale = 1"
LATER = "the mask lets a query see keys behind its own: 700 new tokens over a past of 0"
REFUSED = {
    "no mask": ({"mask": ""}, NOT_PLAIN),
    "rescaled": ({"attributes": "<scale=0.5>"}, NOT_PLAIN),
    "causal": ({"attributes": "<scale=1.0, is_causal=1>"}, NOT_PLAIN),
    "in part": ({"form": "<rotary_embedding_dim=4>"}, "the query is rotated in part"),
    "a mask of numbers": ({"mask": ", number"}, f"the mask is FLOAT ['{BATCH}', 1, '{SEQUENCE}', '{TOTAL}'], not bool [B, 1, S, T]"),
    "later keys": ({"before": "GreaterOrEqual"}, LATER),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, random, changes, reason):
    result = apply_reader(make(graph, random, **changes), foreign_group_query_attention)
    assert (result.fired, [refusal.reason for refusal in result.refused]) == (0, [reason])


def test_refuses_a_mask_that_is_sized_by_what_the_operator_makes(graph, random):
    for name in ("aK", "aV"):
        model = make(graph, random)
        values = {value.name: value for node in model.graph for value in node.outputs}
        values["sizeT"].producer().replace_input_with(0, values[name])
        values["sizeT"].producer().attributes["start"] = ir.AttrInt64("start", 2)
        values["sizeT"].producer().attributes["end"] = ir.AttrInt64("end", 3)
        model.graph.sort()
        result = apply_reader(model, foreign_group_query_attention)
        assert [refusal.reason for refusal in result.refused] == ["the mask is computed from the keys or values that the operator itself joins"]


def test_two_masks_have_a_bias_each(graph, run, random):
    """As where every second layer attends to a window."""
    model, given = make(graph, random, layers="ab"), feeds(random, layers="ab")
    second = nodes(model, "Attention")[1]
    values = {value.name: value for value in (*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs))}
    near = ir.node("Greater", [values["columns"], ir.node("Sub", [values["rows"], values["one"]]).outputs[0]])
    window = ir.node("And", [values["mask"], near.outputs[0]])
    window.outputs[0].type, window.outputs[0].shape = values["mask"].type, values["mask"].shape
    model.graph.insert_before(second, [near.inputs[1].producer(), near, window])
    second.replace_input_with(3, window.outputs[0])
    before = run(model, given)
    assert apply_reader(model, foreign_group_query_attention).fired == 2
    biases = [node.inputs[10] for node in nodes(model, "GroupQueryAttention")]
    assert biases[0] is not biases[1]
    assert [value.name for value in model.graph.initializers.values() if "smallest" in value.name] == ["GroupQueryAttention.smallest"]
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_name_that_is_taken_is_not_taken_again(graph, run, random):
    model, given = make(graph, random), feeds(random)
    model.graph.initializers["scale"].name = "GroupQueryAttention.zero"
    before = run(model, given)
    assert apply_reader(model, foreign_group_query_attention).fired == 1
    assert "GroupQueryAttention.zero_2" in model.graph.initializers
    for ours, theirs in zip(run(model, given), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_whoever_else_reads_the_keys_stands_behind_the_node(graph, random):
    model = make(graph, random)
    keys = next(value for node in model.graph for value in node.outputs if value.name == "aK")
    early = ir.node("Neg", [keys])
    model.graph.insert_after(keys.producer(), early)
    model.graph.outputs.append(early.outputs[0])
    apply_reader(model, foreign_group_query_attention)
    kinds = [node.op_type for node in model.graph]
    assert kinds.index("Neg") > kinds.index("GroupQueryAttention")


@pytest.mark.parametrize("shape", [["B", H, SEQUENCE, TOTAL], ["B", 1, 1, TOTAL], ["B", 1, SEQUENCE, 9], [SEQUENCE, TOTAL]], ids=str)
def test_refuses_a_mask_of_another_shape(graph, random, shape):
    model = make(graph, random)
    mask = nodes(model, "Attention")[0].inputs[3]
    mask.shape = ir.Shape(shape)
    result = apply_reader(model, foreign_group_query_attention)
    assert [refusal.reason for refusal in result.refused] == [f"the mask is BOOL {shape}, not bool [B, 1, S, T]"]


def test_every_attention_of_the_standard_domain_is_a_candidate(graph, random):
    (attention,) = nodes(make(graph, random), "Attention")
    assert foreign_group_query_attention.is_candidate(attention)
    attention.domain = CONTRIB
    assert not foreign_group_query_attention.is_candidate(attention)
