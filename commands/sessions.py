"""A batch of sequences on a stage, call after call: its graph on the CPU, or the plan that was built from it on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.manifest import read_manifest
from artifact.steps import require
from engines import device as devices
from engines.runner import Array, Plan, PlanSession
from validation.engines import engine_entries
from validation.graph_runner import GraphRunner
from validation.plan_runner import host_feeds
from validation.scenarios import Call

ENGINE = "-engine"


class Session(Protocol):
    """A batch on a graph or a plan."""

    def restart(self) -> None:
        """Empty the caches."""

    def call(self, call: Call) -> Array:
        """New tokens → logits [B, S, V] or [B, 1, V]; the last are those of the last token."""


class GraphSession:
    """``Session`` of a graph: the caches go through the host, call by call."""

    def __init__(self, runner: GraphRunner) -> None:
        self._runner = runner
        self._cache: list[Array] | None = None

    def restart(self) -> None:
        """Empty the caches."""
        self._cache = None

    def call(self, call: Call) -> Array:
        """New tokens → logits."""
        logits, *self._cache = self._runner.call(call, self._cache)
        return logits


class GpuSession:
    """``Session`` of a plan."""

    def __init__(self, session: PlanSession) -> None:
        self._session = session
        self.restart = session.restart

    def call(self, call: Call) -> Array:
        """New tokens → logits."""
        return self._session.call(host_feeds(call))


@dataclass(frozen=True)
class Opened:
    """A session, who runs it (``onnxruntime-cpu``, or the runtime and its version), on what device, and from which file."""

    session: Session
    backend: str
    device: str
    file: str


@contextmanager
def open_session(artifact: Path, stage: str, device: str, *, batch: int, length: int) -> Iterator[Opened]:
    """A stage, ready to be called; what it holds on the GPU is given back at the end.

    Args:
        artifact: the folder.
        stage: which graph; on the GPU, the plan that was built from it.
        device: ``cpu`` runs the graph in ONNX Runtime, ``cuda`` the plan.
        batch: rows.
        length: positions that will be used.

    Raises:
        ArtifactError: no such stage.
        EngineError: no GPU, no plan of this stage that runs here, or the plan admits fewer rows or positions.
    """
    model = read_manifest(artifact)["model"]
    config, dtype = LlamaConfig(**model["config"]), model["dtype"]
    if device == "cpu":
        graph = require(artifact, f"{stage}.onnx")
        runner = GraphRunner(graph, config, dtype, one_position=stage.endswith(ENGINE))
        yield Opened(GraphSession(runner), "onnxruntime-cpu", "cpu", graph.name)
        return
    gpu = devices.read_device()
    plan, backend = open_plan(artifact, stage.removesuffix(ENGINE), gpu)
    with PlanSession(plan, config, dtype, batch=batch, length=length) as session:
        yield Opened(GpuSession(session), backend, gpu.name, plan.name)


def open_plan(artifact: Path, stage: str, gpu: devices.Device) -> tuple[Plan, str]:
    """The first plan of a stage that runs on this GPU, and the runtime with its version.

    Raises:
        EngineError: there is none; with the reason of each that there is.
    """
    entries = [entry for entry in engine_entries(artifact) if entry["graph"] == f"{stage}{ENGINE}.onnx"]
    reasons = []
    for entry in entries:
        try:
            return Plan(artifact, entry, gpu), f"{entry['backend']} {entry['tensorrt_version']}"
        except EngineError as error:
            reasons.append(str(error))
    why = "; ".join(reasons) or f"{artifact} has no plan of {stage}"
    raise EngineError(why, hint=f"python cli.py build {artifact} --precision PRECISION --target GPU; `doctor` says which targets run here")
