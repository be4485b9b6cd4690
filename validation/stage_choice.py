"""Which graphs of an artifact are measured, and in which order; and which are there and are not."""

from __future__ import annotations

from pathlib import Path

from artifact.engine_names import bucket_of, has_gemv, is_engine, is_part, stage_of
from artifact.errors import UsageError, ValidationError
from artifact.io_spec import Dtype
from artifact.step_kinds import MADE_BY
from validation import tolerances


def choose_stages(artifact: Path, wanted: list[str] | None, dtype: Dtype) -> tuple[list[str], list[dict[str, str]]]:
    """The stages to measure in the order they are made, each before its engine graph; and what is there and is not measured, with the reason.

    Raises:
        UsageError: a wanted stage is not known.
        ValidationError: a wanted stage is not there, or there is none at all.
    """
    there = [path.stem for path in artifact.glob("*.onnx")]
    for stage in wanted or ():
        if tolerances.kind_of(stage, dtype) is None:
            raise UsageError(f"{stage!r} is not a stage; stages: {', '.join(tolerances.STAGE_ORDER)}, and each with -engine")
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


def _place(stage: str) -> tuple[int, bool, bool, int]:
    """By stage; each before its engine graphs, and these by the form of decode, then by capacity."""
    return tolerances.STAGE_ORDER.index(stage_of(stage)), is_engine(stage), has_gemv(stage), bucket_of(stage)


def _unmeasurable(stage: str, there: list[str], dtype: Dtype) -> str | None:
    if is_part(stage):
        return "a part of its engine graph, proven the same when it was cut"
    if tolerances.kind_of(stage, dtype) is None:
        return "not a stage that this version knows"
    base = stage_of(stage)
    return None if base in there else f"its stage {base}.onnx is not there to compare it with"
