"""Build one engine of an artifact: engine graph → parts → preflight → plans → audit → build.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.engine_names import engine_folder, engine_graph, part_graph_name, plan_file
from artifact.errors import EngineError
from artifact.manifest import Manifest, kv_cache_of, read_manifest
from artifact.steps import StepContext, require
from engines.audit import APART
from engines.backends.flags import DECODE_GEMV, BuildFlags
from engines.backends.protocol import AuditRequest, Backend, BuildRequest
from engines.backends.tensorrt import TensorRT
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.build_cost import Graph, build_cost
from engines.checks import all_passed
from engines.decode_form import suits
from engines.device_fit import gpus_needed, load_of
from engines.engine_entry import EngineModel, engine_entry, parts_of, same_split
from engines.engine_graph import write_engine_graph
from engines.engine_options import EngineOptions
from engines.graph_weights import turned_bytes, weights_bytes
from engines.part_plan import Limits, PartPlan, plan_parts, plan_usual
from engines.preflight import check_build, check_disk
from engines.profiles import Profile, make_profiles
from engines.targets import Target, find_target
from engines.weight_sizes import weight_sizes

logger = logging.getLogger(__name__)

STAGES = {"fp16": "fused", "int8": "int8", "int8-smoothquant": "int8-smoothquant", "int4": "int4", "fp32": "traced"}
"""Precision → the stage its engine is built from; fp32 is for exact parity, so nothing is fused before TensorRT sees it."""
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TensorRTRTX(), TensorRT())}
WriteParts = Callable[[Path, EngineModel, Sequence[Path]], None]
"""``write(engine graph, engine, files)``: cut the graph at the engine's layers, prove the parts, write one file each."""
BUILT = "engine"
"""In the journal of an interrupted build, beside a plan that is finished: its entry."""


def build_engine(step: StepContext, options: EngineOptions, write_parts: WriteParts) -> dict[str, Any]:
    """Write ``<stage>-engine.onnx``, ``engines/<target>-<precision>/part-00.plan`` … and ``build.json``.

    Args:
        step: the artifact; its manifest describes the model. Plans that an interrupted build of the same engine has finished are kept.
        options: of the engine.
        write_parts: cuts the engine graph, where it takes several plans.

    Returns:
        ``engines``: one entry a plan, as in ``build.json``; ``parts``, ``parts_reason``; ``passed``: whether every audit passed; None where one is no
            verdict, and none failed.

    Raises:
        EngineError: no such target, precision or backend; an option that the backend lacks; a bound of the other cache form; no room; or the
            compiler failed.
        ArtifactError: the stage is not there.
    """
    stage, backend, gpu = _stage(options.precision), choose_backend(options.backend, options.flags), find_target(options.target)
    folder = engine_folder(gpu.name, options.precision, options.capacity)
    model = _model(step, stage, options, gpu)
    if options.flags.decode_gemv and model.lowered:
        words = f"{DECODE_GEMV} was not tried with attention in operators of TensorRT {model.lowering['min_tensorrt']}"
        raise EngineError(words, hint=f"python cli.py fuse {step.artifact} --force, without --min-tensorrt")
    model = _settled(step, ir.load(require(step.artifact, f"{stage}.onnx")).graph, model, backend, folder)
    whole = _engine_graph(step, stage, model)
    graphs = _part_graphs(step, whole, model, write_parts)
    _check_disk(step, model, graphs, folder)
    engines = [_build_part(step, model, backend, part, graph, plan_file(folder, part)) for part, graph in enumerate(graphs)]
    passed = all_passed(engine["audit"]["passed"] for engine in engines)
    return _record(step, f"{folder}/build.json", {"engines": engines, **parts_of(engines, model.cut.reason), "passed": passed})


def _model(step: StepContext, stage: str, options: EngineOptions, gpu: Target) -> EngineModel:
    """What is built, as one part; bounds that the model can't serve are refused before anything is written."""
    manifest = read_manifest(step.artifact)
    described = manifest["model"]
    config, form, dtype = LlamaConfig(**described["config"]), kv_cache_of(described), described["dtype"]
    load = load_of(config, options.precision, form, max_batch=options.max_batch, max_length=options.max_length, capacity=options.capacity)
    model = EngineModel(config, dtype, load, gpu, options, _lowering(manifest, stage), PartPlan(((0, config.num_hidden_layers - 1),), ""))
    _profiles(model, 0)
    return model


def _settled(step: StepContext, stage: ir.Graph, model: EngineModel, backend: Backend, folder: str) -> EngineModel:
    """The engine with decode in the form that was asked for or suits it, and its parts, cut as an interrupted build has begun where that fits.

    Raises:
        EngineError: a form was asked for that several plans can't have.
    """
    options, config, asked = model.options, model.config, model.options.flags.decode_gemv
    packed = not _is_unpacked(stage)
    gpus = gpus_needed(config, model.load, model.target)
    limits = Limits.of(options.parts, options.max_memory, gpus=gpus, target=model.target.name)
    journal = step.journal.files if step.journal is not None else {}
    form: dict[str, Any] = {
        "packed": packed,
        "static": model.kv_cache == "static",
        "begun": same_split([entry[BUILT] for file, entry in journal.items() if file.startswith(folder) and BUILT in entry]),
        "scale": weights_bytes(stage) / weight_sizes(config, options.precision).total,
    }
    if asked is None:
        gemv = not backend.lacks(BuildFlags(decode_gemv=True)) and suits(config, model.load, model.target, packed=packed, lowered=model.lowered)
        cut, gemv = plan_usual(config, options.precision, limits, gemv=gemv, **form)
    else:
        cut, gemv = plan_parts(config, options.precision, limits, gemv=asked, **form), asked
    if gemv and len(cut.layers) > 1:
        raise EngineError(f"{DECODE_GEMV} is for an engine in one plan, and this one takes {cut.reason}", hint=f"leave out {DECODE_GEMV}")
    return replace(model, options=replace(options, flags=replace(options.flags, decode_gemv=gemv)), cut=cut)


