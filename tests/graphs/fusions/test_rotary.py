from __future__ import annotations

import re

import numpy as np
import pytest

from artifact.layout import MODULE_KEY
from graphs.fusions import rotary
from graphs.rewriting import apply_fusion

HEADS, HEAD_DIM, POSITIONS = 3, 8, 16
TEXT = """
agraph (float[B,3,S,8] x, int64[B,S] position_ids, float[16,4] cos_table, float[16,4] sin_table) => (float[B,3,S,8] y)
<int64[1] heads_axis = {1}, float[B,3,S,4] x1, float[B,3,S,4] x2>
{
    cos_read = Gather<axis=0>(cos_table, position_ids)
    cos = Unsqueeze(cos_read, heads_axis)
    sin_read = Gather<axis=0>(sin_table, position_ids)
    sin = Unsqueeze(sin_read, heads_axis)
    x1, x2 = Split<axis=3, num_outputs=2>(x)
    x1_cos = Mul(x1, cos)
    x2_sin = Mul(x2, sin)
    first = Sub(x1_cos, x2_sin)
    x2_cos = Mul(x2, cos)
    x1_sin = Mul(x1, sin)
    second = Add(x2_cos, x1_sin)
    [joined] y = Concat<axis=-1>(first, second)
}
"""


def tables(dtype=np.float32):
    """Cosine and sine [16, 4] of positions 0 … 15."""
    angles = np.outer(np.arange(POSITIONS), 100.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    return {"cos_table": np.cos(angles).astype(dtype), "sin_table": np.sin(angles).astype(dtype)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_fuses_to_one_node_and_keeps_the_numbers(graph, run, random, dtype) -> None:
    model = graph(TEXT if dtype == np.float32 else TEXT.replace("float[", "float16["), constants=tables(dtype))
    feeds = {"x": random(2, HEADS, 5, HEAD_DIM, dtype=dtype), "position_ids": np.array([[0, 1, 2, 3, 4], [0, 0, 7, 8, 15]])}
    unfused_y = run(model, feeds)[0]
    result = apply_fusion(model, rotary.RULES, rotary.is_candidate)
    assert (result.fired, result.refused) == (1, [])
    (node,) = model.graph
    assert node.op_type == "RotaryEmbedding"
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {"interleaved": 0}
    assert [value.name for value in node.inputs] == ["x", "cos_table", "sin_table", "position_ids"]
    fused_y = run(model, feeds)[0]
    assert fused_y.dtype == dtype
    # the kernel adds the second product unrounded (fused multiply-add): one rounding less, of numbers below 4
    np.testing.assert_allclose(fused_y, unfused_y, rtol=0, atol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Mul(x1, cos)", "Mul(cos, x1)"),
        ("Mul(x2, sin)", "Mul(sin, x2)"),
        ("Mul(x2, cos)", "Mul(cos, x2)"),
        ("Mul(x1, sin)", "Mul(sin, x1)"),
        ("Add(x2_cos, x1_sin)", "Add(x1_sin, x2_cos)"),
        ("Split<axis=3, num_outputs=2>(x)", "Split<axis=-1>(x, halves)"),
        ("axis=-1", "axis=3"),
        ("Gather<axis=0>(cos_table", "Gather(cos_table"),
    ],
)
def test_fuses_every_order_of_operands(graph, before, after) -> None:
    assert before in TEXT
    model = graph(TEXT.replace(before, after).replace("<int64[1]", "<int64[2] halves = {4, 4}, int64[1]"), constants=tables())
    assert apply_fusion(model, rotary.RULES, rotary.is_candidate).fired == 1
    assert [node.op_type for node in model.graph] == ["RotaryEmbedding"]


def test_two_rotations_share_the_tables(graph) -> None:
    """The rows that are read die with their last user, not with the first fusion."""
    rotation = TEXT[TEXT.index("    x1, x2") : TEXT.rindex("}")]
    other = re.sub(r"\b(x|x1|x2|y|first|second|x\d_\w+|joined)\b", r"\1_b", rotation)
    header = TEXT[: TEXT.index("    x1, x2")].replace(") =>", ", float[B,1,S,8] x_b) =>").replace("[B,3,S,8] y)", "[B,3,S,8] y, float[B,1,S,8] y_b)")
    model = graph(header.replace("x2>", "x2, float[B,1,S,4] x1_b, float[B,1,S,4] x2_b>") + rotation + other + "}", constants=tables())
    assert apply_fusion(model, rotary.RULES, rotary.is_candidate).fired == 2
    assert [node.op_type for node in model.graph] == ["RotaryEmbedding"] * 2


def test_keeps_the_module(graph) -> None:
    model = graph(TEXT, constants=tables())
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "model.layers.3.self_attn" if node.op_type in ("Concat", "Mul") else "model.rotary_emb"
    apply_fusion(model, rotary.RULES, rotary.is_candidate)
    assert [node.metadata_props[MODULE_KEY] for node in model.graph] == ["model.layers.3.self_attn"]


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"float[B,3,S,8] x,": "float[B,3,?,S,8] x,"}, "the input is not [B, H, S, D]"),
        ({"axis=3, num_outputs=2": "axis=2, num_outputs=2"}, "it is not the last axis that is split and joined"),
        (
            {"<int64[1]": "<int64[2] parts = {2, 6}, int64[1]", "(x)": "(x, parts)", "x1,": "x1,", "[B,3,S,4] x1": "[B,3,S,2] x1"},
            "not split into equal halves",
        ),
        ({"heads_axis = {1}": "heads_axis = {0}"}, "cosine or sine is not read from a constant table"),
        ({"Gather<axis=0>(cos_table": "Gather<axis=1>(cos_table"}, "cosine or sine is not read from a constant table"),
        ({"cos_read = Gather<axis=0>(cos_table, position_ids)": "cos_read = Cos(position_ids)"}, "cosine or sine is not read from a constant table"),
        ({"sin = Unsqueeze(sin_read, heads_axis)": "sin = Sin(sin_read)"}, "cosine or sine is not read from a constant table"),
        (
            {"int64[B,S] position_ids,": "int64[B,S] position_ids, int64[B,S] other_ids,", "(sin_table, position_ids)": "(sin_table, other_ids)"},
            "cosine and sine are read by different position ids",
        ),
        ({"[B,3,S,4] x1": "[B,3,S,?] x1"}, "not split into equal halves"),
        ({"int64[B,S] position_ids": "int64[S] position_ids"}, "cosine or sine is not read from a constant table"),
        ({"Sub(x1_cos, x2_sin)": "Add(x1_cos, x2_sin)"}, "its structure differs: a node is Add, expected Sub"),
        ({"Mul(x1, sin)": "Mul(x1, cos)"}, "two operands should be one value, and are not"),
        ({"x1, x2 = Split": "x2, x1 = Split"}, "the outputs of a node are used in another order"),
    ],
)
def test_refuses_with_a_reason(graph, edits, reason) -> None:
    text = TEXT
    for before, after in edits.items():
        assert before in text
        text = text.replace(before, after)
    result = apply_fusion(model := graph(text, constants=tables()), rotary.RULES, rotary.is_candidate)
    assert result.fired == 0
    assert "RotaryEmbedding" not in {node.op_type for node in model.graph}
    (refusal,) = result.refused
    assert refusal.node == "joined"
    assert reason in refusal.reason


