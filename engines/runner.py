"""Run a plan on the GPU it was built for: whether it may run is said before it is loaded, its caches stay on the GPU.

Letters: B batch, P past, C capacity, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import Dtype
from engines import device_memory
from engines.device import Device
from engines.device_cache import Feeds, FixedCache, GrowingCache
from engines.plan_loading import load_engine
from engines.runnable import runtime_module, why_not_here

logger = logging.getLogger(__name__)
Array = NDArray[Any]
PROFILES = ("prefill", "decode")
BUILD_LARGER = "python cli.py build ART --max-batch ROWS --max-length POSITIONS"


class Plan:
    """A plan in the GPU's memory, with one execution context a profile.

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
        self.name = str(entry["file"])
        self.axes: Mapping[str, Mapping[str, list[int]]] = entry["profiles"]
        self.capacity: int = entry.get("capacity") or 0
        self._trt = trt = runtime_module(entry["backend"])
        self._errors = _errors(trt)
        self._runtime, self._engine = load_engine(trt, self._errors, artifact, entry)
        self._contexts: dict[str, Any] = {}

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


class PlanSession:
    """One batch of sequences on a plan, call after call; the caches stay on the GPU until the session is closed, or its ``with`` block left.

    Args:
        plan: what to run.
        config, dtype: the model it is.
        batch: rows, B.
        length: positions that a dynamic cache has room for, at most the plan's; a static one has the plan's capacity.

    Raises:
        EngineError: the plan's profiles admit fewer rows or positions.
    """

    def __init__(self, plan: Plan, config: LlamaConfig, dtype: Dtype, *, batch: int, length: int) -> None:
        rows, positions = plan.axes["prefill"][io_spec.BATCH][2], plan.capacity or plan.axes["prefill"][io_spec.TOTAL][2]
        if batch > rows or length > positions:
            raise EngineError(f"{plan.name} admits {rows} rows of {positions} positions, asked for {batch} of {length}", hint=BUILD_LARGER)
        self._plan, self._dtype, self._batch = plan, io_spec.NUMPY_DTYPES[dtype], batch
        self._room = plan.capacity or length
        self._stream = device_memory.open_stream()
        shape = (batch, config.num_key_value_heads, self._room, config.head_dim)
        self._cache = (FixedCache if plan.capacity else GrowingCache)(shape, self._dtype, config.num_hidden_layers)
        self._inputs: dict[str, Any] = {}
        self._logits = device_memory.allocate((batch, 1, config.vocab_size), self._dtype)[0]
        self._names = io_spec.cache_names(config)
        self.restart()

    def restart(self) -> None:
        """Forget what the caches hold."""
        self._cache.restart(self._stream)

    def call(self, feeds: Feeds) -> Array:
        """Run new tokens.

        Args:
            feeds: every input but the caches, int64, as io_spec says.

        Returns:
            Logits of one position a row, [B, 1, V], the plan's dtype.

        Raises:
            EngineError: the caches have no room for them, their rows are not the session's, the shapes are outside the profile, or the run failed.
        """
        rows, new = feeds[io_spec.INPUT_IDS].shape
        if rows != self._batch or self._cache.end(feeds) > self._room:
            asked = f"{rows} rows up to position {self._cache.end(feeds)}"
            raise EngineError(f"{self._plan.name}: the caches hold {self._batch} rows of {self._room} positions, the call has {asked}")
        profile = "decode" if new == 1 else "prefill"
        context = self._plan.context(profile, self._stream.ptr)
        self._bind(context, profile, feeds)
        if not context.execute_async_v3(self._stream.ptr):
            raise self._plan.failed(f"{profile} of {new} tokens did not run")
        self._cache.advance(new)
        return self._fetch([self._logits], self._logits.shape)[0]

    def caches(self) -> list[Array]:
        """Keys and values of each layer in turn, [B, K, P, D], or [B, K, C, D] of a static cache."""
        return self._fetch(self._cache.buffers(), self._cache.shape())

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._cache.free()
        device_memory.free(*self._inputs.values(), self._logits, self._stream)
        self._inputs = {}

    def __enter__(self) -> PlanSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self, context: Any, profile: str, feeds: Feeds) -> None:
        """Give a context its inputs, with their shapes, and where its outputs go."""

        def bind(name: str, address: int, shape: tuple[int, ...] | None) -> None:
            if shape is not None and not context.set_input_shape(name, shape):
                raise self._plan.failed(f"{name} {list(shape)} is outside the {profile} profile")
            if not context.set_tensor_address(name, address):
                raise self._plan.failed(f"{name} can't be bound")

        for name, values in feeds.items():
            bind(name, self._copy(name, values), values.shape)
        self._cache.bind(bind, self._names)
        bind(io_spec.LOGITS, self._logits.ptr, None)

    def _copy(self, name: str, values: NDArray[np.int64]) -> int:
        """Bring an input to the GPU, where it has room for all positions; its address there."""
        if name not in self._inputs:
            self._inputs[name] = device_memory.allocate((self._batch, self._room), np.int64)[0]
        self._inputs[name].resize(values.shape).copy_from(np.ascontiguousarray(values, np.int64), self._stream)
        return int(self._inputs[name].ptr)

    def _fetch(self, buffers: list[Any], shape: tuple[int, ...]) -> list[Array]:
        """What the beginnings of buffers hold, on the host."""
        copies = [np.empty(shape, self._dtype) for _ in buffers]
        for buffer, host in zip(buffers, copies, strict=True):
            buffer.view(shape).copy_to(host, self._stream)
        self._stream.synchronize()
        return copies


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
