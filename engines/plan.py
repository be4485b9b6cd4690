"""Plans that were loaded: a model in one, or cut into parts that run one after another."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from artifact.errors import EngineError
from artifact.io_spec import HIDDEN_PREFIX
from engines.device import Device
from engines.plan_loading import load_engine
from engines.runnable import runtime_module, why_not_here

logger = logging.getLogger(__name__)
PROFILES = ("prefill", "decode")
"""How the names of hidden states between parts begin; the number of the layer that they enter follows."""


class Plan:
    """A plan in the GPU's memory, with one execution context a profile: a whole model, or one part of it.

    Attributes:
        enters, leaves: the hidden state that a part reads and gives, by name; None at the ends of the model.

    Args:
        artifact: the folder.
        entry: the plan's entry in ``build.json``.
        device: this machine's GPU.

    Raises:
        EngineError: it can't run here (``why_not_here``), or the runtime refuses it.
    """

    def __init__(self, artifact: Path, entry: Mapping[str, Any], device: Device) -> None:
        if reason := why_not_here(artifact, entry, device):
            raise EngineError(
                f"{entry['file']} can't run here: {reason}", hint=f"python cli.py build {artifact} --target GPU builds one for another GPU"
            )
        self.name, self.precision = str(entry["file"]), str(entry["precision"])
        self.axes: Mapping[str, Mapping[str, list[int]]] = entry["profiles"]
        self.capacity: int = entry.get("capacity") or 0
        self._trt = trt = runtime_module(entry["backend"])
        self._errors = _errors(trt)
        self._runtime, self._engine = load_engine(trt, self._errors, artifact, entry)
        self._contexts: dict[str, Any] = {}
        inputs, outputs = entry.get("inputs", ()), entry.get("outputs", ())
        self._interface = frozenset((*inputs, *outputs))
        self.enters, self.leaves = (next((name for name in names if name.startswith(HIDDEN_PREFIX)), None) for names in (inputs, outputs))

    @property
    def parts(self) -> tuple[Plan, ...]:
        """Itself: it is a whole model, or one part of it."""
        return (self,)

    def has(self, name: str) -> bool:
        """Whether an input or output is this plan's; of a whole model all are."""
        return name in self._interface if self._interface else True

    def context(self, profile: str, stream: int) -> Any:
        """The execution context of a profile, made when it is first needed.

        Raises:
            EngineError: the GPU's memory does not hold it, or its kernels can't be compiled.
        """
        if profile not in self._contexts:
            context = self._engine.create_execution_context(self._options())
            if context is None or not context.set_optimization_profile_async(PROFILES.index(profile), stream):
                raise EngineError(f"{self.name}: no execution context for {profile}: {self._errors.last()}")
            self._contexts[profile] = context
        return self._contexts[profile]

    def _options(self) -> Any:
        """Kernels for any shape, not ones that are compiled anew in the background for each length of a growing cache: what ran is what is there."""
        config = self._engine.create_runtime_config()
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):  # TensorRT-RTX
            config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.NONE
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
        return config

    def failed(self, what: str) -> EngineError:
        """The error of a call, with the runtime's reason."""
        return EngineError(f"{self.name}: {what}: {self._errors.last()}")


class PlanChain:
    """A model that was cut into parts, each a plan: run one after another, with the hidden states handed on where they are, on the GPU.

    Args:
        artifact: the folder.
        entries: the parts' entries in ``build.json``, in their order.
        device: this machine's GPU.

    Raises:
        EngineError: as ``Plan``; or the parts do not follow one another.
    """

    def __init__(self, artifact: Path, entries: Sequence[Mapping[str, Any]], device: Device) -> None:
        _check_order(entries)
        self.parts = tuple(Plan(artifact, entry, device) for entry in entries)
        first = self.parts[0]
        self.name, self.precision, self.axes, self.capacity = first.name, first.precision, first.axes, first.capacity


def open_engine(artifact: Path, entries: Sequence[Mapping[str, Any]], device: Device) -> Plan | PlanChain:
    """An engine, in one plan or in parts; errors as of either."""
    return Plan(artifact, entries[0], device) if len(entries) == 1 else PlanChain(artifact, entries, device)


def _check_order(entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse parts of which one does not take up where the one before ends."""
    names = [[name for name in entry[side] if name.startswith(HIDDEN_PREFIX)] for entry in entries for side in ("inputs", "outputs")]
    joints = list(zip(names[1::2], [*names[2::2], []], strict=True))
    if names[0] or any(left != right or len(left) > 1 for left, right in joints):
        broken = next((i for i, (left, right) in enumerate(joints) if left != right), 0)
        raise EngineError(
            f"{entries[broken]['file']} gives {', '.join(joints[broken][0]) or 'no hidden state'}, what follows reads "
            f"{', '.join(joints[broken][1]) or 'none'}: the parts are not of one engine",
            hint="build the engine again",
        )


def _errors(trt: ModuleType) -> Any:
    """TensorRT's logger, bridged; it remembers the last error."""

    class Errors(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.messages.append(message)
            logger.debug("%s", message)

        def last(self) -> str:
            return self.messages[-1] if self.messages else "no reason given"

    return Errors()
