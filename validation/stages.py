"""Which graphs of an artifact are stages of the report, and their entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifact.engine_names import bucket_of, is_engine, stage_of
from artifact.errors import UsageError, ValidationError
from artifact.io_spec import Dtype
from artifact.step_kinds import MADE_BY
from artifact.steps import StepContext
from validation import tolerances
from validation.engine_graph import measure_engine_graph
from validation.measurement import LastRows
from validation.oracle import Oracle
from validation.resume import keep_stage, kept_stage
from validation.stage import measure_stage


def measure_stages(step: StepContext, oracle: Oracle, stages: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of some stages, in their order, and which of them an interrupted run had measured."""
    entries, resumed, expected = [], [], dict[str, LastRows]()
    for stage in stages:
        if (measured := kept_stage(step, stage)) is not None:
            resumed.append(stage)
        else:
            measured = _measure(step, oracle, stage, expected)
            keep_stage(step, stage, measured)
        entry, expected[stage] = measured
        entries.append(entry)
    return entries, resumed


def _measure(step: StepContext, oracle: Oracle, stage: str, expected: dict[str, LastRows]) -> tuple[dict[str, Any], LastRows]:
    """One entry; an engine graph takes from its stage what it must give, and leaves nothing to others."""
    if is_engine(stage):
        return measure_engine_graph(oracle, stage, expected.get(stage_of(stage)), step.progress), {}
    return measure_stage(oracle, stage, step.progress)


def choose_stages(artifact: Path, wanted: list[str] | None, dtype: Dtype) -> tuple[list[str], list[dict[str, str]]]:
    """The stages to measure in the order they are made, each before its engine graph; and what is there and is not measured, with the reason.

    Raises:
        UsageError: a wanted stage is not known.
        ValidationError: a wanted stage is not there, or there is none at all.
    """
    there = [path.stem for path in artifact.glob("*.onnx")]
    for stage in wanted or ():
        if tolerances.kind_of(stage, dtype) is None:
            raise UsageError(f"{stage!r} is not a stage; stages: {', '.join(tolerances.STAGE_ORDER)}, and each with {tolerances.ENGINE}")
        if stage not in there:
            hint = MADE_BY.get(f"{stage}.onnx", "python cli.py build {artifact}").format(artifact=artifact)
            raise ValidationError(f"{artifact} has no {stage}.onnx", hint=hint)
    chosen, left_out = [], []
    for stage in there:
        if reason := _unmeasurable(stage, there, dtype) or (None if not wanted or stage in wanted else "not asked for"):
            left_out.append({"stage": stage, "reason": reason})
        else:
            chosen.append(stage)
    if not chosen:
        raise ValidationError(f"{artifact} has no graph to measure", hint=MADE_BY["traced.onnx"].format(artifact=artifact))
    return sorted(set(chosen), key=_place), sorted(left_out, key=lambda entry: entry["stage"])


def _place(stage: str) -> tuple[int, bool, int]:
    """By stage; each before its engine graphs, and these by capacity."""
    return tolerances.STAGE_ORDER.index(stage_of(stage)), is_engine(stage), bucket_of(stage)


def _unmeasurable(stage: str, there: list[str], dtype: Dtype) -> str | None:
    if tolerances.kind_of(stage, dtype) is None:
        return "not a stage that this version knows"
    base = stage_of(stage)
    return None if base in there else f"its stage {base}.onnx is not there to compare it with"
