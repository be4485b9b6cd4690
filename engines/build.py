"""Build one engine of an artifact: engine graph → preflight → plan → audit → build.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.engine_names import engine_folder, engine_graph
from artifact.errors import EngineError
from artifact.manifest import Manifest, kv_cache_of, read_manifest
from artifact.steps import StepContext, require
from engines.backends.flags import BuildFlags
from engines.backends.protocol import AuditRequest, Backend, BuildRequest, BuildResult
from engines.backends.tensorrt import TensorRT
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.build_cost import Graph, build_cost
from engines.cache_form import cache_entry
from engines.engine_graph import write_engine_graph
from engines.engine_options import EngineOptions
from engines.estimate import device_report, load_of
from engines.graph_weights import levels_bytes, weights_bytes
from engines.preflight import check_build
from engines.profiles import make_profiles
from engines.targets import Target, find_target

logger = logging.getLogger(__name__)

STAGES = {"fp16": "fused", "int8": "int8", "int8-smoothquant": "int8-smoothquant", "int4": "int4", "fp32": "traced"}
"""Precision → the stage its engine is built from; fp32 is for exact parity, so nothing is fused before TensorRT sees it."""
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TensorRTRTX(), TensorRT())}


def build_engine(step: StepContext, options: EngineOptions) -> dict[str, Any]:
    """Write ``<stage>-engine.onnx``, ``engines/<target>-<precision>/part-00.plan`` and ``build.json``.

    Args:
        step: the artifact; its manifest describes the model.
        options: of the engine.

    Returns:
        ``engines``: one entry a plan, as in ``build.json``; ``passed``: whether every audit passed.

    Raises:
        EngineError: no such target, precision or backend; an option that the backend lacks; a bound of the other cache form; no room; or the
            compiler failed.
        ArtifactError: the stage is not there.
    """
    precision, capacity, flags, max_batch = options.precision, options.capacity, options.flags, options.max_batch
    stage, chosen, gpu, manifest = (
        _stage(precision),
        choose_backend(options.backend, flags),
        find_target(options.target),
        read_manifest(step.artifact),
    )
    model, lowering = manifest["model"], _lowering(manifest, stage)
    config, form, dtype = LlamaConfig(**model["config"]), kv_cache_of(model), model["dtype"]
    load = load_of(config, precision, form, max_batch=max_batch, max_length=options.max_length, capacity=capacity)
    length, rows = load.length, load.batch
    profiles = make_profiles(config, dtype, form, max_batch=rows, max_length=length)
    graph_file, folder = _engine_graph(step, stage, capacity), engine_folder(gpu.name, precision, capacity)
    needs = build_cost(_graph(graph_file, config.num_hidden_layers, precision, static=form == "static"))
    check_build(needs, step.artifact / folder, max_memory=options.max_memory)
    plan_name = f"{folder}/part-00.plan"
    with step.write(plan_name) as plan:
        result = chosen.build(BuildRequest(graph_file, plan, gpu, tuple(profiles), flags), step.progress)
        step.progress("auditing the plan", 0, 1)
        audit = chosen.audit(AuditRequest(plan, graph_file, precision, profiles, config, "Attention" in lowering["lowered"]), result)
        size = plan.stat().st_size
        logger.info("%s: %d bytes in %.1f s", plan_name, size, result.seconds)
    entry = {
        "file": plan_name,
        "precision": precision,
        "target": gpu.name,
        "backend": chosen.name,
        "bytes": size,
        **_cost(result),
        "profiles": {profile.name: dict(profile.axes) for profile in profiles},
        **audit,
        **_identity(step, graph_file.name, plan_name),
        **_compiler(result, gpu, flags),
        **lowering,
        "max_batch": max_batch,
        "max_length": length,
        **cache_entry(form, config, dtype, rows, length, result.static_cache),
        "device": device_report(config, load, gpu),
        "notes": _notes(lowering, precision, admitted=rows, asked=max_batch),
    }
    return _record(step, f"{folder}/build.json", {"engines": [entry], "passed": audit["audit"]["passed"]})


def _graph(file: Path, layers: int, precision: str, *, static: bool) -> Graph:
    """What a graph's build depends on."""
    graph = ir.load(file).graph
    return Graph(weights_bytes(graph), layers, precision, levels_bytes(graph), STAGES[precision] != "traced", static)


