"""The one table of limits: what each kind of stage must hold, and why just that. Nothing about limits stands anywhere else.

Kept predictions have a row more in kept/limits.py, a number that was asked for its own. What is measured is in the report, passed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import eq, le, lt
from typing import Any, Literal

from artifact.engine_names import has_gemv, is_engine, stage_of
from artifact.errors import ValidationError
from artifact.io_spec import Dtype, KvCache
from graphs.quantize.placement import ROOM, gate_of

Kind = Literal[
    "float32", "float16", "int8", "int8-onnxruntime", "int8-smoothquant", "int4", "engine", "engine-gemv",
    "plan", "plan-int8", "plan-int8-smoothquant", "plan-int4", "plan-fp32", "reference", "oracle",
]  # fmt: skip
COMPARE: Mapping[str, Callable[[float, float], bool]] = {"<=": le, "<": lt, "==": eq}
FLOAT_STAGES = ("traced", "fused", "fused-onnxruntime")
STAGE_ORDER = (*FLOAT_STAGES, "int8", "int8-smoothquant", "int4", "int8-onnxruntime", "int4-onnxruntime")
FOR_ONNXRUNTIME = "-onnxruntime"
"""How a stage ends that is the same scheme in ONNX Runtime's own operators."""
GATE_TOKENS = 2048
"""Scored tokens from which perplexity is judged; fewer leave a standard error that lets damage pass."""
GATE_TOKENS_OF_A_TEXT = 512
"""The same of each text, because each is judged."""
TEXT_CHECKS = ("perplexity_increase_pct", "mean_kl")
"""What every text must hold by itself: damage on one must not hide in the mean of all."""
UNGATED: Kind = "int4"
"""Judged by structure alone: a graph with other weights would hold those limits too, so it may fail, and never passes."""
JUDGED_ON_TEXT: tuple[Kind, ...] = ("int8-smoothquant", "plan-int8-smoothquant")  # other weights would pass all other checks
NO_QUALITY_LIMIT = f"{UNGATED} has no limit for quality"
PLAN_KINDS: Mapping[str, Kind] = {
    "fp16": "plan", "fp32": "plan-fp32", "int8": "plan-int8", "int8-smoothquant": "plan-int8-smoothquant", "int4": "plan-int4",
}  # fmt: skip
"""Precision of a build → which rows judge its plan."""


@dataclass(frozen=True)
class Limit:
    """One row: a kind of stage, a check and what it must hold."""

    kind: Kind
    check: str
    comparison: Literal["<=", "<", "=="]
    limit: float
    reason: str


PART = "each row's prompt, chunk or steps alone ÷ the floor at the same positions: what prefill and self-consistency may have, one floor each"
SPREAD = "each row's prompt, chunk or steps: its error ÷ the same row's alone, at the same positions: calls and padding change no result"
FINITE = "no result is NaN or inf when every operation is rounded to float16: a GPU does not compute in float32 as ONNX Runtime on a CPU does"
RANGE = "a float16 tensor of the float32 run at 65504 overflows on a GPU; above half is a warning"
CONSISTENT = (
    "each row's prompt, chunk or steps against the graph's own logits for that row alone ÷ the floor there: two runs that round differ by up to 1.1"
)
ROUNDED_SPREAD = f"{SPREAD}; logits themselves are not compared: where inputs are rounded, a difference of 1e-7 can be a whole level"
FEW_POSITIONS = "few positions a call: an H100 measures 1.14 with products summed in float32, 2.45 in float16 (its prefills: 1.06 to 1.4, 2.0 to 4.2)"
GEMV = "mean error of its few positions ÷ its stage's there: decode adds up in another order, so each rounds to float16 by itself"
REFERENCE = "nats, transformers' float16 against the reference: above it the reference is not the model that transformers computes"

