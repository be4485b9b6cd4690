"""One graph of a comparison: a stage of an artifact, or any decoder's ONNX file; opened, both are run by the same three methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.engine_names import is_engine, stage_of
from artifact.errors import ValidationError
from artifact.io_spec import Dtype, KvCache
from artifact.manifest import Manifest, kv_cache_of
from artifact.progress import Progress, silent
from validation import tolerances
from validation.lone.graph import LoneGraph, open_lone_graph
from validation.lone.limits import Plan, plan_scenarios
from validation.lone.runner import LoneRunner
from validation.open_runner import ArtifactGraph, open_runner
from validation.oracle import slots_of
from validation.plan_runner import PlanRunner
from validation.row_result import Array, RowResult
from validation.scenarios import Scenario
from validation.streamed_runner import Finished

Ids = NDArray[np.int64]


class Running:
    """A graph or plan that has been loaded; its methods are those of ``GraphRunner``, ``joined`` that of a streamed one."""

    def __init__(self, runner: LoneRunner | PlanRunner | ArtifactGraph, slots: int = 0) -> None:
        self._runner, self._slots = runner, slots
        self.one_position = runner.one_position
        self.joined = None if isinstance(runner, LoneRunner | PlanRunner) else runner.joined

    def expect(self, scenarios: Sequence[Scenario], sequences: Sequence[Ids]) -> None:
        """What will be asked for."""
        if not isinstance(self._runner, LoneRunner | PlanRunner):
            self._runner.expect(scenarios, sequences, self._slots)

    def run(self, scenario: Scenario) -> list[RowResult]:
        """All calls of a scenario; one result per row."""
        return self._runner.run(scenario) if isinstance(self._runner, LoneRunner | PlanRunner) else self._runner.run(scenario, self._slots)

    def logits(self, ids: Ids) -> Array:
        """Logits [L, V] of one sequence from an empty cache."""
        return self._runner.logits(ids)


@dataclass(frozen=True)
class Side:
    """A graph that is not loaded yet.

    Attributes:
        name: of the stage, or of the file.
        kind: which rows of the table judge it, by its weights.
        lone: as it was understood, where it is no stage of an artifact.
    """

    name: str
    graph: Path
    config: LlamaConfig
    dtype: Dtype
    kind: tolerances.Kind
    kv_cache: KvCache = "dynamic"
    lone: LoneGraph | None = field(default=None, repr=False)

    @property
    def one_position(self) -> bool:
        """Whether a call gives the logits of its last position alone."""
        return self.lone.one_position if self.lone else is_engine(self.name)

    def plan(self, scenarios: tuple[Scenario, ...]) -> Plan:
        """The scenarios as far as the graph takes them, and what it does not."""
        return plan_scenarios(self.lone, scenarios) if self.lone else Plan(scenarios, ())

    def open(self, scenarios: Sequence[Scenario], *, streamed: bool, finished: Finished | None = None, progress: Progress = silent) -> Running:
        """Load it; a lone file is always loaded whole."""
        slots = slots_of(scenarios)
        if self.lone:
            return Running(LoneRunner(self.lone, self.config), slots)
        asked = {"one_position": self.one_position, "streamed": streamed}
        return Running(open_runner(self.graph, self.config, self.dtype, self.kv_cache, finished=finished, progress=progress, **asked), slots)


def stage_side(artifact: Path, manifest: Manifest, stage: str) -> Side:
    """A stage of an artifact.

    Raises:
        ValidationError: it is no stage that this version knows.
    """
    model = manifest["model"]
    kind = tolerances.kind_of(stage_of(stage), model["dtype"])
    if kind is None:
        raise ValidationError(f"{artifact}: {stage} is not a stage that this version knows")
    return Side(stage, artifact / f"{stage}.onnx", LlamaConfig(**model["config"]), model["dtype"], kind, kv_cache_of(model))


def file_side(graph: Path, config: LlamaConfig, source: str) -> Side:
    """Any decoder's ONNX file that can be of a model; raises as ``open_lone_graph``."""
    lone = open_lone_graph(graph, config, source)
    return Side(graph.name, graph, config, lone.dtype, lone.precision.kind, lone=lone)
