"""validation/ranges.py: what is measured, what is exempt, and where the worst is said to be."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from artifact.layout import MODULE_KEY
from validation.measurement import StageMeasurement
from validation.ranges import FLOAT16_MAX, RangeAudit, audit_ranges, peak
from validation.stage import is_held_to_noise, judged, record_ranges
from validation.strict import run_strict
from validation.tolerances import Kind, limits_of

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
PRODUCT = """
g (float16[B,4] x) => (float16[B,4] y)
<float[1] two = {2.0}, float[1] hundred = {100.0}, float[1] hundredth = {0.01}>
{
    a = Mul(x, hundred)
    b = Mul(a, hundredth)
    y = Mul(b, two)
}"""
MASKED = """
g (float16[1,4] scores, int64[1,4] allowed, float16[4,2] v) => (float16[1,2] y)
<float[1] fill = {%s}, float[1] zero = {0.0}>
{
    keep = Cast<to=9>(allowed)
    %s
    p = Softmax<axis=-1>(s)
    y = MatMul(p, v)
}"""
WHERE = "s = Where(keep, scores, fill)"
ADDED = "m = Where(keep, zero, fill)\n    s = Add(scores, m)"


def halve_constants(model: ir.Model) -> ir.Model:
    """ONNX text has no float16 literals: constants are written as float32; -1e30 becomes -inf."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            with np.errstate(over="ignore"):
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
            value.dtype = ir.DataType.FLOAT16
    return model


def model(text: str, **modules: str) -> ir.Model:
    """A graph from text; ``modules`` gives the nodes that compute these values a module path."""
    graph = halve_constants(ir.from_onnx_text(HEADER + text))
    for node in graph.graph:
        name = node.outputs[0].name or ""
        node.name = name
        if name in modules:
            node.metadata_props[MODULE_KEY] = modules[name]
    return graph