LIMITS = (
    Limit("reference", "reference_kl", "<=", 1e-3, REFERENCE),
    Limit(
        "oracle", "hidden_error", "<=", 5e-6, "every layer's output; measured 0 to 2e-7: the same kernels, on other shapes; rope_theta × 1.001: 8e-5"
    ),
    Limit("oracle", "max_abs_relative", "<=", 2e-5, "÷ the largest logit, all four scenarios; measured 1e-6 to 2e-6; rms_norm_eps × 1.1: 5e-5"),
    Limit("oracle", "cache_error", "<=", 2e-5, "keys and values of every layer, root mean square; measured 4e-7 to 1e-6"),
    Limit("oracle", "mean_kl", "<=", 1e-8, "nats; measured 0 to 1e-11; rope_theta × 1.001: 3e-8"),
    Limit("float32", "max_abs_relative", "<=", 1e-4, "float32 kernels differ by summation order alone: ÷ the largest logit, on all four scenarios"),
    Limit("float32", "cache_error", "<=", 1e-4, "keys and values of every layer, root mean square: another layer's would be near 1"),
    Limit("float16", "noise_ratio", "<=", 1.0, "no scenario is further from float32 than transformers' own float16"),
    Limit("float16", "part_noise_ratio", "<=", 2.0, PART),
    Limit("float16", "self_consistency", "<=", 2.0, CONSISTENT),
    Limit("float16", "strict_noise_ratio", "<=", 1.25, "every operation rounded: a pessimistic bound for an engine; other exporters: 0.74 to 1.08"),
    Limit("float16", "worst_local_ratio", "<=", 2.0, "no layer adds twice the error of its own rounding to float16; one linear × 1.01 adds 2 to 17"),
    Limit("float16", "range_peak", "<", 1.0, RANGE),
    Limit("float16", "decisive_disagreements", "==", 0, "where the margin exceeds twice the floor's error, rounding can't change the best token"),
    Limit("float16", "cache_error", "<=", 0.02, "keys and values of every layer, root mean square: float16 gives 0.002, another layer near 1"),
    Limit("int8", "perplexity_increase_pct", "<=", 1.0, "increase − 2 standard errors; rounding to int8 by output channel measures up to 0.6 %"),
    Limit("int8", "mean_kl", "<=", 0.01, "nats; rounding to int8 by output channel measures 0.005"),
    Limit("int8", "self_consistency", "<=", 2.0, CONSISTENT),
    Limit("int8", "scenario_spread", "<=", 1.1, SPREAD),
    Limit("int8", "cache_error", "<=", 0.2, "keys and values of every layer, root mean square: int8 weights give 0.05, another layer near 1"),
    Limit("int8", "strict_nonfinite", "==", 0, FINITE),
    Limit("int8", "range_peak", "<", 1.0, RANGE),
    Limit("int8-onnxruntime", "perplexity_increase_pct", "<=", 1.0, "increase − 2 standard errors; it measures up to 0.6 %"),
    Limit("int8-onnxruntime", "mean_kl", "<=", 0.01, "nats; it measures 0.005"),
    Limit("int8-onnxruntime", "scenario_spread", "<=", 1.25, f"{ROUNDED_SPREAD}; 1.21 where the kernel rounds inputs, as this one does"),
    Limit("int8-onnxruntime", "cache_error", "<=", 0.2, "keys and values of every layer, root mean square: another layer near 1"),
    Limit("int8-onnxruntime", "strict_nonfinite", "==", 0, FINITE),
    Limit("int8-onnxruntime", "range_peak", "<", 1.0, RANGE),
    Limit("int8-smoothquant", "perplexity_increase_pct", "<=", 1.0, "increase − 2 standard errors"),
    Limit("int8-smoothquant", "mean_kl", "<=", gate_of(1.0), f"nats, of any number of tokens: {ROOM:g} times what placement may leave on its text"),
    Limit("int8-smoothquant", "scenario_spread", "<=", 1.5, f"{ROUNDED_SPREAD}: 64 steps measure 0.98 to 1.01, 8 of a row 0.76 to 1.36"),
    Limit("int8-smoothquant", "strict_nonfinite", "==", 0, FINITE),
    Limit("int8-smoothquant", "range_peak", "<", 1.0, RANGE),
    Limit("int4", "scenario_spread", "<=", 1.1, SPREAD),
    Limit("int4", "strict_nonfinite", "==", 0, FINITE),
    Limit("int4", "range_peak", "<", 1.0, RANGE),
    Limit("engine", "engine_difference", "<=", 2**-9, "largest difference from its stage ÷ its largest logit: one float16 rounding each"),
    Limit("engine", "engine_structure", "==", 0, "outputs, nodes and weights that differ from its stage with the last position gathered"),
    Limit("engine-gemv", "engine_noise_ratio", "<=", 2.0, GEMV),
    Limit("engine-gemv", "engine_structure", "==", 0, "differences from its stage with the last position gathered and decode's second form added"),
    Limit("plan", "decode_noise_ratio", "<=", 1.25, "the main sequence decoded on the GPU: what strict mode allows each operation rounded by itself"),
    Limit("plan", "noise_ratio", "<=", 2.0, FEW_POSITIONS),
    Limit("plan", "mean_kl", "<=", 1e-3, "nats, every token of the text decoded on the GPU; float16 graphs measure 1e-5 to 2e-5"),
    Limit("plan", "cache_error", "<=", 0.02, "keys and values of every layer after each scenario, root mean square: float16 gives 0.002"),
    Limit("plan", "decisive_disagreements", "==", 0, "where the margin exceeds twice the floor's error, rounding can't change the best token"),
    Limit("plan-int8", "perplexity_increase_pct", "<=", 1.0, "increase − 2 standard errors, every token of the text decoded on the GPU"),
    Limit("plan-int8", "mean_kl", "<=", 0.01, "nats, every token of the text decoded on the GPU; rounding to int8 measures 0.005"),
    Limit("plan-int8", "cache_error", "<=", 0.2, "keys and values of every layer after each scenario, root mean square: int8 weights give 0.05"),
    Limit("plan-int4", "cache_error", "<=", 0.7, "keys and values of every layer after each scenario, root mean square: another layer near 1"),
    Limit("plan-int8-smoothquant", "perplexity_increase_pct", "<=", 1.0, "increase − 2 standard errors, every token of the text decoded on the GPU"),
    Limit("plan-int8-smoothquant", "mean_kl", "<=", gate_of(1.0), "nats, every token of the text decoded on the GPU; its graph may have as much"),
    Limit("plan-fp32", "max_abs_relative", "<=", 1e-4, "float32 kernels differ by summation order alone: ÷ the largest logit, on all four scenarios"),
    Limit("plan-fp32", "cache_error", "<=", 1e-4, "keys and values of every layer, root mean square: another layer's would be near 1"),
)
"""Kind × check → limit."""

