"""The process that builds one plan with TensorRT-RTX; started by ``tensorrt_rtx``, speaks as ``worker`` says.

The network comes from TensorRT's own ONNX parser, because its errors name node and operator; configuration and profiles go through Polygraphy.
Strongly typed, TF32 off, no timing cache (it makes TensorRT-RTX ask for a GPU), the plan streamed to disk.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tensorrt_rtx as trt
from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
from polygraphy.backend.trt import Profile
from polygraphy.exception import PolygraphyException

from artifact.errors import EngineError
from engines.backends.static_network import prepare_static
from engines.lengths import lengths_by_attention

Severity = trt.ILogger.Severity
LEVELS = {Severity.INTERNAL_ERROR: logging.ERROR, Severity.ERROR: logging.ERROR, Severity.WARNING: logging.INFO, Severity.INFO: logging.DEBUG}
"""TensorRT's warnings are nothing a user can act on ("Make sure input input_ids has Int64 binding"), so they are information here."""
WITHOUT_DRIVER = "catchCudaError"
"""TensorRT-RTX asks for a driver when it reports an error; on a machine without one this says nothing about the build."""


def send(**message: object) -> None:
    """One line to the process that started this one."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class Logger(trt.ILogger):  # type: ignore[misc]
    """TensorRT's logger, bridged; keeps the errors for the message of the failure."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if severity == Severity.VERBOSE:
            return
        is_error = LEVELS[severity] == logging.ERROR and WITHOUT_DRIVER not in message
        if is_error:
            self.errors.append(message)
        send(log=[LEVELS[severity] if is_error else min(LEVELS[severity], logging.INFO), message])


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """TensorRT's progress, bridged: the outermost phase and its steps."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT."""
        self._steps[phase_name] = num_steps
        send(progress=[phase_name, 0, num_steps])

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT; true lets it go on."""
        send(progress=[phase_name, step + 1, self._steps[phase_name]])
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT."""
        steps = self._steps.pop(phase_name)
        send(progress=[phase_name, steps, steps])


class PlanFile(trt.IStreamWriter):  # type: ignore[misc]
    """Takes the plan piece by piece, so that it is never whole in memory."""

    def __init__(self, path: Path) -> None:
        trt.IStreamWriter.__init__(self)
        self._file = path.open("wb")
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Called by TensorRT; a short count makes it stop."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            return 0

    def close(self) -> None:
        """Flush."""
        self._file.close()


def parse(graph: Path, builder: Any, logger: Logger) -> tuple[Any, Any]:
    """A network and its parser, which owns the weights and must outlive it.

    Raises:
        EngineError: with the node and the operator that TensorRT names.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = errors[0]
        where = f"node {first.node_name()!r} ({first.node_operator()})" if first.node() >= 0 else "the graph"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise EngineError(f"{graph.name}: TensorRT can't parse {where}: {first.desc()}{more}")
    return network, parser


def prepare(network: Any, graph: Path) -> dict[str, int]:
    """Put back what the parser drops of a graph, and count it; nothing is to be done for a dynamic cache.

    Raises:
        EngineError: attention that would ignore its lengths, or a cache that would not be updated in place.
    """
    nodes = ir.load(graph).graph
    return prepare_static(network, lengths_by_attention(nodes), sum(node.op_type == "TensorScatter" for node in nodes))


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build and stream one plan.

    Returns:
        ``version``; ``network_layers``, as parsed; ``static_cache``, as ``static_network.prepare_static`` counts it.

    Raises:
        EngineError: the graph doesn't parse or can't be prepared, the configuration is refused, the disk is full, or TensorRT fails.
    """
    logger = Logger()
    graph, plan = Path(request["graph"]), Path(request["plan"])
    builder = trt.Builder(logger)
    network, parser = parse(graph, builder, logger)
    layers, found = network.num_layers, prepare(network, graph)
    profiles = []
    for shapes in request["profiles"]:
        profile = Profile()
        for name, (minimum, optimum, maximum) in shapes.items():
            profile.add(name, min=tuple(minimum), opt=tuple(optimum), max=tuple(maximum))
        profiles.append(profile)
    monitor = Monitor()
    create = CreateConfigRTX(
        compute_capabilities=[tuple(request["compute_capability"])],
        profiles=profiles,
        profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,  # the audit reads them
        progress_monitor=monitor,
    )
    config = create(builder, network)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and CreateConfigRTX leaves it on
    writer = PlanFile(plan)
    try:
        built = builder.build_serialized_network_to_stream(network, config, writer)
    finally:
        writer.close()
    if writer.error is not None:
        raise EngineError(f"the plan can't be written: {writer.error}", hint="free disk space and build again") from writer.error
    if not built:
        raise EngineError(f"{graph.name}: TensorRT can't build it: {logger.errors[-1] if logger.errors else 'no reason given'}")
    del parser, monitor
    return {"version": trt.__version__, "network_layers": layers, "static_cache": found}


def main() -> None:
    """Read the request, build, answer."""
    try:
        result = build(json.loads(sys.stdin.read()))
    except EngineError as error:
        send(error=str(error), hint=error.hint)
    except PolygraphyException as error:
        send(error=f"the build configuration was refused: {error}", hint=None)
    else:
        send(result=result)


if __name__ == "__main__":
    main()
