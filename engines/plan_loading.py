"""A plan's bytes become an engine: a lean runtime is allowed, stripped weights come back, a streaming budget is set, as the build recorded.

Source: docs.nvidia.com/deeplearning/tensorrt: Runtime.engine_host_code_allowed, OnnxParserRefitter, ICudaEngine.weight_streaming_budget_v2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from artifact.errors import EngineError
from artifact.hashing import sha256_of


def load_engine(trt: ModuleType, logger: Any, artifact: Path, entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """The runtime, which owns the engine, and the engine with all its weights.

    Args:
        trt: TensorRT's module.
        logger: with ``last()``, its last error.
        artifact: the folder.
        entry: the plan's entry in ``build.json``, whose file was found to be the one that was built.

    Raises:
        EngineError: the runtime refuses the plan, or its weights can't be put back.
    """
    flags, name = entry.get("flags", {}), entry["file"]
    runtime = trt.Runtime(logger)
    if flags.get("version_compatible"):
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine((artifact / name).read_bytes())
    if engine is None:
        raise EngineError(f"{name}: the runtime can't load it: {logger.last()}")
    if flags.get("strip_weights"):
        _restore(trt, logger, engine, artifact, entry)
    if flags.get("weight_streaming"):
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return runtime, engine


def _restore(trt: ModuleType, logger: Any, engine: Any, artifact: Path, entry: Mapping[str, Any]) -> None:
    """Put the weights of the graph back into a plan that was built without them; it must be the very graph."""
    graph, name = artifact / entry["graph"], entry["file"]
    if not graph.is_file():
        raise EngineError(f"{name} was built without its weights, and {graph.name}, which holds them, is not there", hint="build the engine again")
    if (digest := sha256_of(graph)) != entry["graph_sha256"]:
        raise EngineError(
            f"{name} was built without its weights, and {graph.name} is not the graph that it was built from "
            f"(SHA-256 {digest[:12]}…, expected {entry['graph_sha256'][:12]}…)",
            hint="build the engine again",
        )
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise EngineError(f"{name}: the weights of {graph.name} can't be put back: {logger.last()}", hint="build it without --strip-weights")