NO_FLOOR = (
    Limit("float16", "mean_kl", "<=", 1e-3, "there is no finite floor to measure noise against; float16 graphs measure 1e-5 to 2e-5"),
    Limit("float16", "scenario_spread", "<=", 1.5, SPREAD),
)
"""What a float16 stage must hold instead where the checkpoint overflows in float16 and has no floor."""
STRAY = "caches with a slot that no call wrote and that has changed, or with padding that is not finite: 0 · NaN would poison real tokens"
_WITH_CACHES = tuple(dict.fromkeys(row.kind for row in LIMITS if row.kind not in ("reference", "oracle")))
STATIC = tuple(Limit(kind, "stray_slots", "==", 0, STRAY) for kind in _WITH_CACHES)
"""What a stage with a static cache must hold besides; the next, one that is run layer by layer; the last, one that was narrowed to the node."""
STREAMED = tuple(Limit(kind, "joined_cuts", "==", 0, "outputs, nodes, weights' places: the cuts that ran are the graph") for kind in _WITH_CACHES)

NARROWED, EDGES = "narrowed_faults", "edge_faults"
ASKED_FOR = {
    NARROWED: "nodes that compute or read something else than the model's own trace, each given exact inputs",
    EDGES: "edges of the plans' profiles (least and most rows, tokens and past) at which a layer computes something else than the trace",
}  # must be 0 where it was asked for: ``validate --bisect`` and ``--edges``


def asked_limit(kind: Kind, check: str) -> Limit:
    """The row of a kind for what was asked for."""
    return Limit(kind, check, "==", 0, ASKED_FOR[check])


def kind_of(stage: str, dtype: Dtype) -> Kind | None:
    """Which rows judge a stage; None for a stage that this version does not know."""
    if stage_of(stage) not in STAGE_ORDER:
        return None
    if is_engine(stage):
        return "engine-gemv" if has_gemv(stage) else "engine"
    if stage in FLOAT_STAGES:
        return "float16" if dtype == "fp16" else "float32"
    return stage if stage == "int8-onnxruntime" else stage.removesuffix(FOR_ONNXRUNTIME)  # type: ignore[return-value]


def entry_kind(stage: str, dtype: Dtype) -> Kind | None:
    """Whose rule gives a stage's verdict: an engine graph's own, equal to its stage is the proof; that of weights without a limit."""
    return kind_of(stage_of(stage) if is_ungated(stage) else stage, dtype)


