"""The entries of the stages: measured, or kept from an interrupted run."""

from __future__ import annotations

from typing import Any

from artifact.engine_names import is_engine, stage_of
from artifact.steps import StepContext
from validation.engine_graph import measure_engine_graph
from validation.measurement import LastRows
from validation.oracle import Oracle
from validation.resume import keep_stage, kept_stage
from validation.stage import measure_stage


def measure_stages(step: StepContext, oracle: Oracle, stages: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of some stages, in their order, and which of them an interrupted run had measured."""
    entries, resumed, expected = [], [], dict[str, LastRows]()
    streamed = oracle.residency.streamed
    for stage in stages:
        if (measured := kept_stage(step, stage, streamed=streamed)) is not None:
            resumed.append(stage)
        else:
            measured = _measure(step, oracle, stage, expected)
            keep_stage(step, stage, measured, streamed=streamed)
        entry, expected[stage] = measured
        entries.append(entry)
    return entries, resumed


def _measure(step: StepContext, oracle: Oracle, stage: str, expected: dict[str, LastRows]) -> tuple[dict[str, Any], LastRows]:
    """One entry; an engine graph takes from its stage what it must give, and leaves nothing to others."""
    if is_engine(stage):
        return measure_engine_graph(oracle, stage, expected.get(stage_of(stage)), step.progress), {}
    return measure_stage(oracle, stage, step.progress)
