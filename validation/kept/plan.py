"""Judge plans on their GPU by the reference's kept predictions: the scenarios at the last position of each call, the texts token by token.

A plan gives one position a call, so it is run as ``plan_stage`` runs it, and what it was not built for is left out, and said.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artifact.config import LlamaConfig
from artifact.errors import ToolkitError
from artifact.manifest import Manifest
from artifact.progress import Progress
from engines.device import Device
from engines.plan import open_engine
from validation import tolerances
from validation.comparison import Subject
from validation.engines import engine_entries, split_engines
from validation.kept.judge import KeptOracle, measure_scenarios, measure_text
from validation.kept.limits import plan_limits
from validation.limit_rows import plan_stage, rows
from validation.measurement import StageMeasurement
from validation.part_kl import PART
from validation.plan_runner import PlanRunner, token_by_token
from validation.plan_stage import TEXT_WINDOWS, admitted, backend_of, fitting
from validation.side import Running, Side
from validation.stage import judged, stage_entry
from validation.watched import NONFINITE, Watched, record_faults

Report = dict[str, Any]


@dataclass(frozen=True)
class Plans:
    """The engines of an artifact that can run here.

    Attributes:
        artifact: the folder; ``manifest`` is its own.
        device: this machine's GPU; the reason why there is none.
        runnable: entries of ``split_engines``.
    """

    artifact: Path
    manifest: Manifest
    device: Device | str
    runnable: list[Report]

    def limits(self) -> list[Report]:
        """The rows that judge them, for the report."""
        return [row for engine in self.runnable for row in rows(plan_stage(engine), plan_limits(engine["precision"]))]

    def measure(self, oracle: KeptOracle, progress: Progress) -> list[Report]:
        """Run all, one after the other; the stages' entries of the report."""
        return [self._measure(oracle, engine, progress) for engine in self.runnable]

    def _measure(self, oracle: KeptOracle, engine: Report, progress: Progress) -> Report:
        """Run one; a plan that can't be run is an entry that failed and says why."""
        assert isinstance(self.device, Device)
        start, model = time.perf_counter(), self.manifest["model"]
        kind, limits = tolerances.plan_kind(engine["precision"]), plan_limits(engine["precision"])
        # of kv_cache "dynamic": a plan's cache can't be filled beforehand, so what no call wrote is not told from what one did
        side = Side(plan_stage(engine), self.artifact / engine["file"], LlamaConfig(**model["config"]), model["dtype"], kind)
        progress(f"{side.name}: on the GPU", 0, 1)
        measured, checks = StageMeasurement(), []
        measured.numbers |= dict.fromkeys((PART, NONFINITE))
        try:
            _run(oracle, PlanRunner(open_engine(self.artifact, engine["plans"], self.device), side.config, side.dtype), side, measured)
        except ToolkitError as error:
            checks.append(tolerances.failed_to_run(str(error)))
        checks += judged(measured, limits)
        return stage_entry(side.name, kind, measured, checks, time.perf_counter() - start, backend=backend_of(engine, self.device))


def with_plans(subject: Subject, device: Device | str) -> tuple[Subject, Plans]:
    """An artifact's engines besides its stages, and the subject whose report names them and says which do not run here, and why."""
    assert subject.manifest is not None
    artifact = subject.folder.parent
    engines = engine_entries(artifact)
    runnable, others = split_engines(artifact, engines, device)
    whole = replace(subject, not_run=[*others, *subject.not_run], about=subject.about | {"engines": engines})
    return whole, Plans(artifact, subject.manifest, device, runnable)


def _run(oracle: KeptOracle, runner: PlanRunner, side: Side, measured: StageMeasurement) -> None:
    measured.numbers["cache_capacity"] = runner.capacity or None
    scenarios = fitting(oracle.scenarios, runner, measured, (PART, *tolerances.TEXT_CHECKS, NONFINITE))
    if not scenarios:
        return
    watched = Watched(Running(runner), side)
    measure_scenarios(oracle, watched, scenarios, measured)
    if admitted(runner, list(map(token_by_token, oracle.sequences)), TEXT_WINDOWS, tolerances.TEXT_CHECKS, measured):
        measure_text(oracle, watched, measured)
    record_faults(measured, watched)