def halves(*values: float) -> np.ndarray:
    return np.array([values], np.float16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("values", "expected"), [([1, -3, 2], 3), ([-0.0, 0.0], 0), ([1, -math.inf], math.inf), ([math.inf, math.nan], math.nan), ([], 0)], ids=str
)
def test_peak_is_the_largest_magnitude(dtype: type, values: list[float], expected: float) -> None:
    assert peak(np.array(values, dtype)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_peak_agrees_with_numpy_across_blocks(dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal((3, 1 << 19)).astype(dtype).T  # 1.5 blocks, not contiguous
    assert peak(values) == float(np.abs(values).max())


def test_audit_names_the_tensor_and_the_layer_of_the_largest_value() -> None:
    graph = model(PRODUCT, a="model.layers.1.mlp", b="model.layers.0.mlp", y="model.norm")
    audit = audit_ranges(graph, {"x": halves(1, -400, 3, 2)})
    assert (audit.tensor, audit.layer) == ("a", 1)
    assert audit.peak_fraction == pytest.approx(40000 / FLOAT16_MAX)
    assert audit.per_layer == pytest.approx([400 / FLOAT16_MAX, 40000 / FLOAT16_MAX], rel=1e-3)
    assert audit.warnings == ["layer 1: a reaches 40,000, 61% of float16's largest value"]


def test_audit_measures_beyond_float16_and_downstream_values_stay_true() -> None:
    audit = audit_ranges(model(PRODUCT), {"x": halves(1, 6000, 3, 2)})
    assert audit.peak_fraction == pytest.approx(600000 / FLOAT16_MAX)  # not inf
    assert audit.layer is None
    assert audit.warnings[0].startswith("outside the layers: a reaches 600,000")
    assert len(audit.warnings) == 1  # y is 12,000, and its place is the same


def test_audit_has_no_warning_below_half_of_the_range() -> None:
    assert audit_ranges(model(PRODUCT), {"x": halves(1, 2, 3, 300)}).warnings == []


def test_audit_does_not_measure_what_the_graph_keeps_in_float32() -> None:
    squares = """
    g (float16[B,4] x) => (float16[B,4] y)
    {
        wide = Cast<to=1>(x)
        square = Mul(wide, wide)
        root = Sqrt(square)
        y = Cast<to=10>(root)
    }"""
    audit = audit_ranges(model(squares), {"x": halves(1, 2, 3, 30000)})
    assert (audit.tensor, audit.peak_fraction) == ("y", pytest.approx(30000 / FLOAT16_MAX))


def test_audit_of_a_float32_graph_has_nothing_to_measure() -> None:
    single = ir.from_onnx_text(HEADER + PRODUCT.replace("float16", "float"))
    audit = audit_ranges(single, {"x": np.full((1, 4), 1e6, np.float32)})
    assert (audit.peak_fraction, audit.tensor, audit.layer, audit.per_layer) == (0.0, "", None, [])


def test_audit_reports_what_even_float32_cannot_hold() -> None:
    graph = model(PRODUCT.replace("b = Mul(a, hundredth)", "q = Sub(a, a)\n    b = Div(q, q)"), b="model.layers.0.mlp", y="model.layers.0.mlp")
    audit = audit_ranges(graph, {"x": halves(1, 2, 3, 4)})
    assert math.isnan(audit.peak_fraction)
    assert (audit.tensor, audit.layer) == ("b", 0)


@pytest.mark.parametrize("fill", ["-65504.0", "-1e30", "-10000.0"])
@pytest.mark.parametrize("mask", [WHERE, ADDED], ids=["where", "additive"])
def test_audit_exempts_the_fill_of_a_mask(fill: str, mask: str) -> None:
    feeds = {"scores": halves(9, -50, 3, 2), "allowed": np.array([[1, 1, 0, 0]]), "v": np.ones((4, 2), np.float16)}
    audit = audit_ranges(model(MASKED % (fill, mask)), feeds)
    assert (audit.tensor, audit.peak_fraction) == ("s", pytest.approx(50 / FLOAT16_MAX))
    assert audit.warnings == []


def test_audit_exempts_a_mask_that_is_computed_from_the_attention_mask() -> None:
    arithmetic = """half = Cast<to=10>(allowed)
    one = Cast<to=10>(keep)
    gap = Sub(half, half)
    off = Sub(gap, one)
    m = Mul(off, fill)
    s = Sub(scores, m)"""
    feeds = {"scores": halves(9, -50, 3, 2), "allowed": np.array([[1, 1, 0, 0]]), "v": np.ones((4, 2), np.float16)}
    audit = audit_ranges(model(MASKED % ("-65504.0", arithmetic)), feeds)
    assert audit.warnings == []
    assert audit.tensor == "s"


@pytest.mark.parametrize("mask", [WHERE, ADDED], ids=["where", "additive"])
def test_audit_still_measures_scores_that_are_masked(mask: str) -> None:
    large = mask.replace("scores", "large")
    text = MASKED.replace("keep =", "large = Mul(scores, scores)\n    keep =") % ("-65504.0", large)
    audit = audit_ranges(model(text), {"scores": halves(9, -300, 3, 2), "allowed": np.array([[1, 1, 0, 0]]), "v": np.ones((4, 2), np.float16)})
    assert (audit.tensor, audit.peak_fraction) == ("large", pytest.approx(90000 / FLOAT16_MAX))


@pytest.mark.parametrize(
    ("values", "far"), [((1, -100, 3, 2), True), ((1, -400, 3, 2), False), ((1, 6000, 3, 2), False), ((1, 30000, 3, 300), False)]
)
def test_a_rounded_run_tells_the_ranges_where_it_is_far_from_overflow(values: tuple[float, ...], far: bool) -> None:
    rounded, exact = run_strict(model(PRODUCT), {"x": halves(*values)}).ranges, audit_ranges(model(PRODUCT), {"x": halves(*values)})
    assert rounded is not None
    assert rounded.is_far == far
    if far:
        assert rounded.peak_fraction == pytest.approx(exact.peak_fraction, rel=1e-3)
        assert (rounded.tensor, rounded.layer, rounded.warnings) == (exact.tensor, exact.layer, exact.warnings)


@pytest.mark.parametrize(("kind", "ratio", "held"), [("float16", 1.0, True), ("float16", 1.3, False), ("float16", None, False), ("int8", 1.0, False)])
def test_a_rounded_run_stands_for_float32_only_where_its_noise_was_judged(kind: Kind, ratio: float | None, held: bool) -> None:
    measured = StageMeasurement()
    measured.numbers["strict_noise_ratio"] = ratio
    assert is_held_to_noise(measured, limits_of(kind)) == held


@pytest.mark.parametrize("run", ["strict", "float32"])
def test_the_check_of_the_range_names_its_run(run: str) -> None:
    measured = StageMeasurement()
    record_ranges(RangeAudit(0.1, "x", None, [], []), measured, run)
    (check,) = judged(measured, [row for row in limits_of("float16") if row.check == "range_peak"])
    assert check["passed"] is True
    assert check["reason"].endswith(f"of the {run} run")
