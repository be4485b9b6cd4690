"""The process that builds one plan with TensorRT-RTX; started by ``tensorrt_rtx``, speaks as ``worker`` says.

Strongly typed, TF32 off, no timing cache (it makes TensorRT-RTX ask for a GPU), the plan streamed to disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

from engines.backends.allocator import allocator
from engines.backends.bridge import Logger, Monitor, answer, write_plan
from engines.backends.flavour import trt
from engines.backends.network import parse, prepare, to_profiles


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build and stream one plan.

    Returns:
        ``version``; ``allocator``; ``network_layers``, as parsed; ``static_cache``, as ``static_network.prepare_static`` counts it.

    Raises:
        EngineError: the graph doesn't parse or can't be prepared, the configuration is refused, the disk is full, or TensorRT fails.
    """
    logger = Logger()
    graph, plan = Path(request["graph"]), Path(request["plan"])
    builder = trt.Builder(logger)
    network, parser = parse(graph, builder, logger)
    layers, found = network.num_layers, prepare(network, graph)
    monitor = Monitor()
    create = CreateConfigRTX(
        compute_capabilities=[tuple(request["compute_capability"])],
        profiles=to_profiles(request["profiles"]),
        profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,  # the audit reads them
        progress_monitor=monitor,
    )
    config = create(builder, network)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and CreateConfigRTX leaves it on
    write_plan(builder, network, config, plan, logger, graph)
    del parser, monitor
    return {"version": trt.__version__, "allocator": allocator(), "network_layers": layers, "static_cache": found}


if __name__ == "__main__":
    answer(build)