def _is_unpacked(graph: ir.Graph) -> bool:
    """Whether query, key and value are linears of their own."""
    return any(APART in str(name) for name in graph.initializers)


def _part_graphs(step: StepContext, whole: Path, model: EngineModel, write_parts: WriteParts) -> list[str]:
    """The graph of each plan: the engine graph itself, or its parts, written beside it."""
    if len(model.cut.layers) == 1:
        return [whole.name]
    names = [part_graph_name(whole.name, layers) for layers in model.cut.layers]
    with ExitStack() as stack:
        files = [stack.enter_context(step.write(name)) for name in names]
        step.progress("cutting the engine graph", 0, len(names))
        write_parts(whole, model, files)
    return names


def _check_disk(step: StepContext, model: EngineModel, graphs: Sequence[str], folder: str) -> None:
    """Refuse, before the first plan, what the disk has no room for; plans that an interrupted build has finished are there already."""
    journal = step.journal.files if step.journal is not None else {}
    missing = [part for part in range(len(graphs)) if plan_file(folder, part) not in journal]
    check_disk(sum(build_cost(_graph(step.artifact / graphs[part], model, part)).plan_bytes for part in missing), step.artifact / folder)


def _build_part(step: StepContext, model: EngineModel, backend: Backend, part: int, graph: str, plan_name: str) -> dict[str, Any]:
    """One plan and its audit; taken from an interrupted build where it was made from the same graph."""
    digest = step.outputs[graph]["sha256"]
    finished = step.finished(plan_name)
    if finished is not None and finished.get(BUILT, {}).get("graph_sha256") == digest:
        logger.info("%s: from the interrupted build", plan_name)
        step.finished(_layers_file(plan_name))
        return _entry(step, plan_name, finished[BUILT])
    profiles, graph_file, precision = _profiles(model, part), step.artifact / graph, model.options.precision
    count = len(model.cut.layers)
    needs = build_cost(_graph(graph_file, model, part))
    what = "the build" if count == 1 else f"part {part} of {count}"
    check_build(needs, (step.artifact / plan_name).parent, what=what, max_memory=model.options.max_memory)
    with step.write_hashed(plan_name) as (plan, known):
        result = backend.build(BuildRequest(graph_file, plan, model.target, tuple(profiles), model.options.flags), step.progress)
        step.progress("auditing the plan", part, count)
        audit = backend.audit(AuditRequest(plan, graph_file, precision, profiles, model.config, model.lowered), result)
        built = engine_entry(model, part, backend.name, profiles, result) | audit | {"graph": graph, "graph_sha256": digest}
        if "layers" in result.inspection:  # the compiler's own account, which the audit read; whole before the plan counts as finished
            _record(step, _layers_file(plan_name), {"layers": result.inspection["layers"]})
        known[BUILT] = built | {"bytes": plan.stat().st_size, "split": [list(layers) for layers in model.cut.layers]}
        logger.info("%s: %d bytes in %.1f s", plan_name, known[BUILT]["bytes"], result.seconds)
    return _entry(step, plan_name, known[BUILT])


def _layers_file(plan: str) -> str:
    """Where the account of a plan's layers lies, for a compiler that gives one."""
    return plan.replace(".plan", ".layers.json")


def _entry(step: StepContext, plan_name: str, built: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of build.json."""
    kept = {key: value for key, value in built.items() if key != "split"}
    return {"file": plan_name, **kept, "plan_sha256": step.outputs[plan_name]["sha256"]}


def _profiles(model: EngineModel, part: int) -> list[Profile]:
    bounds = {"max_batch": model.load.batch, "max_length": model.load.length}
    return make_profiles(model.config, model.dtype, model.kv_cache, **bounds, layers=model.cut.layers[part], gemv=model.gemv)


def _graph(file: Path, model: EngineModel, part: int) -> Graph:
    """What a graph's build depends on."""
    graph, (first, last), precision = ir.load(file).graph, model.cut.layers[part], model.options.precision
    static = model.kv_cache == "static"
    packed = not _is_unpacked(graph)
    return Graph(weights_bytes(graph), last - first + 1, precision, turned_bytes(graph), packed, static, model.gemv)


def _engine_graph(step: StepContext, stage: str, model: EngineModel) -> Path:
    """Write the graph that is built, or cut; where decode has a second form in it, beside the one without, which any compiler takes."""
    source, capacity = require(step.artifact, f"{stage}.onnx"), model.options.capacity
    for gemv in dict.fromkeys((False, model.gemv)):
        name = engine_graph(stage, capacity, gemv=gemv)
        with step.write(name) as graph_file:
            write_engine_graph(source, graph_file, capacity=capacity, decode_gemv=gemv)
    return step.artifact / name


def _lowering(manifest: Manifest, stage: str) -> dict[str, Any]:
    """The TensorRT release whose operators a stage keeps to, or None, and what was written in others for it: as fuse recorded."""
    report = manifest["steps"].get("fuse", {}).get("report", {}) if stage != "traced" else {}
    return {"min_tensorrt": report.get("min_tensorrt"), "lowered": report.get("lowered", {})}


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
