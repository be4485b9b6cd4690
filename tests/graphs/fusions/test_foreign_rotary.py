from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as common_passes

from graphs.fusions import foreign_rotary
from graphs.fusions._reading import apply_reader

HEADER = "agraph (float[B,3,S,8] x, float[B,S,1] positions, float[4] frequencies) => (float[B,3,S,8] y)\n"
CONSTANTS = """<int64[1] zero = {0}, int64[1] half = {4}, int64[1] end = {9223372036854775807}, int64[1] axis = {3}, int64[1] one = {1},
 int64[2] halves = {4, 4}, float factor = {1.25}>
"""
ANGLES = """{
    turns = Mul(positions, frequencies)
    twice = Concat<axis=-1>(turns, turns)
    cos3 = Cos(twice)
    sin3 = Sin(twice)
    cos = Unsqueeze(cos3, one)
    sin = Unsqueeze(sin3, one)
"""
SLICED = "first = Slice(x, zero, half, axis, one)\n second = Slice(x, half, end, axis, one)\n"
SPLIT = "first, second = Split<axis=-1>(x, halves)\n"
TURN = "turned = Neg(second)\n [join] joined = Concat<axis=-1>(turned, first)\n by_sin = Mul(joined, sin)\n by_cos = Mul(x, cos)\n"
WHOLE = HEADER + CONSTANTS + ANGLES + SLICED + TURN + "y = Add(by_cos, by_sin) }"
BY_HALVES = (
    HEADER + CONSTANTS + ANGLES.replace("twice = Concat<axis=-1>(turns, turns)", "twice = Identity(turns)") + SPLIT
    + "a = Mul(first, cos)\n b = Mul(second, sin)\n c = Mul(second, cos)\n d = Mul(first, sin)\n"
    + "left = Sub(a, b)\n right = Add(c, d)\n [join] y = Concat<axis=-1>(left, right) }"
)  # fmt: skip


@pytest.fixture
def rotation(graph, random):
    def make(text, **constants):
        given = {"frequencies": np.array([1, 0.5, 0.1, 0.01], np.float32)} if "float[4] frequencies)" in text else {}
        return common_passes.ShapeInferencePass()(graph(text, constants=given | constants)).model

    return make


def fuse(model):
    return apply_reader(model, foreign_rotary)


