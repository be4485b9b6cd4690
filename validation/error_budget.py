"""The error budget: how much of a stage's error came from float16, from fusion and from quantisation.

Each step's share is what the error grew by over the stage before it, on the same positions and tokens. Errors of independent causes add less than
that, so a share may be small or even negative where the one before hides it; the shares add up to the last stage's error exactly. A step whose own
stage was not measured is charged together with the next one: "float16 and fusion".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from validation import tolerances

Stage = Mapping[str, Any]
MEASURES = ("mean_abs", "strict_mean_abs", "mean_kl")
"""Error of the last stage's worst scenario, the same one of every stage; of prefill with every operation rounded; and divergence on the texts (of
the worst scenario likewise where there are none)."""
EXPORTED = {"fp16": "float16", "fp32": "float32 kernels"}
"""What the first stage differs from the reference by, by dtype of the artifact."""


def error_budgets(stages: Sequence[Stage], dtype: str, floor: float | None) -> list[dict[str, Any]]:
    """One budget for each stage that has a predecessor.

    Args:
        stages: entries of the report.
        dtype: of the artifact.
        floor: mean error of float16 itself, which strict noise ratios are multiples of.

    Returns:
        stage, and for each measure its ``total`` and ``parts``: [{cause, stage, value, share}], in the order in which the graph was made; a measure
        that one of the stages lacks is left out.
    """
    known = {str(stage["stage"]): stage for stage in stages}
    budgets = []
    for name in known:
        chain = _chain(name)
        found = {measure: values for measure in MEASURES if (values := _parts(chain, known, measure, dtype, floor)) is not None}
        if sum(one in known for one in chain) > 1 and found:
            budgets.append({"stage": name, "measures": found})
    return budgets


def _chain(stage: str) -> list[str]:
    """The stages that a stage was made through, itself the last. An engine graph has none."""
    if stage not in tolerances.STAGE_ORDER:
        return []
    fused = "fused-onnxruntime" if stage.endswith(tolerances.FOR_ONNXRUNTIME) else "fused"
    return list(dict.fromkeys(("traced", fused, stage) if stage != "traced" else ("traced",)))


def _parts(chain: list[str], known: Mapping[str, Stage], measure: str, dtype: str, floor: float | None) -> dict[str, Any] | None:
    measured = [name for name in chain if name in known]
    worst = _worst_scenario(known[measured[-1]], measure) if measured else None
    values = {name: _value(known[name], measure, floor, worst) for name in measured}
    if not values or None in values.values():
        return None
    total, before, causes = float(values[measured[-1]] or 0.0), 0.0, list[str]()
    parts = []
    for name in chain:
        causes.append(_cause(name, dtype))
        if name in values:
            value = float(values[name] or 0.0)
            parts.append({"cause": " and ".join(causes), "stage": name, "value": value - before, "share": (value - before) / total if total else 0.0})
            before, causes = value, []
    return {"total": total, "parts": parts}


def _worst_scenario(stage: Stage, measure: str) -> str | None:
    """Which scenario a stage's number is of; None for a number that is of none."""
    if measure == "strict_mean_abs" or (measure == "mean_kl" and stage.get("quality")):
        return None
    errors = {str(entry["scenario"]): entry[measure] for entry in stage.get("scenarios") or ()}
    return next((name for name, error in errors.items() if not isfinite(error)), max(errors, key=lambda name: errors[name], default=None))


def _value(stage: Stage, measure: str, floor: float | None, scenario: str | None) -> float | None:
    if scenario is not None:
        return next((entry[measure] for entry in stage["scenarios"] if entry["scenario"] == scenario), None)
    if measure != "strict_mean_abs":
        return stage.get(measure)
    ratio = stage.get("strict_noise_ratio")
    return None if ratio is None or not floor else ratio * floor


def _cause(stage: str, dtype: str) -> str:
    if stage not in tolerances.FLOAT_STAGES:
        return "quantisation"
    return EXPORTED[dtype] if stage == "traced" else "fusion"