def test_refuses_tables_of_another_width(graph) -> None:
    """Hugging Face's own tables repeat each angle for both halves: [positions, D]."""
    wide = {name: np.concatenate((table, table), axis=1) for name, table in tables().items()}
    model = graph(TEXT.replace("[16,4]", "[16,8]"), constants=wide)
    result = apply_fusion(model, rotary.RULES, rotary.is_candidate)
    assert result.fired == 0
    assert "the tables are not [positions, D/2]" in result.refused[0].reason


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"sin_table": (12, 4)}, "the tables are not [positions, D/2]"),
        ({"cos_table": (16, 4, 1), "sin_table": (16, 4, 1)}, "cosine or sine is not read from a constant table"),
        ({"cos_table": None}, "cosine or sine is not read from a constant table"),
    ],
)
def test_refuses_other_tables(graph, shapes, reason) -> None:
    """Of another length, of another rank, or fed."""
    text = TEXT
    for name, shape in shapes.items():
        text = text.replace(f"float[16,4] {name}", f"float[{','.join(map(str, shape or (16, 4)))}] {name}")
    given = {name: np.resize(table, shapes.get(name, table.shape)) for name, table in tables().items() if shapes.get(name, ()) is not None}
    result = apply_fusion(graph(text, constants=given), rotary.RULES, rotary.is_candidate)
    assert result.fired == 0
    assert reason in result.refused[0].reason


def test_halves_that_are_joined_on_another_axis_are_left_alone(graph) -> None:
    model = graph(TEXT.replace("Concat<axis=-1>", "Concat<axis=1>").replace("[B,3,S,8] y", "[B,6,S,4] y"), constants=tables())
    assert apply_fusion(model, rotary.RULES, rotary.is_candidate).fired == 0


@pytest.mark.parametrize(
    ("join", "output", "candidate"),
    [
        ("Concat<axis=3>(x, x)", "[B,3,S,16]", True),
        ("Concat<axis=1>(x, x)", "[B,6,S,8]", False),
        ("Concat<axis=3>(x, x, x)", "[B,3,S,24]", False),
        ("Concat<axis=-1>(x, x)", "[B,S,16]", False),
        ("Tile(x, x)", "[B,3,S,16]", False),
    ],
)
def test_candidates_are_joins_of_two_halves(graph, join, output, candidate) -> None:
    (node,) = graph(f"agraph (float[B,3,S,8] x) => (float{output} y) {{ y = {join} }}").graph
    assert rotary.is_candidate(node) == candidate