def feeds(random, **more):
    return {"x": random(2, 3, 5, 8), "positions": np.arange(10, dtype=np.float32).reshape(2, 5, 1)} | more


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        (WHOLE, "", ""),
        (WHOLE, SLICED, SPLIT),
        (WHOLE, "Add(by_cos, by_sin)", "Add(by_sin, by_cos)"),
        (WHOLE, "Mul(joined, sin)", "Mul(sin, joined)"),
        (WHOLE, "Mul(x, cos)", "Mul(cos, x)"),
        (WHOLE, "half, end, axis", "minus, end, axis"),
        (WHOLE, "cos3 = Cos(twice)", "plain = Cos(twice)\n cos3 = Mul(plain, factor)"),
        (WHOLE, "cos = Unsqueeze(cos3, one)", "thin = Unsqueeze(cos3, one)\n cos = Mul(factor, thin)"),
        (BY_HALVES, "", ""),
        (BY_HALVES, "Add(c, d)", "Add(d, c)"),
        (BY_HALVES, "Mul(first, cos)", "Mul(cos, first)"),
    ],
)
def test_fuses_every_spelling_and_keeps_the_numbers(rotation, run, random, text, before, after) -> None:
    changed = text.replace(before, after).replace("int64[1] one = {1},", "int64[1] one = {1}, int64[1] minus = {-4},")
    if "Mul(factor, thin)" in changed:
        changed = changed.replace("Mul(factor, thin)", "Mul(thin, factor)")
    model = rotation(changed)
    given = feeds(random)
    unfused_y = run(model, given)[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    (node,) = (node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"interleaved": 0}
    assert node.inputs[0].name == "x"
    assert [len(value.shape) for value in node.inputs[1:]] == [3, 3]
    assert node.outputs[0].name == "y"
    assert not {"Neg", "Concat", "Slice", "Split"} & {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("twice", [True, False])
def test_reads_cosines_from_a_table_whose_halves_are_equal(graph, run, random, twice) -> None:
    text = (
        "agraph (float[B,3,S,8] x, int64[B,S] position_ids, float[16,8] cosines, float[16,8] sines) => (float[B,3,S,8] y)\n" + CONSTANTS
        + "{ cos3 = Gather(cosines, position_ids)\n sin3 = Gather(sines, position_ids)\n cos = Unsqueeze(cos3, one)\n sin = Unsqueeze(sin3, one)\n"
        + SLICED + TURN + "y = Add(by_cos, by_sin) }"
    )  # fmt: skip
    angles = np.outer(np.arange(16), [1, 0.5, 0.1, 0.01]).astype(np.float32)
    angles = np.concatenate((angles, angles if twice else angles + 1), axis=1)
    model = common_passes.ShapeInferencePass()(graph(text, constants={"cosines": np.cos(angles), "sines": np.sin(angles)})).model
    given = {"x": random(2, 3, 5, 8), "position_ids": np.arange(10).reshape(2, 5)}
    unfused_y = run(model, given)[0]
    result = fuse(model)
    assert result.fired == int(twice)
    if not twice:
        assert "the halves of cosine or sine are not known to be equal: they come from an input" in result.refused[0].reason
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "before", "after", "reason"),
    [
        (WHOLE, "Mul(joined, sin)", "Div(joined, sin)", "the turned halves are not multiplied by a sine"),
        (WHOLE, "Add(by_cos, by_sin)", "Sub(by_cos, by_sin)", "the turned halves are not multiplied by a sine"),
        (WHOLE, "by_cos = Mul(x, cos)", "other = Abs(x)\n by_cos = Mul(other, cos)", "the cosine does not multiply what is turned"),
        (WHOLE, "Slice(x, zero, half, axis, one)", "Slice(by_cos, zero, half, axis, one)", "the two halves are not of one value"),
        (WHOLE, "Concat<axis=-1>(turned, first)", "Concat<axis=-1>(turned, turned)", "a half is neither a Slice nor a Split"),
        (WHOLE, SLICED, SPLIT.replace("first, second", "second, first"), "the halves are swapped, or not of the last axis"),
        (WHOLE, "x, zero, half, axis", "x, half, end, axis", "the halves are swapped, or not of the last axis"),
        (WHOLE, "x, half, end, axis", "x, zero, half, axis", "the halves are swapped, or not of the last axis"),
        (
            WHOLE,
            "Concat<axis=-1>(turns, turns)",
            "Concat<axis=-1>(turns, frequencies3)",
            "the halves of cosine or sine are not known to be equal: they come",
        ),
        (WHOLE, "cos3 = Cos(twice)", "cos3 = Cos(fed)", "the halves of cosine or sine are not known to be equal: they come from an input"),
        (WHOLE, "cos = Unsqueeze(cos3, one)", "cos = Unsqueeze(cos3, zero)", "expected [B, 1, S, D]"),
        (
            WHOLE,
            "Concat<axis=-1>(turns, turns)",
            "Mul(positions, factor)",
            "('B', 1, 'S', 1) and ('B', 1, 'S', 1); expected [B, 1, S, D] or [B, 1, S, D/2]",
        ),
        (WHOLE, "sin = Unsqueeze(sin3, one)", "sin = Unsqueeze(positions, one)", "expected [B, 1, S, D]"),
        (WHOLE, "cos3 = Cos(twice)\n    sin3 = Sin(twice)", "cos3 = Cos(last)\n    sin3 = Sin(last)", "expected [B, 1, S, D]"),
        (BY_HALVES, SPLIT, SPLIT.replace("first, second", "first, other") + "rest, second = Split<axis=-1>(fed, halves)\n", "not of one value"),
        (
            BY_HALVES,
            SPLIT,
            "first = Slice(x, zero2, five4, axes2)\n second = Slice(x, half, end, axis)\n",
            "the halves are swapped, or not of the last",
        ),
        (BY_HALVES, SPLIT, "first = Slice(x, fedstart, end, axis, axis)\n second = Slice(x, half, end, axis)\n", "a part of the head"),
        (BY_HALVES, "Add(c, d)", "Sub(c, d)", "the halves are not a difference and a sum of products"),
        (BY_HALVES, "Mul(second, sin)", "Add(second, sin)", "the halves are not a difference and a sum of products"),
        (BY_HALVES, "Mul(first, sin)", "Mul(second, sin)", "the second half is not x2·cos + x1·sin"),
        (BY_HALVES, "Mul(second, cos)", "Mul(second, sin)", "the second half is not x2·cos + x1·sin"),
    ],
)
def test_refuses_with_a_reason(rotation, text, before, after, reason) -> None:
    assert before in text
    changed = text.replace(before, after)
    if "frequencies3" in changed:
        changed = changed.replace("float[4] frequencies)", "float[4] frequencies, float[B,S,4] frequencies3)")
        reason += " from Concat"
    if "last" in changed:
        changed = changed.replace("float[4] frequencies)", "float[4] frequencies, float[B,1,8] last)")
    if "fed" in changed or "zero2" in changed:
        wide = "float[B,3,S,8] fed" if "(fed, halves)" in changed else "float[B,S,8] fed"
        changed = changed.replace("float[4] frequencies)", f"float[4] frequencies, {wide}, int64[1] fedstart)").replace("B,3,S,8] x", "B,3,S,8] x")
        changed = changed.replace(
            " int64[1] one = {1}", " int64[2] zero2 = {0, 0}, int64[2] five4 = {4, 5}, int64[2] axes2 = {3, 2}, int64[1] one = {1}"
        )
    if "by_cos, zero" in changed:  # the product must be there before its slice
        changed = changed.replace(" by_cos = Mul(x, cos)\n", "").replace("first = Slice", "by_cos = Mul(x, cos)\n first = Slice")
    constants = {} if "frequencies)" in changed else {"frequencies": np.ones(4, np.float32)}
    result = fuse(rotation(changed, **constants))
    assert result.fired == 0
    assert [refusal.node for refusal in result.refused] == ["join"]
    assert reason in result.refused[0].reason


