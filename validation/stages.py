"""Which graphs of an artifact are stages of the report, and their entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifact.engine_names import bucket_of, is_engine, stage_of
from artifact.errors import UsageError, ValidationError
from artifact.io_spec import Dtype
from artifact.progress import Progress
from artifact.step_kinds import MADE_BY
from validation import tolerances
from validation.engine_graph import measure_engine_graph
from validation.measurement import LastRows
from validation.oracle import Oracle
from validation.stage import measure_stage


def measure_stages(oracle: Oracle, stages: list[str], progress: Progress) -> list[dict[str, Any]]:
    """The entries of some stages, in their order; an engine graph takes from its stage what it must give."""
    entries, expected = [], dict[str, LastRows]()
    for stage in stages:
        if is_engine(stage):
            entries.append(measure_engine_graph(oracle, stage, expected.get(stage_of(stage)), progress))
        else:
            entry, expected[stage] = measure_stage(oracle, stage, progress)
            entries.append(entry)
    return entries


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
