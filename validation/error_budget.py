"""The error budget: how much of a stage's error came from float16, from fusion and from quantisation.

Each step's share is what the error grew by over the stage before it, on the same positions and tokens. Errors of independent causes add less than
that, so a share may be small or even negative where the one before hides it; the shares add up to the last stage's error exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from validation import tolerances

Stage = Mapping[str, Any]
MEASURES = ("mean_abs", "strict_mean_abs", "mean_kl")
"""Error of the worst scenario, of prefill with every operation rounded, and divergence on the texts (of the worst scenario where there are none)."""
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
        chain = _chain(name, known)
        found = {measure: values for measure in MEASURES if (values := _parts(chain, known, measure, dtype, floor)) is not None}
        if len(chain) > 1 and found:
            budgets.append({"stage": name, "measures": found})
    return budgets


def _chain(stage: str, known: Mapping[str, Stage]) -> list[str]:
    """The stages that a stage was made through, itself the last; those that were not measured are left out. An engine graph has none."""
    if stage not in tolerances.STAGE_ORDER:
        return []
    fused = "fused-onnxruntime" if stage.endswith(tolerances.FOR_ONNXRUNTIME) else "fused"
    return [name for name in dict.fromkeys(("traced", fused, stage) if stage != "traced" else ("traced",)) if name in known]


def _parts(chain: list[str], known: Mapping[str, Stage], measure: str, dtype: str, floor: float | None) -> dict[str, Any] | None:
    values = [_value(known[name], measure, floor) for name in chain]
    if not chain or None in values:
        return None
    numbers = [float(value) for value in values if value is not None]
    total, before = numbers[-1], 0.0
    parts = []
    for name, value in zip(chain, numbers, strict=True):
        parts.append({"cause": _cause(name, dtype), "stage": name, "value": value - before, "share": (value - before) / total if total else 0.0})
        before = value
    return {"total": total, "parts": parts}


def _value(stage: Stage, measure: str, floor: float | None) -> float | None:
    if measure != "strict_mean_abs":
        return stage.get(measure)
    ratio = stage.get("strict_noise_ratio")
    return None if ratio is None or not floor else ratio * floor


def _cause(stage: str, dtype: str) -> str:
    if stage not in tolerances.FLOAT_STAGES:
        return "quantisation"
    return EXPORTED[dtype] if stage == "traced" else "fusion"