@pytest.mark.parametrize("text", [WHOLE, BY_HALVES], ids=["whole", "by-halves"])
def test_positions_that_all_sequences_share_are_repeated_for_each(rotation, run, random, text) -> None:
    """A graph without position ids counts them once: cosines [1, S, D/2], and RotaryEmbedding takes one row a sequence."""
    model = rotation(text.replace("float[B,S,1] positions", "float[1,S,1] positions").replace("agraph (", "agraph (int64[B,S] input_ids, "))
    given = {"x": random(2, 3, 5, 8), "positions": np.arange(5, dtype=np.float32).reshape(1, 5, 1), "input_ids": np.zeros((2, 5), np.int64)}
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    assert {node.inputs[0].name for node in model.graph if node.op_type == "Shape"} == {"input_ids"}  # so that all layers read the same
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-6, atol=1e-6)


def test_refuses_a_rotation_of_a_part_of_the_head(rotation) -> None:
    """The halves are of 4 of 8 elements: partial rotary."""
    numbers = "int64[1] two = {2}, int64[1] four = {4}, int64[1] one"
    text = WHOLE.replace("half = {4}", "half = {2}").replace("x, half, end", "x, two, four").replace("int64[1] one", numbers)
    text = text.replace("by_sin = Mul(joined, sin)", "thin = Slice(sin, zero, four, axis, one)\n by_sin = Mul(joined, thin)")
    parts = "part = Slice(x, zero, four, axis, one)\n part_cos = Slice(cos, zero, four, axis, one)\n by_cos = Mul(part, part_cos)"
    text = text.replace("by_cos = Mul(x, cos)", parts)
    result = fuse(rotation(text.replace("(float[B,3,S,8] y)", "(float[B,3,S,4] y)")))
    assert result.fired == 0
    assert "2 of 8 elements are turned: a part of the head, not its halves" in result.refused[0].reason


