"""What TensorRT says of a plan that it has just built, loaded once on the GPU that is there: profiles, shapes, aliases, memory and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifact.errors import EngineError
from engines.backends.bridge import Logger
from engines.backends.flavour import trt

Facts = dict[str, Any]


def read_engine(plan: Path, logger: Logger, *, version_compatible: bool) -> Facts:
    """Load a plan and ask it.

    Returns:
        ``profiles``: [{input: [minimum, optimum, maximum]}], in the plan's order; ``outputs``: their names; ``aliases`` {output: the input whose
        buffer it shares}; ``device_memory_bytes`` of one execution context; ``streamable_weights_bytes``; ``refittable``; ``layers``.

    Raises:
        EngineError: TensorRT can't load what it built.
    """
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = version_compatible  # such a plan brings a lean runtime with it
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EngineError(f"TensorRT can't load the plan that it built: {logger.last()}")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    shapes = [
        {name: [list(shape) for shape in engine.get_tensor_profile_shape(name, index)] for name in inputs}
        for index in range(engine.num_optimization_profiles)
    ]
    return {
        "profiles": shapes,
        "outputs": outputs,
        "aliases": {name: alias for name in outputs if (alias := engine.get_aliased_input_tensor(name))},
        "device_memory_bytes": engine.device_memory_size_v2,
        "streamable_weights_bytes": engine.streamable_weights_size,
        "refittable": engine.refittable,
        "layers": _layers(engine),
    }


def _layers(engine: Any) -> Any:
    """The inspector's account of every layer, as JSON; what is no JSON stays text."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        return json.loads(text)
    except ValueError:
        return text