def _engine_graph(step: StepContext, stage: str, capacity: int | None) -> Path:
    """Write the graph that is built."""
    source, name = require(step.artifact, f"{stage}.onnx"), engine_graph(stage, capacity)
    with step.write(name) as graph_file:
        write_engine_graph(source, graph_file, capacity=capacity)
    return step.artifact / name


def _lowering(manifest: Manifest, stage: str) -> dict[str, Any]:
    """The TensorRT release whose operators a stage keeps to, or None, and what was written in others for it: as fuse recorded."""
    report = manifest["steps"].get("fuse", {}).get("report", {}) if stage != "traced" else {}
    return {"min_tensorrt": report.get("min_tensorrt"), "lowered": report.get("lowered", {})}


def _notes(lowering: dict[str, Any], precision: str, *, admitted: int, asked: int) -> list[str]:
    """What is otherwise than asked, or than usual."""
    rows = f"the profiles admit {admitted} rows: with 1, TensorRT-RTX would write every {precision} weight out at each step"
    attention = f"attention is in operators of TensorRT {lowering['min_tensorrt']} (fuse --min-tensorrt), for which the audit has limits of its own"
    return [rows] * (admitted > asked) + [attention] * ("Attention" in lowering["lowered"])


def _identity(step: StepContext, graph: str, plan: str) -> dict[str, str]:
    """What was built from what."""
    return {"graph": graph, "graph_sha256": step.outputs[graph]["sha256"], "plan_sha256": step.outputs[plan]["sha256"]}


def _compiler(result: BuildResult, gpu: Target, flags: BuildFlags) -> dict[str, Any]:
    """Who built it, for what, and what it was asked for."""
    capability = ".".join(map(str, gpu.compute_capability))
    return {"tensorrt_version": result.version, "compute_capability": capability, "flags": flags.as_record(), **result.compiler}


def _cost(result: BuildResult) -> dict[str, Any]:
    return {
        "build_s": result.seconds,
        "peak_rss_mb": result.peak_rss_mb,
        "peak_anonymous_mb": result.peak_anonymous_mb,
        "network_layers": result.network_layers,
    }


def choose_backend(name: str, flags: BuildFlags | None = None) -> Backend:
    """A backend that can build here.

    Raises:
        EngineError: no backend of that name, or none that can build on this machine (the hint is the command that installs it), or it lacks an
            option.
    """
    if name != "auto" and name not in BACKENDS:
        raise EngineError(f"no backend {name!r}; there is: auto, {', '.join(BACKENDS)}")
    candidates = list(BACKENDS.values()) if name == "auto" else [BACKENDS[name]]
    reasons: dict[str, str] = {}
    usable = next((backend for backend in candidates if not reasons.setdefault(backend.name, backend.unavailable() or "")), None)
    if usable is None:
        words = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        raise EngineError(f"this machine can't build engines: {words}", hint=candidates[0].install_hint())
    if lacking := usable.lacks(flags or BuildFlags()):
        other = next((backend.name for backend in BACKENDS.values() if not backend.lacks(flags or BuildFlags())), None)
        raise EngineError(f"{usable.name} has no {' and no '.join(lacking)}", hint=f"--backend {other} has it" if other else None)
    return usable


def _stage(precision: str) -> str:
    if precision not in STAGES:
        raise EngineError(f"no precision {precision!r}; there is: {', '.join(STAGES)}")
    return STAGES[precision]


def _record(step: StepContext, relative: str, report: dict[str, Any]) -> dict[str, Any]:
    """Write a report; returns it."""
    with step.write(relative) as path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