EVERY_SECOND = "first = Slice(x, zero, end, axis, two)\n second = Slice(x, one, end, axis, two)\n"
AS_PAIRS = (
    "inpairs = Reshape(x, pairs)\n evens = Slice(inpairs, zero, one, last)\n odds = Slice(inpairs, one, two, last)\n"
    "first = Squeeze(evens, last)\n second = Squeeze(odds, last)\n"
)
GATHERED = "inpairs = Reshape(x, pairs)\n first = Gather<axis=-1>(inpairs, naught)\n second = Gather<axis=4>(inpairs, unit)\n"
SQUEEZED = "first = Squeeze(evens, last)\n second = Squeeze(odds, last)\n"
SPLIT_PAIRS = "inpairs = Reshape(x, pairs)\n evens, odds = Split<axis=-1, num_outputs=2>(inpairs)\n" + SQUEEZED
STACK = "left4 = Unsqueeze(left, last)\n right4 = Unsqueeze(right, last)\n [join] stack = Concat<axis=-1>(left4, right4)\n"
MORE = "<int64[1] two = {2}, int64[1] last = {-1}, int64 naught = {0}, int64 unit = {1}, int64[5] pairs = {2, 3, 5, 4, 2},"
MORE += " int64[4] whole = {2, 3, 5, 8}, int64[3] rows = {2, 5, 8}, int64[4] doubled = {1, 1, 1, 2}, "
FIXED = HEADER.replace("B,3,S,8", "2,3,5,8").replace("B,S,1", "2,5,1") + CONSTANTS.replace("<", MORE)
REPEATED = "thin = Unsqueeze(turns, last)\n twofold = Expand(thin, doubled)\n twice = Reshape(twofold, rows)\n"
CROSSED = REPEATED.replace("twofold, rows", "crossed, rows").replace("twice =", "crossed = Transpose<perm=[0,1,3,2]>(twofold)\n twice =")
STACKED = "thin = Unsqueeze(turns, last)\n twofold = Concat<axis=-1>(thin, thin)\n twice = Reshape(twofold, rows)\n"
PAIRS = (
    FIXED + ANGLES.replace("twice = Concat<axis=-1>(turns, turns)", "twice = Identity(turns)") + EVERY_SECOND
    + "a = Mul(first, cos)\n b = Mul(second, sin)\n c = Mul(second, cos)\n d = Mul(first, sin)\n left = Sub(a, b)\n right = Add(c, d)\n"
    + STACK + "y = Reshape(stack, whole) }"
)  # fmt: skip
TURNED_PAIRS = (
    FIXED + ANGLES.replace("twice = Concat<axis=-1>(turns, turns)\n", REPEATED) + EVERY_SECOND + "left = Neg(second)\n right = Identity(first)\n"
    + STACK + "joined = Reshape(stack, whole)\n by_sin = Mul(joined, sin)\n by_cos = Mul(x, cos)\n y = Add(by_cos, by_sin) }"
).replace("right = Identity(first)\n", "").replace("Unsqueeze(right, last)", "Unsqueeze(first, last)")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        (PAIRS, "", ""),
        (PAIRS, EVERY_SECOND, AS_PAIRS),
        (PAIRS, EVERY_SECOND, GATHERED),
        (PAIRS, EVERY_SECOND, SPLIT_PAIRS),
        (PAIRS, "Mul(first, cos)", "Mul(cos, first)"),
        (TURNED_PAIRS, "", ""),
        (TURNED_PAIRS, EVERY_SECOND, AS_PAIRS),
        (TURNED_PAIRS, REPEATED, STACKED),
        (TURNED_PAIRS, "Mul(x, cos)", "Mul(cos, x)"),
    ],
)
def test_fuses_pairs_as_interleaved(rotation, run, random, text, before, after) -> None:
    assert before in text
    model = rotation(text.replace(before, after))
    given = feeds(random)
    unfused_y = run(model, given)[0]
    result = fuse(model)
    assert (result.fired, result.refused) == (1, [])
    (node,) = (node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"interleaved": 1}
    assert node.inputs[0].name == "x"
    assert {node.op_type for node in model.graph} == {"Mul", "Cos", "Sin", "RotaryEmbedding"} | ({"Identity"} if text is PAIRS else set())
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "before", "after", "reason"),
    [
        (PAIRS, EVERY_SECOND, SLICED, "halves are joined as pairs, or pairs as halves"),
        (PAIRS, "x, zero, end, axis, two", "x, one, end, axis, two", "the halves are swapped, or not of the last axis"),
        (PAIRS, EVERY_SECOND, AS_PAIRS.replace("zero, one, last", "one, two, last"), "the halves are swapped, or not of the last axis"),
        (PAIRS, EVERY_SECOND, AS_PAIRS.replace("Reshape(x, pairs)", "Reshape(wide, pairs)"), "the halves are swapped, or not of the last axis"),
        (PAIRS, EVERY_SECOND, AS_PAIRS.replace("Reshape(x, pairs)", "Unsqueeze(fed, axis)"), "a half is neither a Slice nor a Split of the heads"),
        (PAIRS, EVERY_SECOND, GATHERED.replace("naught", "index"), "the halves are swapped, or not of the last axis"),
        (PAIRS, EVERY_SECOND, AS_PAIRS.replace("Slice(inpairs, zero, one, last)", "Exp(odd)"), "a half is neither a Slice nor a Split of the heads"),
        (PAIRS, "y = Reshape(stack, whole)", "y = Transpose<perm=[0, 1, 2, 4, 3]>(stack)", "pairs are not joined to heads again"),
        (PAIRS, "y = Reshape(stack, whole)", "y = Reshape(stack, across)", "pairs [2, 3, 5, 4, 2] become [2, 5, 3, 8]: not heads again"),
        (TURNED_PAIRS, REPEATED, "twice = Concat<axis=-1>(turns, turns)\n", "not known to be equal: they come from Concat"),
        (TURNED_PAIRS, REPEATED, STACKED.replace("thin, thin", "thin, other"), "not known to be equal: they come from Reshape"),
        (TURNED_PAIRS, REPEATED, CROSSED,
         "not known to be equal: they come from Reshape"),
        (TURNED_PAIRS, REPEATED, REPEATED.replace("Unsqueeze(turns, last)", "Unsqueeze(turns, two)").replace("doubled", "across2"),
         "not known to be equal: they come from Reshape"),
    ],
)  # fmt: skip
def test_refuses_pairs_with_a_reason(rotation, text, before, after, reason) -> None:
    assert before in text
    changed = text.replace(before, after)
    more = "<int64[4] across = {2, 5, 3, 8}, int64[4] across2 = {1, 1, 2, 1}, "
    changed = changed.replace("<int64[1] two", more + "int64[1] two")
    for name, type_ in (
        ("fed", "float[2,3,5,2]"),
        ("wide", "float[2,5,3,8]"),
        ("index", "int64"),
        ("odd", "float[2,3,5,4,1]"),
        ("other", "float[2,5,4,1]"),
    ):
        changed = changed.replace("float[4] frequencies)", f"float[4] frequencies, {type_} {name})") if f"{name}" in after else changed
    if "across)" in after:
        changed = changed.replace("(float[2,3,5,8] y)", "(float[2,5,3,8] y)")
    if "perm=[0, 1, 2, 4, 3]" in after:
        changed = changed.replace("(float[2,3,5,8] y)", "(float[2,3,5,2,4] y)")
    result = fuse(rotation(changed, frequencies=np.ones(4, np.float32)))
    assert result.fired == 0
    assert [refusal.node for refusal in result.refused] == ["join"]
    assert reason in result.refused[0].reason


