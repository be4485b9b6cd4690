"""What a compiler says and writes, bridged: its log and progress as lines for the process that started this one, the plan as a stream to disk."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polygraphy.exception import PolygraphyException

from artifact.errors import EngineError
from engines.backends.allocator import give_back
from engines.backends.flavour import trt

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

    def last(self) -> str:
        """The last error, in TensorRT's words."""
        return self.errors[-1] if self.errors else "no reason given"

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT, from any of its threads."""
        if severity == Severity.VERBOSE:
            return
        is_error = LEVELS[severity] == logging.ERROR and WITHOUT_DRIVER not in message
        if is_error:
            self.errors.append(message)
        send(log=[LEVELS[severity] if is_error else min(LEVELS[severity], logging.INFO), message])


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """TensorRT's progress, bridged: each phase and its steps. What a phase has freed goes back before the next one allocates."""

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
        give_back()
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
        """Flush; what the disk has no room for any more is an error as in ``write``."""
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or error


def write_plan(builder: Any, network: Any, config: Any, plan: Path, logger: Logger, graph: Path) -> None:
    """Build a network into a file.

    Raises:
        EngineError: the disk is full, or TensorRT fails; in its own words.
    """
    writer = PlanFile(plan)
    try:
        built = builder.build_serialized_network_to_stream(network, config, writer)
    finally:
        writer.close()
    if writer.error is not None:
        raise EngineError(f"the plan can't be written: {writer.error}", hint="free disk space and build again") from writer.error
    if not built:
        raise EngineError(f"{graph.name}: TensorRT can't build it: {logger.last()}")


def answer(build: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read the request, build, answer: the whole of a worker."""
    try:
        result = build(json.loads(sys.stdin.read()))
    except EngineError as error:
        send(error=str(error), hint=error.hint)
    except PolygraphyException as error:
        send(error=f"the build configuration was refused: {error}", hint=None)
    else:
        send(result=result)
