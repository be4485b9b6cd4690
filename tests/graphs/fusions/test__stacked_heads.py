"""Queries of a group that are stacked as rows of their key head are found, and only where query, result and mask agree."""

from __future__ import annotations

import numpy as np
import pytest

from graphs.fusions._reading import Refused
from graphs.fusions._stacked_heads import NOT_STACKED, mask_of_one, unstacked

TEXT = """g (float[B,6,S,8] query, float[6,S,8] flat, float[B,H,S,8] any, bool[B,1,S,T] mask, bool[B,1,S,T] other, int64[4] rows, int64[4] heads)
=> (float[B,6,S,8] y) { stacked = Reshape(query, rows) attended = Abs(stacked) y = Reshape(attended, heads) z = Concat<axis=2>(mask, mask) }"""


@pytest.fixture
def values(graph):
    def make(before="", after="", rows=(0, 2, -1, 0), heads=(0, 6, -1, 0)):
        assert before in TEXT
        model = graph(TEXT.replace(before, after), {"rows": np.array(rows), "heads": np.array(heads)})
        return {value.name: value for value in (*model.graph.inputs, *(node.outputs[0] for node in model.graph))}

    return make


def test_finds_what_was_stacked(values) -> None:
    found = values()
    assert unstacked(found["stacked"], found["attended"]) == (found["query"], found["y"], 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": (0, -1, 2, 0)},
        {"rows": (1, 2, -1, 0)},
        {"rows": (0, 2, -1, 8)},
        {"heads": (0, 3, -1, 0)},
        {"heads": (1, 6, -1, 0)},
        {"heads": (0, 6, 1, 0)},
        {"heads": (0, 6, -1, 8)},
        {"before": "Reshape(query", "after": "Reshape(flat"},
        {"before": "Reshape(query", "after": "Reshape(any"},
        {"before": "Reshape(query, rows)", "after": "Neg(query)"},
        {"before": "Reshape(attended, heads)", "after": "Neg(attended)"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_leaves_everything_else_as_it_is(values, changes) -> None:
    found = values(**changes)
    assert unstacked(found["stacked"], found["attended"]) == (found["stacked"], found["attended"], 1)


def test_finds_the_mask_of_one_query(values) -> None:
    found = values()
    assert mask_of_one(found["z"], 2) is found["mask"]
    assert mask_of_one(found["z"], 1) is found["z"]


@pytest.mark.parametrize("made", ["Concat<axis=1>(mask, mask)", "Concat<axis=2>(mask, other)", "Concat<axis=2>(mask, mask, mask)", "Not(mask)"])
def test_refuses_a_mask_that_is_not_below_itself(values, made) -> None:
    with pytest.raises(Refused) as refused:
        mask_of_one(values("Concat<axis=2>(mask, mask)", made)["z"], 2)
    assert str(refused.value) == NOT_STACKED