TABLE = (
    "agraph (float[B,3,S,8] x, int64[B,S] position_ids, int64[1] length, float[1,1,16,8] cosines, float[1,1,16,8] sines) => (float[B,3,S,8] y)\n"
    + CONSTANTS.replace("<", "<int64[1] second_axis = {2}, ")
    + "{ cos0 = Slice(cosines, zero, length, second_axis)\n cos1 = Squeeze(cos0, one)\n cos2 = Squeeze(cos1, zero)\n"
    + " cos3 = Gather(cos2, position_ids)\n cos = Unsqueeze(cos3, one)\n sin1 = Squeeze(sines, one)\n sin2 = Squeeze(sin1, zero)\n"
    + " sin3 = Gather(sin2, position_ids)\n sin = Unsqueeze(sin3, one)\n" + SLICED + TURN + "y = Add(by_cos, by_sin) }"
)  # fmt: skip


@pytest.mark.parametrize(("begin", "sliced"), [("zero, length", False), ("one, length", True)])
def test_reads_a_table_by_position_whole(graph, run, random, begin, sliced) -> None:
    """Rows that are left out behind the cache's end are none that a position reads; rows that are left out before would shift the others."""
    angles = np.outer(np.arange(16), [1, 0.5, 0.1, 0.01]).astype(np.float32)
    angles = np.concatenate((angles, angles), axis=1)[None, None]
    model = graph(TABLE.replace("zero, length", begin), constants={"cosines": np.cos(angles), "sines": np.sin(angles)})
    model = common_passes.ShapeInferencePass()(model).model
    for value, shape in (("cos2", ["T", 8]), ("cos0", [1, 1, "T", 8]), ("cos1", [1, "T", 8]), ("cos3", ["B", "S", 8]), ("cos", ["B", 1, "S", 8])):
        next(one.outputs[0] for one in model.graph if one.outputs[0].name == value).shape = ir.Shape(shape)
    given = {"x": random(2, 3, 5, 8), "position_ids": np.arange(10).reshape(2, 5), "length": np.array([12])}
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    assert any("length" in [value.name for value in node.inputs] for node in model.graph) == sliced
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("join", "shape", "candidate"),
    [
        ("Concat<axis=3>(minus, x)", "[2,3,5,16]", True),
        ("Concat<axis=-1>(difference, x)", "[2,3,5,16]", True),
        ("Concat<axis=-1>(minus5, x5)", "[2,3,5,8,2]", True),
        ("Concat<axis=-1>(flat, flat)", "[2,3,10]", False),
        ("Concat<axis=1>(minus, x)", "[2,6,5,8]", False),
        ("Concat<axis=-1>(minus, x, x)", "[2,3,5,24]", False),
        ("Concat<axis=-1>(x, minus)", "[2,3,5,16]", False),
        ("Concat<axis=-1>(sum, x)", "[2,3,5,16]", False),
        ("Mul(minus, x)", "[2,3,5,8]", False),
        ("Gather<axis=3>(minus, index)", "[2,3,5,4]", False),
    ],
)
def test_candidates_are_joins_of_turned_halves(graph, join, shape, candidate) -> None:
    text = "agraph (float[2,3,5,8] x, float[2,3,5] y, int64[4] index) => (z)\n<int64[1] last = {-1}>\n{ minus = Neg(x)\n difference = Sub(x, x)\n"
    text += " sum = Add(x, x)\n"
    text += f" flat = Neg(y)\n minus5 = Unsqueeze(minus, last)\n x5 = Unsqueeze(x, last)\n z = {join} }}"
    node = common_passes.ShapeInferencePass()(graph(text)).model.graph.node(-1)
    assert str(node.outputs[0].shape) == shape
    assert foreign_rotary.is_candidate(node) == candidate


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("S", "?", "expected [B, 1, S, D] or [B, 1, S, D/2] for heads ['B', 3, None, 8]"),
        ("float[B,3,S,8] x", "float[B,3,S,?] x", "of None elements are turned"),
        ("float[B,3,S,8] x", "float[B,3,S,H] x", "of H elements are turned"),
    ],
)
def test_refuses_sizes_that_are_not_known(rotation, before, after, reason) -> None:
    text = WHOLE.replace(before, after) if before != "S" else WHOLE.replace(",S,", ",?,")
    (refusal,) = fuse(rotation(text)).refused
    assert reason in refusal.reason