def is_ungated(stage: str) -> bool:
    """Whether a stage's weights have no limit for quality."""
    return kind_of(stage_of(stage), "fp16") == UNGATED


def plan_kind(precision: str) -> Kind:
    """Which rows judge a plan that was run.

    Raises:
        ValidationError: there are none for this precision.
    """
    if precision not in PLAN_KINDS:
        raise ValidationError(f"no limits for a plan of precision {precision!r}; there are: {', '.join(PLAN_KINDS)}", hint="build the engine again")
    return PLAN_KINDS[precision]


def limits_of(kind: Kind, *, has_floor: bool = True, kv_cache: KvCache = "dynamic", streamed: bool = False) -> list[Limit]:
    """The rows of a kind, in the table's order."""
    asked = (*LIMITS, *(NO_FLOOR if not has_floor else ()), *(STATIC if kv_cache == "static" else ()), *(STREAMED if streamed else ()))
    return [row for row in asked if row.kind == kind]


def too_few_tokens(scored: Sequence[int]) -> str | None:
    """Why perplexity on so many tokens of each text proves nothing; None where it is judged."""
    if sum(scored) < GATE_TOKENS:
        return f"too few tokens for the gate ({sum(scored):,} of {GATE_TOKENS:,})"
    return f"too few tokens of a text for the gate ({min(scored):,} of {GATE_TOKENS_OF_A_TEXT:,})" if min(scored) < GATE_TOKENS_OF_A_TEXT else None


def gated_value(check: str, numbers: Mapping[str, Any], texts: Sequence[Mapping[str, Any]] = ()) -> tuple[float | None, str | None]:
    """The value that a limit is held against, None where it is not judged, and the text that it is of, where there are several.

    What is measured on texts is gated by the worst of them. Perplexity's increase is gated by its lower end, two standard errors down, and on enough
    tokens only; one that is not finite fails on any.
    """
    if check not in TEXT_CHECKS or not texts or numbers[check] is None:
        return numbers[check], None
    ends = [text[check] - 2 * text["perplexity_se_pct"] if check == "perplexity_increase_pct" else text[check] for text in texts]
    worst = next((index for index, end in enumerate(ends) if not isfinite(end)), ends.index(max(ends)))
    named = str(texts[worst]["text"]) if len(texts) > 1 else None
    if check == "perplexity_increase_pct" and isfinite(ends[worst]) and too_few_tokens([text["tokens"] for text in texts]):
        return None, None
    return ends[worst], named


def judge(row: Limit, value: float | None, *, where: str | None = None, missing: str | None = None) -> dict[str, Any]:
    """One check of the report.

    Args:
        row: the limit.
        value: what was measured; None: not measured, judged neither way; NaN or inf: measured and failed.
        where: the layer or tensor.
        missing: why there is no value.
    """
    finite = value is not None and isfinite(value)
    passed = COMPARE[row.comparison](value, row.limit) if value is not None and finite else (None if value is None else False)
    unjudged = f"not judged: {missing or 'not measured'}"
    reason = unjudged if value is None else row.reason if finite else f"the value is not finite; {row.reason}"
    return {
        "check": row.check,
        "value": value if finite else None,
        "limit": row.limit,
        "comparison": row.comparison,
        "passed": passed,
        "reason": reason,
        "where": where,
    }


def judge_reference(mean_kl: float | None, reason: str | None) -> dict[str, Any]:
    """The check that stands before all stages: where it fails, the floor and every number measured by it say nothing."""
    return judge(limits_of("reference")[0], mean_kl, missing=reason or "transformers was not run, the float16 run is our own model's")


def failed_to_run(message: str) -> dict[str, Any]:
    """The check of a stage that could not be run at all."""
    return {"check": "runs", "value": "failed", "limit": "passed", "comparison": "==", "passed": False, "reason": message, "where": None}


def verdict(checks: list[dict[str, Any]], kind: Kind | None = None) -> bool | None:
    """False if a check failed, True if one passed and none failed, None if nothing was judged, or of quality (``UNGATED``, ``JUDGED_ON_TEXT``)."""
    outcomes = {check["passed"] for check in checks}
    if False in outcomes:
        return False
    proof = {check["passed"] for check in checks if kind not in JUDGED_ON_TEXT or check["check"] in TEXT_CHECKS}
    return True if True in proof and kind not in (UNGATED, PLAN_KINDS[UNGATED]) else None
