"""A batch of sequences on a stage, call after call: its graph on the CPU, or the plan that was built from it on the GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifact.config import LlamaConfig
from artifact.engine_names import built_from, has_gemv, is_engine, stage_of, whole_graph
from artifact.errors import EngineError, UsageError
from artifact.io_spec import BATCH, TOTAL, KvCache
from artifact.manifest import kv_cache_of, read_manifest
from artifact.steps import require
from engines import device as devices
from engines.cards import card_of
from engines.plan import Plan, PlanChain, open_engine
from engines.runnable import made_for_another
from engines.runner import Array, PlanSession
from engines.targets import Target
from validation.calls import AnyCall
from validation.engines import engine_entries, whole_engines
from validation.graph_runner import GraphRunner
from validation.greedy import Decoder
from validation.tolerances import STAGE_ORDER

logger = logging.getLogger(__name__)


class PlanDecoder:
    """``Decoder`` of a plan: one batch, whose caches stay on the GPU."""

    def __init__(self, session: PlanSession, plan: Plan | PlanChain) -> None:
        self.name = plan.name
        self.kv_cache: KvCache = "static" if plan.capacity else "dynamic"
        self.capacity = plan.capacity or None
        self._session = session

    def new_cache(self, batch: int, capacity: int = 0) -> list[Array]:
        """Empty the caches; the batch and the capacity are the session's."""
        self._session.restart()
        return []

    def call(self, call: AnyCall, cache: list[Array] | None) -> list[Array]:
        """New tokens → logits [B, 1, V] alone."""
        return [self._session.call(call.inputs())]


@dataclass(frozen=True)
class Opened:
    """A stage that can be called.

    Attributes:
        decoder: to call.
        backend: ``onnxruntime-cpu``, or the runtime and its version.
        device: ``cpu``, or the GPU's name.
        file: the graph, or the plan; of an engine in parts the first.
        precision: of the plan; None of a graph.
        card: which of the known GPUs this one is; None of a CPU, or where it is none of them.
        skipped: better plans that are for another machine, each with the reason.
    """

    decoder: Decoder
    backend: str
    device: str
    file: str
    precision: str | None = None
    card: Target | None = None
    skipped: tuple[str, ...] = ()

    def as_report(self) -> dict[str, Any]:
        """What ran it: backend, device, file, kv_cache."""
        return {"backend": self.backend, "device": self.device, "file": self.file, "kv_cache": self.decoder.kv_cache}


def check_stage(artifact: Path, stage: str) -> None:
    """Tell what is no stage at all from what is not there yet.

    Raises:
        UsageError: no stage has this name; with those that are there.
    """
    if stage_of(stage) not in STAGE_ORDER:
        names = {path.stem for path in artifact.glob("*.onnx")}
        there = [name for base in STAGE_ORDER for name in sorted(names) if stage_of(name) == base]
        raise UsageError(f"--stage {stage!r} is not a stage; {artifact} has: {', '.join(there) or 'none'}")


@contextmanager
def open_session(artifact: Path, stage: str, device: str, *, batch: int, length: int, capacity: int | None = None) -> Iterator[Opened]:
    """A stage, ready to be called; what it holds on the GPU is given back at the end.

    Args:
        artifact: the folder.
        stage: which graph; on the GPU, the plan that was built from it.
        device: ``cpu`` runs the graph in ONNX Runtime, ``cuda`` the plan.
        batch: rows.
        length: positions that will be used.
        capacity: of a static cache, the one plan that is meant; None takes the smallest that holds ``length``.

    Raises:
        ArtifactError: no such stage.
        EngineError: no GPU, no plan of this stage that runs here, or the plan admits fewer rows or positions.
    """
    model = read_manifest(artifact)["model"]
    config, dtype = LlamaConfig(**model["config"]), model["dtype"]
    if device == "cpu":
        graph = require(artifact, f"{stage}.onnx")
        runner = GraphRunner(graph, config, dtype, kv_cache_of(model), one_position=is_engine(stage))
        yield Opened(runner, "onnxruntime-cpu", "cpu", graph.name)
        return
    gpu = devices.read_device()
    plan, backend, skipped = open_plan(artifact, stage, gpu, Wanted(batch, length, capacity))
    with PlanSession(plan, config, dtype, batch=batch, length=length) as session:
        yield Opened(PlanDecoder(session, plan), backend, gpu.name, plan.name, plan.precision, card_of(gpu), skipped)


@dataclass(frozen=True)
class Wanted:
    """What a plan must hold: rows, positions, and of static caches perhaps the one of a capacity."""

    batch: int
    length: int
    capacity: int | None = None

    def order(self, entry: Mapping[str, Any]) -> tuple[bool, bool, int]:
        """Plans that hold it first; of them those whose decode is GEMMs, and the smallest.

        Of those that don't the largest comes first, because its refusal says how far it reaches.
        """
        ranges = entry["profiles"]["prefill"]
        slots = int(entry.get("capacity") or 0)
        room = slots or ranges[TOTAL][2]
        meant = self.capacity in (None, slots) if slots else True
        fits = meant and ranges[BATCH][2] >= self.batch and room >= self.length
        return not fits, has_gemv(_graph_name(entry["graph"])), slots if fits else -slots


def open_plan(artifact: Path, stage: str, gpu: devices.Device, wanted: Wanted) -> tuple[Plan | PlanChain, str, tuple[str, ...]]:
    """The smallest engine of a stage that holds what is wanted and is for this machine.

    Args:
        artifact: the folder.
        stage: ``fused``, or ``fused-engine-gemv`` for that form alone.
        gpu: this machine's.
        wanted: what it must hold.

    Returns:
        The engine; its runtime with the version; why each that would have come before it is for another machine.

    Raises:
        EngineError: there is none, with the reason of each that there is; or the one that was found is not what was built.
        ArtifactError: it is stale, or was changed.
    """
    engines = [plans for plans in whole_engines(engine_entries(artifact)) if is_of(plans[0]["graph"], stage)]
    skipped: list[str] = []
    for plans in sorted(engines, key=lambda plans: wanted.order(plans[0])):
        if elsewhere := next((reason for plan in plans for reason in made_for_another(plan, gpu)), None):
            skipped.append(f"{plans[0]['file']} can't run here: {elsewhere}")
            logger.info("%s", skipped[-1])
            continue
        for plan in plans:
            require(artifact, plan["file"])  # what was made from another graph than there is now is refused
        return open_engine(artifact, plans, gpu), f"{plans[0]['backend']} {plans[0]['tensorrt_version']}", tuple(skipped)
    why = "; ".join(skipped) or f"{artifact} has no plan of {stage}"
    raise EngineError(why, hint=f"python cli.py build {artifact} --precision PRECISION --target GPU; `doctor` says which targets run here")


def is_of(graph: str, stage: str) -> bool:
    """Whether a plan's graph was made from a stage; an engine graph's name also says which form of decode is meant."""
    return built_from(graph) == stage_of(stage) and (not is_engine(stage) or has_gemv(stage) == has_gemv(_graph_name(graph)))


def _graph_name(graph: str) -> str:
    """Name of the whole graph of a plan or its part."""
    return whole_graph(graph).removesuffix(".onnx")