def test_a_cosine_that_is_fed_may_come_first(rotation, run, random) -> None:
    text = BY_HALVES.replace("float[4] frequencies)", "float[4] frequencies, float[B,1,S,4] fed)").replace("Mul(first, cos)", "Mul(fed, first)")
    model = rotation(text.replace("Mul(second, cos)", "Mul(fed, second)"), frequencies=np.ones(4, np.float32))
    given = feeds(random, fed=random(2, 1, 5, 4))
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("batch", "new"), [("B", "S"), (1, 1)])
def test_a_cosine_without_a_batch_gets_its_axis_and_is_repeated(rotation, run, random, batch, new) -> None:
    """[S, D] behind Unsqueeze(0, 1): it is not [B, S, D] before the axis of the heads was put in, not even for one token."""
    text = BY_HALVES.replace("float[B,S,1] positions", f"float[{new},1] positions").replace("[B,3,S,8]", f"[{batch},3,{new},8]")
    model = rotation(text.replace("int64[1] one = {1},", "int64[2] one = {0, 1},"))
    n_batch, n_new = (2, 5) if batch == "B" else (1, 1)
    given = {"x": random(n_batch, 3, n_new, 8), "positions": 1 + np.arange(n_new, dtype=np.float32).reshape(n_new, 1)}
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
    assert "Squeeze" in {node.op_type for node in model.graph}  # to [1, S, D/2], of three axes
    np.testing.assert_allclose(run(model, given)[0], unfused_y, rtol=1e-6, atol=1e-6)


def test_refuses_shapes_that_are_alike_because_nothing_is_known(rotation) -> None:
    model = rotation(WHOLE)
    for value in [*model.graph.inputs, *(node.outputs[0] for node in model.graph)]:
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([None if size == "S" else size for size in map(lambda one: getattr(one, "value", one), value.shape)])
    (refusal,) = fuse(model).refused
    assert "cosine and sine are ('B', 1, None, 8)" in refusal.reason


def test_refuses_pairs_of_the_wrong_axis(rotation) -> None:
    """With four elements a head, pairs are [2, 2]: their columns look like their rows."""
    text = (
        PAIRS.replace(EVERY_SECOND, GATHERED.replace("axis=-1", "axis=3").replace("axis=4", "axis=3")).replace("5,8", "5,4").replace("5, 8", "5, 4")
    )
    text = text.replace("5, 4, 2}", "5, 2, 2}").replace("float[4] frequencies", "float[2] frequencies")
    (refusal,) = fuse(rotation(text, frequencies=np.ones(2, np.float32))).refused
    assert "the halves are swapped, or not of the last axis" in refusal.reason
