from __future__ import annotations

from typing import Any

import pytest

from validation.error_budget import error_budgets
from validation.finite import without_nonfinite
from validation.render.budget import view_budget
from validation.render.wording import DASH

TRACED = {"stage": "traced", "mean_abs": 0.01, "strict_noise_ratio": 0.9, "mean_kl": 1e-5}
FUSED = {"stage": "fused", "mean_abs": 0.008, "strict_noise_ratio": 0.8, "mean_kl": 2e-5}
KIND = {"op": "Mul", "nodes": 2, "added": None, "worst": None, "where": "x (Mul)"}
INT8 = {"stage": "int8", "mean_abs": 0.08, "strict_noise_ratio": 8.0, "mean_kl": 1e-3}


def of(stage: str, *stages: dict[str, Any], dtype: str = "fp16", floor: float | None = 0.02) -> dict[str, Any]:
    return next(budget["measures"] for budget in error_budgets(stages, dtype, floor) if budget["stage"] == stage)


def test_each_step_is_charged_with_what_the_error_grew_by() -> None:
    found = of("int8", TRACED, FUSED, INT8)["mean_abs"]
    assert found["total"] == 0.08
    assert [(part["cause"], part["stage"]) for part in found["parts"]] == [("float16", "traced"), ("fusion", "fused"), ("quantisation", "int8")]
    assert [part["value"] for part in found["parts"]] == pytest.approx([0.01, -0.002, 0.072])
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)


def test_the_error_of_rounded_operations_is_a_multiple_of_the_floor() -> None:
    assert of("int8", TRACED, FUSED, INT8)["strict_mean_abs"]["total"] == pytest.approx(0.16)
    assert set(of("int8", TRACED, FUSED, INT8, floor=None)) == {"mean_abs", "mean_kl"}


def test_a_stage_that_was_not_measured_leaves_its_step_to_the_next() -> None:
    assert [part["cause"] for part in of("int8", FUSED, INT8)["mean_abs"]["parts"]] == ["float16 and fusion", "quantisation"]
    assert [part["cause"] for part in of("int8", TRACED, INT8)["mean_abs"]["parts"]] == ["float16", "fusion and quantisation"]
    assert error_budgets([INT8], "fp16", 0.02) == []
    assert set(of("int8", TRACED, FUSED, INT8 | {"mean_kl": None})) == {"mean_abs", "strict_mean_abs"}


def test_errors_are_of_one_scenario_the_worst_of_the_last_stage() -> None:
    """Each stage's own worst would charge quantisation with the difference between two scenarios."""
    stages = [stage | {"scenarios": scenarios(*errors)} for stage, errors in ((TRACED, (0.01, 0.002)), (FUSED, (0.008, 0.003)), (INT8, (0.05, 0.08)))]
    found = of("int8", *stages)["mean_abs"]
    assert found["total"] == 0.08
    assert [part["value"] for part in found["parts"]] == pytest.approx([0.002, 0.001, 0.077])
    assert "mean_abs" not in of("int8", stages[0], stages[1] | {"scenarios": scenarios(0.008)}, stages[2])


def scenarios(*errors: float) -> list[dict[str, Any]]:
    return [{"scenario": f"scenario {number}", "mean_abs": error, "mean_kl": error} for number, error in enumerate(errors)]


def test_a_float32_artifact_has_no_float16_to_blame() -> None:
    assert of("fused", TRACED, FUSED, dtype="fp32")["mean_abs"]["parts"][0]["cause"] == "float32 kernels"


def test_stages_for_onnxruntime_come_from_their_own_fusion_and_engine_graphs_from_none() -> None:
    stages = [TRACED, FUSED | {"stage": "fused-onnxruntime"}, INT8 | {"stage": "int8-onnxruntime"}, INT8 | {"stage": "int8-engine"}]
    assert [budget["stage"] for budget in error_budgets(stages, "fp16", None)] == ["fused-onnxruntime", "int8-onnxruntime"]
    assert [part["stage"] for part in of("int8-onnxruntime", *stages)["mean_abs"]["parts"]] == ["traced", "fused-onnxruntime", "int8-onnxruntime"]


def test_an_error_of_zero_has_no_shares_but_zero() -> None:
    zero = {"mean_abs": 0.0, "mean_kl": None, "strict_noise_ratio": None}
    assert [part["share"] for part in of("fused", TRACED | zero, FUSED | zero)["mean_abs"]["parts"]] == [0.0, 0.0]


def test_the_view_has_a_dash_where_an_error_is_not_finite() -> None:
    nan = {"mean_abs": float("nan"), "mean_kl": None, "strict_noise_ratio": None}
    budget = without_nonfinite({"error_budget": error_budgets([TRACED, FUSED | nan], "fp16", 0.02)})
    view = view_budget(budget | {"stages": [{"stage": "fused", "op_errors": {"layer": 1, "error": None, "kinds": [KIND]}}]})
    assert view is not None
    rows = {row[:2]: row[2:] for row in view.rows}
    assert rows["fused", "mean abs"] == (DASH, f"float16 {DASH}, fusion {DASH}")
    assert rows["fused", "relative, layer 1 alone, every operation rounded"] == (DASH, f"2 Mul {DASH}")


def test_the_view_says_shares_in_words() -> None:
    view = view_budget({"error_budget": error_budgets([TRACED, FUSED, INT8], "fp16", 0.02)})
    assert view is not None
    row = next(row for row in view.rows if row[:2] == ("int8", "mean abs"))
    assert row[2:] == (
        "0.0800",
        "float16 +12\N{NARROW NO-BREAK SPACE}%, fusion −2\N{NARROW NO-BREAK SPACE}%, quantisation +90\N{NARROW NO-BREAK SPACE}%",
    )
    assert view_budget({"error_budget": []}) is None
