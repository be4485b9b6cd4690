from __future__ import annotations

import numpy as np
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
        assert "the halves of cosine or sine are not known to be equal: they come from Gather" in result.refused[0].reason
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
        (WHOLE, "Concat<axis=-1>(turns, turns)", "Mul(positions, factor)", "cosine and sine have 1 columns for head_dim 8"),
        (WHOLE, "sin = Unsqueeze(sin3, one)", "sin = Unsqueeze(positions, one)", "expected [B, 1, S, D]"),
        (WHOLE, "cos3 = Cos(twice)\n    sin3 = Sin(twice)", "cos3 = Cos(last)\n    sin3 = Sin(last)", "expected [B, 1, S, D]"),
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
    if "fed" in changed:
        changed = changed.replace("float[4] frequencies)", "float[4] frequencies, float[B,S,8] fed)")
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
    model = rotation(text.replace("float[B,S,1] positions", "float[1,S,1] positions"))
    given = {"x": random(2, 3, 5, 8), "positions": np.arange(5, dtype=np.float32).reshape(1, 5, 1)}
    unfused_y = run(model, given)[0]
    assert fuse(model).fired == 1
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


def test_refuses_interleaved_pairs(rotation) -> None:
    text = WHOLE.replace("x, zero, half, axis, one", "x, zero, end, axis, step").replace("x, half, end, axis, one", "x, one, end, axis, step")
    result = fuse(rotation(text.replace("int64[1] one", "int64[1] step = {2}, int64[1] one")))
    assert result.fired == 0
    assert "it takes every second element: interleaved pairs" in result.refused[0].reason
