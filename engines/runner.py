"""Run a plan on the GPU it was built for: whether it may run is said before it is loaded, its caches stay on the GPU.

Letters: B batch, S new tokens, P past, T = P + S, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

import importlib
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
from artifact.hashing import sha256_of
from artifact.io_spec import Dtype
from engines.device import Device

logger = logging.getLogger(__name__)
Array = NDArray[Any]
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
"""Backend → the Python module of its runtime."""
DTYPES: dict[Dtype, Any] = {"fp16": np.float16, "fp32": np.float32}
PROFILES = ("prefill", "decode")


def why_not_here(artifact: Path, entry: Mapping[str, Any], device: Device) -> str | None:
    """Why this plan can't run on this GPU with what is installed, found without loading it; None where it can.

    Args:
        artifact: the folder.
        entry: the plan's entry in ``build.json``.
        device: this machine's GPU.
    """
    wanted = entry["compute_capability"]
    found = ".".join(map(str, device.compute_capability))
    if wanted != found:
        return f"built for compute capability {wanted} ({entry['target']}), this GPU ({device.name}) has {found}"
    plan = artifact / entry["file"]
    if not plan.is_file():
        return f"{entry['file']} is not there"
    if (digest := sha256_of(plan)) != entry["plan_sha256"]:
        return f"{entry['file']} is not the plan that was built (SHA-256 {digest[:12]}…, expected {entry['plan_sha256'][:12]}…)"
    try:
        module = _runtime(entry["backend"])
    except ImportError as error:
        return f"its runtime can't be imported: {error}"
    if module.__version__ != entry["tensorrt_version"]:
        return f"built by {entry['backend']} {entry['tensorrt_version']}, here is {module.__version__}"
    return None


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
        trt = _runtime(entry["backend"])
        self._errors = _errors(trt)
        runtime = trt.Runtime(self._errors)
        self._engine = runtime.deserialize_cuda_engine((artifact / self.name).read_bytes())
        self._runtime = runtime  # owns the engine
        if self._engine is None:
            raise EngineError(f"{self.name}: the runtime can't load it: {self._errors.last()}")
        self._contexts: dict[str, Any] = {}

    def context(self, profile: str, stream: int) -> Any:
        """The execution context of a profile, made when it is first needed.

        Raises:
            EngineError: the GPU's memory does not hold it, or its kernels can't be compiled.
        """
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(PROFILES.index(profile), stream):
                raise EngineError(f"{self.name}: no execution context for {profile}: {self._errors.last()}")
            self._contexts[profile] = context
        return self._contexts[profile]

    def failed(self, what: str) -> EngineError:
        """The error of a call, with the runtime's reason."""
        return EngineError(f"{self.name}: {what}: {self._errors.last()}")


class PlanSession:
    """One batch of sequences on a plan with a dynamic cache: call after call, the caches stay on the GPU.

    Two sets of cache buffers, each for the longest sequence: a call reads one and writes the other.

    Args:
        plan: what to run.
        config, dtype: the model it is.
        batch: rows, B.
        max_length: positions that the caches have room for; at most the plan's.

    Raises:
        EngineError: the plan's profiles admit fewer rows or positions.
    """

    def __init__(self, plan: Plan, config: LlamaConfig, dtype: Dtype, *, batch: int, max_length: int) -> None:
        from polygraphy.cuda import DeviceArray, Stream
        from polygraphy.datatype import DataType

        self._plan, self._config, self._dtype, self._batch = plan, config, DTYPES[dtype], batch
        rows, positions = (plan.axes["prefill"][axis][2] for axis in (io_spec.BATCH, io_spec.TOTAL))
        if batch > rows or max_length > positions:
            raise EngineError(f"{plan.name} admits {rows} rows of {positions} positions, asked for {batch} of {max_length}")
        self.past = 0
        self._stream, real = Stream(), DataType.from_dtype(np.dtype(self._dtype))
        size = batch * config.num_key_value_heads * max_length * config.head_dim
        count = 2 * config.num_hidden_layers
        self._read, self._written = ([DeviceArray((size,), real) for _ in range(count)] for _ in range(2))
        self._inputs = {
            name: DeviceArray((batch * max_length,), DataType.INT64) for name in (io_spec.INPUT_IDS, io_spec.ATTENTION_MASK, io_spec.POSITION_IDS)
        }
        self._logits = DeviceArray((batch, 1, config.vocab_size), real)
        self._past_names, self._present_names = (
            [name(layer, kind) for layer in range(config.num_hidden_layers) for kind in io_spec.CACHE_KINDS]
            for name in (io_spec.past_name, io_spec.present_name)
        )

    def restart(self) -> None:
        """Forget what the caches hold."""
        self.past = 0

    def call(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], position_ids: NDArray[np.int64]) -> Array:
        """Run new tokens.

        Args:
            input_ids, position_ids: [B, S] int64.
            attention_mask: [B, T] int64.

        Returns:
            Logits of the last position, [B, 1, V], the plan's dtype.

        Raises:
            EngineError: the shapes are outside the profile, or the run failed.
        """
        self.enqueue(input_ids, attention_mask, position_ids)
        return self.read_logits()

    def enqueue(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], position_ids: NDArray[np.int64]) -> None:
        """As ``call``, without waiting for the logits."""
        new = input_ids.shape[1]
        profile = "decode" if new == 1 else "prefill"
        context = self._plan.context(profile, self._stream.ptr)
        feeds = {io_spec.INPUT_IDS: input_ids, io_spec.ATTENTION_MASK: attention_mask, io_spec.POSITION_IDS: position_ids}
        for name, values in feeds.items():
            self._copy(self._inputs[name], values)
            self._bind(context, name, self._inputs[name].ptr, values.shape)
        shape = (self._batch, self._config.num_key_value_heads, self.past, self._config.head_dim)
        for past, buffer in zip(self._past_names, self._read, strict=True):
            self._bind(context, past, buffer.ptr, shape)
        for present, buffer in zip(self._present_names, self._written, strict=True):
            self._bind(context, present, buffer.ptr)
        self._bind(context, io_spec.LOGITS, self._logits.ptr)
        if not context.execute_async_v3(self._stream.ptr):
            raise self._plan.failed(f"{profile} of {new} tokens after {self.past} did not run")
        self._read, self._written = self._written, self._read
        self.past += new

    def read_logits(self) -> Array:
        """Wait, then the logits of the last call, [B, 1, V]."""
        host = np.empty((self._batch, 1, self._config.vocab_size), self._dtype)
        self._logits.copy_to(host, self._stream)
        self._stream.synchronize()
        return host

    def caches(self) -> list[Array]:
        """Keys and values of each layer in turn, [B, K, P, D]."""
        shape = (self._batch, self._config.num_key_value_heads, self.past, self._config.head_dim)
        copies = []
        for buffer in self._read:
            host = np.empty(int(np.prod(shape)), self._dtype)
            buffer.view((host.size,)).copy_to(host, self._stream)
            copies.append(host)
        self._stream.synchronize()
        return [host.reshape(shape) for host in copies]

    def _copy(self, buffer: Any, values: NDArray[np.int64]) -> None:
        buffer.resize((values.size,))
        buffer.copy_from(np.ascontiguousarray(values).reshape(-1), self._stream)

    def _bind(self, context: Any, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        if shape is not None and not context.set_input_shape(name, shape):
            raise self._plan.failed(f"{name} {list(shape)} is outside the profile")
        if not context.set_tensor_address(name, address):
            raise self._plan.failed(f"{name} can't be bound")


def _runtime(backend: str) -> ModuleType:
    return importlib.import_module(MODULES[backend])


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
