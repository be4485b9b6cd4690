"""The process that builds one plan with enterprise TensorRT on the GPU that is there; started by ``tensorrt``, speaks as ``worker`` says.

Strongly typed, TF32 off, layers recorded in detail, hardware compatibility off, the plan streamed to disk; then the plan is loaded once and asked
what it is, because nothing of it can be read from its bytes.
Source: docs.nvidia.com/deeplearning/tensorrt (Python API: IBuilderConfig, BuilderFlag, ITimingCache, EngineInspector)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.backend.trt import CreateConfig

from engines.backends.bridge import Logger, Monitor, answer, write_plan
from engines.backends.engine_facts import read_engine
from engines.backends.flavour import trt
from engines.backends.network import parse, prepare, to_profiles
from engines.backends.timing_cache import TimingCache


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build, stream and inspect one plan.

    Args:
        request: graph, plan, profiles, flags (as ``BuildFlags.as_record``), timing_cache (file or None).

    Returns:
        ``version``; ``network_layers``, as parsed; ``static_cache``, as ``static_network.prepare_static`` counts it; ``timing_cache``: what became of
        it; ``engine``: of ``engine_facts.read_engine``.

    Raises:
        EngineError: the graph doesn't parse or can't be prepared, the configuration or the timing cache is refused, the disk is full, TensorRT fails,
            or can't load what it built.
    """
    logger, flags = Logger(), request["flags"]
    graph, plan = Path(request["graph"]), Path(request["plan"])
    builder = trt.Builder(logger)
    network, parser = parse(graph, builder, logger)
    layers, found = network.num_layers, prepare(network, graph)
    file = Path(request["timing_cache"]) if request["timing_cache"] else None
    monitor, cache = Monitor(), TimingCache(file, named=flags["timing_cache"] is not None)
    config = configure(builder, network, request["profiles"], flags, monitor)
    state = cache.attach(config)
    write_plan(builder, network, config, plan, logger, graph)
    state = cache.save(config) or state
    del config, network, parser, builder, monitor  # give the weights back before the plan is loaded
    engine = read_engine(plan, logger, version_compatible=flags["version_compatible"])
    return {"version": trt.__version__, "network_layers": layers, "static_cache": found, "timing_cache": state, "engine": engine}


def configure(builder: Any, network: Any, profiles: list[Any], flags: dict[str, Any], monitor: Any) -> Any:
    """The builder's configuration: each option by its documented name, and what is never left to a default."""
    create = CreateConfig(
        tf32=False,
        profiles=to_profiles(profiles),
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        hardware_compatibility_level=trt.HardwareCompatibilityLevel.NONE,
        progress_monitor=monitor,
        version_compatible=flags["version_compatible"],
        weight_streaming=flags["weight_streaming"],
        strip_plan=flags["strip_weights"],
        builder_optimization_level=flags["optimization_level"],
        memory_pool_limits={trt.MemoryPoolType.WORKSPACE: flags["workspace_bytes"]} if flags["workspace_bytes"] else None,
    )
    config = create(builder, network)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default
    if flags["strip_weights"]:
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # the weights that come back are the ones that went: nothing is given up for others
    return config


if __name__ == "__main__":
    answer(build)
