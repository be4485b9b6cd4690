"""The exporter's mask is read in every order of its operands, and whatever is not that mask is refused in words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.fusions._causal_mask import CausalMask, read_mask
from graphs.fusions._reading import Refused

TEXT = """g (int64 t, int64 s, int64 past, bool[B,1,1,T] tokens, bool[S,T] other, int64 zero, int64 one, int64 two, int64[1] axis0, int64[1] axis1)
=> (bool[B,1,S,T] mask)
{ columns = Range(zero, t, one) new = Range(zero, s, one) turned = Unsqueeze(new, axis1) rows = Add(turned, past)
  before = Less(columns, rows) itself = Equal(columns, rows) seen = And(before, tokens) mask = Or(seen, itself) }"""
CONSTANTS = {"zero": 0, "one": 1, "two": 2, "axis0": [0], "axis1": [1]}
NOT_THIS = "the mask is not: (column < row and the column holds a token) or column = row"
NOT_TOKENS = "which columns hold tokens is {}, not bool [B, 1, 1, T]"
NOT_COUNTED = "columns and rows of the mask are not counted from 0 to the number of columns and of new tokens"


def read(graph, before: str = "", after: str = "", edit=None) -> tuple[CausalMask, dict[str, ir.Value]]:
    """What is read of the mask with one piece of its text replaced, and all values by name."""
    assert before in TEXT
    model = graph(TEXT.replace(before, after), {name: np.array(value, np.int64) for name, value in CONSTANTS.items()})
    values = {value.name: value for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))}
    values["mask"].producer().metadata_props["module"] = "model"
    if edit is not None:
        edit(values)
    return read_mask(values["mask"]), values


@pytest.mark.parametrize(
    ("before", "after"),
    [("", ""), ("Or(seen, itself)", "Or(itself, seen)"), ("And(before, tokens)", "And(tokens, before)")],
    ids=["as the exporter writes it", "the column's own first", "tokens first"],
)
def test_reads_the_parts(graph, before, after) -> None:
    mask, values = read(graph, before, after)
    assert mask == CausalMask(values["tokens"], values["columns"], values["t"], values["s"], "model")


REFUSED = {
    "no choice": ("Or(seen, itself)", "And(seen, itself)", NOT_THIS),
    "one part is anything": ("Or(seen, itself)", "Or(seen, other)", NOT_THIS),
    "one part is anything, the other both": ("mask = Or(seen, itself)", "wide = And(other, tokens) mask = Or(wide, other)", NOT_THIS),
    "no tokens": ("Or(seen, itself)", "Or(before, itself)", NOT_THIS),
    "tokens or earlier": ("And(before, tokens)", "Or(before, tokens)", NOT_THIS),
    "later columns": ("Less(columns, rows)", "Greater(columns, rows)", NOT_THIS),
    "columns up to the own": ("Less(columns, rows)", "LessOrEqual(columns, rows)", NOT_THIS),
    "other rows": ("Equal(columns, rows)", "Equal(columns, turned)", NOT_THIS),
    "columns are given": ("columns = Range(zero, t, one)", "columns = Identity(t)", NOT_COUNTED),
    "columns from one": ("Range(zero, t, one)", "Range(one, t, one)", NOT_COUNTED),
    "every second column": ("Range(zero, t, one)", "Range(zero, t, two)", NOT_COUNTED),
    "rows from one": ("Range(zero, s, one)", "Range(one, s, one)", NOT_COUNTED),
    "rows before the past": ("Add(turned, past)", "Sub(turned, past)", NOT_COUNTED),
    "rows along the columns": ("Unsqueeze(new, axis1)", "Unsqueeze(new, axis0)", NOT_COUNTED),
    "rows are not turned": ("Unsqueeze(new, axis1)", "Identity(new)", NOT_COUNTED),
    "tokens of integers": ("bool[B,1,1,T] tokens", "int64[B,1,1,T] tokens", NOT_TOKENS.format("INT64 ('B', 1, 1, 'T')")),
    "tokens by row": ("bool[B,1,1,T] tokens", "bool[B,1,S,T] tokens", NOT_TOKENS.format("BOOL ('B', 1, 'S', 'T')")),
    "tokens without columns": ("bool[B,1,1,T] tokens", "bool[B,1,1] tokens", NOT_TOKENS.format("BOOL ('B', 1, 1)")),
}


@pytest.mark.parametrize(("before", "after", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, before, after, reason) -> None:
    with pytest.raises(Refused) as refused:
        read(graph, before, after)
    assert str(refused.value) == reason


def test_refuses_tokens_of_unknown_shape(graph) -> None:
    def forget(values) -> None:
        values["tokens"].shape = None

    with pytest.raises(Refused) as refused:
        read(graph, edit=forget)
    assert str(refused.value) == NOT_TOKENS.format("BOOL None")
