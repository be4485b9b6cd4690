"""Narrowing as the report has it: an entry and a check of each stage, and the words of its headline."""

from __future__ import annotations

from typing import Any

from artifact.engine_names import is_engine
from artifact.steps import StepContext
from validation import tolerances
from validation.bisect.narrow import narrow
from validation.oracle import Oracle

FROM_STAGE = "an engine graph has its stage's layers: narrow that one"


def bisect_stages(step: StepContext, oracle: Oracle, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the stages, each narrowed to the node where it parts from the model; a stage where one was found has not passed.

    Args:
        step: told how far it is.
        oracle: what the stages were compared with.
        stages: entries of the report.
    """
    return [stage if is_engine(stage["stage"]) else _narrowed(step, oracle, stage) for stage in stages]


def _narrowed(step: StepContext, oracle: Oracle, stage: dict[str, Any]) -> dict[str, Any]:
    found = narrow(oracle, oracle.artifact / f"{stage['stage']}.onnx", stage, step.progress)
    kind = tolerances.kind_of(stage["stage"], oracle.dtype)
    assert kind is not None
    faults, where = (1, found["found"]["node"]) if found["found"] else (0 if found["complete"] else None, None)
    check = tolerances.judge(tolerances.asked_limit(kind, tolerances.NARROWED), faults, where=where, missing=found["words"])
    checks = [*stage["checks"], check | {"reason": found["words"]}]
    seconds = stage["seconds_by_part"] | {"bisect": found["seconds"]}
    passed = False if faults else stage["passed"]
    return stage | {"checks": checks, "passed": passed, "bisect": found, "seconds_by_part": seconds}
