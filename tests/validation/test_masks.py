"""validation/masks.py: which values hold a mask's fill, and which of their elements are results."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from validation.masks import Masks, find_masks

TEXT = """<ir_version: 10, opset_import: ["" : 23]>
g (float[1,4] scores, int64[1,4] allowed, float[4,2] v) => (float[1,2] y)
<float[1] fill = {%s}, float[1] zero = {0.0}>
{
    keep = Cast<to=9>(allowed)
    %s
    p = Softmax<axis=-1>(s)
    y = MatMul(p, v)
}"""
WHERE = "s = Where(keep, scores, fill)"
ADDED = "m = Where(keep, zero, fill)\n    s = Add(scores, m)"
PRODUCT = "number = Cast<to=1>(keep)\n    m = Mul(number, fill)\n    wide = Add(scores, m)\n    s = Cast<to=1>(wide)"


def masks(body: str, fill: str = "-1e30") -> tuple[Masks, dict[str, ir.Value]]:
    graph = ir.from_onnx_text(TEXT % (fill, body)).graph
    return find_masks(graph), {str(value.name): value for node in graph for value in [*node.inputs, *node.outputs] if value is not None}


def names(values: frozenset[ir.Value]) -> set[str | None]:
    return {value.name for value in values}


@pytest.mark.parametrize(
    ("body", "whole", "scores"),
    [(WHERE, {"fill"}, {"s"}), (ADDED, {"fill", "m"}, {"s"}), (PRODUCT, {"fill", "m"}, {"wide", "s"})],
    ids=["where", "additive", "product"],
)
def test_fills_are_followed_until_the_softmax(body: str, whole: set[str], scores: set[str]) -> None:
    found, _ = masks(body)
    assert (names(found.whole), names(found.scores)) == (whole, scores)


def test_ordinary_constant_is_no_fill() -> None:
    found, _ = masks(ADDED, fill="-9.0")
    assert found == Masks(frozenset(), frozenset())


def test_product_of_scores_and_a_fill_is_a_result() -> None:
    """A large factor is no mask: an overflow that it makes must be seen."""
    found, _ = masks("s = Mul(scores, fill)", fill="-20000.0")
    assert names(found.scores) == set()


def test_weight_with_a_large_negative_value_is_no_fill() -> None:
    model = ir.from_onnx_text((TEXT % ("-20000.0", ADDED)).replace("fill", "weight"))
    graph = model.graph
    graph.initializers["weight"].name = "model.norm.weight"
    assert find_masks(graph) == Masks(frozenset(), frozenset())


def test_results_leave_out_what_is_masked_and_keep_what_is_wrong() -> None:
    found, values = masks(ADDED)
    wrong = np.array([5, -65504, -math.inf, -10010, math.inf, math.nan], np.float32)
    np.testing.assert_array_equal(found.results(values["s"], wrong), np.array([5, math.inf, math.nan], np.float32))
    np.testing.assert_array_equal(found.results(values["m"], wrong), np.array([math.nan], np.float32))
    assert found.results(values["p"], wrong) is wrong
