"""Build one engine of an artifact: engine graph → preflight → plan → audit → build.json."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import KvCache, cache_bytes
from artifact.manifest import kv_cache_of, read_manifest
from artifact.steps import StepContext, require
from engines.audit import audit_plan
from engines.backends.protocol import Backend, BuildRequest, BuildResult
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.engine_graph import write_engine_graph
from engines.graph_weights import weights_bytes
from engines.preflight import check_room
from engines.profiles import LEAST_ROWS, default_length, make_profiles
from engines.targets import find_target

logger = logging.getLogger(__name__)

STAGES = {"fp16": "fused", "int8": "int8", "fp32": "traced"}
"""Precision → the stage its engine is built from; fp32 is for exact parity, so nothing is fused before TensorRT sees it."""
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TensorRTRTX(),)}


def build_engine(
    step: StepContext,
    *,
    precision: str,
    target: str,
    backend: str = "auto",
    max_batch: int = 4,
    max_length: int | None = None,
    capacity: int | None = None,
) -> dict[str, Any]:
    """Write ``<stage>-engine.onnx``, ``engines/<target>-<precision>/part-00.plan`` and ``build.json``.

    Args:
        step: the artifact; its manifest describes the model.
        precision: ``fp16``, ``int8`` or ``fp32``.
        target: a name of ``targets``.
        backend: ``auto`` or a name of ``BACKENDS``.
        max_batch: rows.
        max_length: tokens in prompt and answer together; None is the model's, at most 4096. Of a dynamic cache only.
        capacity: the same for a static cache, which needs it.

    Returns:
        ``engines``: one entry a plan, as in ``build.json``; ``passed``: whether every audit passed.

    Raises:
        EngineError: no such target, precision or backend; a bound of the other cache form; no room; or the compiler failed.
        ArtifactError: the stage is not there.
    """
    stage, chosen, gpu = _stage(precision), choose_backend(backend), find_target(target)
    model = read_manifest(step.artifact)["model"]
    config = LlamaConfig(**model["config"])
    check_cache_options(kv_cache_of(model), config, max_length, capacity)
    length = next(bound for bound in (capacity, max_length, default_length(config)) if bound is not None)
    rows = max(max_batch, LEAST_ROWS.get(precision, 1))
    profiles = make_profiles(config, model["dtype"], kv_cache_of(model), max_batch=rows, max_length=length)
    source = require(step.artifact, f"{stage}.onnx")
    with step.write(f"{stage}-engine.onnx") as graph_file:
        write_engine_graph(source, graph_file, capacity=capacity)
    graph_file = step.artifact / f"{stage}-engine.onnx"
    folder = f"engines/{gpu.name}-{precision}"
    check_room(step.artifact / folder, weights_bytes(ir.load(graph_file).graph), config.num_hidden_layers, packed=stage != "traced")
    plan_name = f"{folder}/part-00.plan"
    with step.write(plan_name) as plan:
        result = chosen.build(BuildRequest(graph_file, plan, gpu, tuple(profiles)), step.progress)
        step.progress("auditing the plan", 0, 1)
        audit = audit_plan(plan, graph_file, precision=precision, profiles=[p.name for p in profiles], layers=config.num_hidden_layers)
        size = plan.stat().st_size
    logger.info("%s: %d bytes in %.1f s", plan_name, size, result.seconds)
    entry = {
        "file": plan_name,
        "precision": precision,
        "target": gpu.name,
        "backend": chosen.name,
        "bytes": size,
        "build_s": result.seconds,
        "peak_rss_mb": result.peak_rss_mb,
        "peak_anonymous_mb": result.peak_anonymous_mb,
        "profiles": {profile.name: dict(profile.axes) for profile in profiles},
        **audit,
        "graph": graph_file.name,
        "graph_sha256": step.outputs[graph_file.name]["sha256"],
        "plan_sha256": step.outputs[plan_name]["sha256"],
        "tensorrt_version": result.version,
        "compute_capability": ".".join(map(str, gpu.compute_capability)),
        "max_batch": max_batch,
        "max_length": length,
        **_cache(model, config, rows, capacity, result),
        "notes": [f"the profiles admit {rows} rows: with 1, TensorRT-RTX would write every {precision} weight out at each step"] * (rows > max_batch),
    }
    report = {"engines": [entry], "passed": audit["audit"]["passed"]}
    _write_json(step, f"{folder}/build.json", report)
    return report


def check_cache_options(kv_cache: KvCache, config: LlamaConfig, max_length: int | None, capacity: int | None) -> None:
    """Refuse a bound that is the other cache form's, and a static cache without its own.

    Raises:
        EngineError: the hint names the option that this form has.
    """
    if kv_cache == "dynamic" and capacity is not None:
        raise EngineError(
            "--capacity is for a static cache; the cache of this artifact is dynamic, and grows",
            hint=f"--max-length {capacity}, or export with --kv-cache static",
        )
    if kv_cache == "static" and max_length is not None:
        raise EngineError(
            "--max-length is for a dynamic cache; prompt and answer fill a static one up to its capacity", hint=f"--capacity {max_length}"
        )
    if kv_cache == "static" and capacity is None:
        raise EngineError(
            "a static cache needs --capacity: how many tokens prompt and answer may have together", hint=f"--capacity {default_length(config)}"
        )


def _cache(model: dict[str, Any], config: LlamaConfig, rows: int, capacity: int | None, result: BuildResult) -> dict[str, Any]:
    """What build.json says of the cache: its form, and of a static one its size and what was counted in the network."""
    if capacity is None:
        return {"kv_cache": kv_cache_of(model)}
    row = cache_bytes(config, model["dtype"], capacity)
    return {"kv_cache": "static", "capacity": capacity, "kv_cache_bytes_per_row": row, "kv_cache_bytes": rows * row, **result.network}


def choose_backend(name: str) -> Backend:
    """A backend that can build here.

    Raises:
        EngineError: no backend of that name, or none that can build on this machine; the hint is the command that installs it.
    """
    if name != "auto" and name not in BACKENDS:
        raise EngineError(f"no backend {name!r}; there is: auto, {', '.join(BACKENDS)}")
    candidates = list(BACKENDS.values()) if name == "auto" else [BACKENDS[name]]
    reasons = {backend.name: backend.unavailable() for backend in candidates}
    usable = next((backend for backend in candidates if reasons[backend.name] is None), None)
    if usable is None:
        words = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
        raise EngineError(f"this machine can't build engines: {words}", hint=candidates[0].install_hint())
    return usable


def _stage(precision: str) -> str:
    if precision not in STAGES:
        raise EngineError(f"no precision {precision!r}; there is: {', '.join(STAGES)}")
    return STAGES[precision]


def _write_json(step: StepContext, relative: str, content: dict[str, Any]) -> None:
    with step.write(relative) as path:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
