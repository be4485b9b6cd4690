"""The runtime of a plan, played by ONNX Runtime on the plan's own engine graph: addresses are read and written as TensorRT reads and writes them.

Only what needs a GPU is replaced: the buffers lie in the host's memory, and the execution context runs the graph. Every read and write is held
against what was allocated there; a buffer that the session gave back is one no longer.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from artifact.hashing import sha256_of

VERSION = "1.7.1.116"
Array = np.ndarray[Any, Any]


class Memory:
    """Stands for engines/device_memory.py."""

    def __init__(self) -> None:
        self.owned: dict[int, Buffer] = {}
        self.streams = 0

    def open_stream(self) -> Stream:
        self.streams += 1
        return Stream(self)

    def allocate(self, shape: tuple[int, ...], dtype: Any, count: int = 1) -> list[Buffer]:
        return [Buffer(self, shape, np.dtype(dtype)) for _ in range(count)]

    def free(self, *owned: Any) -> None:
        for one in owned:
            one.free()

    def at(self, address: int, nbytes: int) -> int:
        """The address, if so many bytes are allocated there."""
        owner = self.owned[address]
        assert nbytes <= owner.host.nbytes, f"{nbytes} bytes where {owner.host.nbytes} are allocated"
        return address


class Stream:
    ptr = 7

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def synchronize(self) -> None: ...

    def free(self) -> None:
        self._memory.streams -= 1


class Buffer:
    """What the project uses of Polygraphy's DeviceArray; filled with NaN, as fresh memory may be."""

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._memory, self.shape, self._dtype = memory, shape, dtype
        self.host = np.empty(shape, dtype)
        self.host.view(np.uint8).fill(0xFF)
        memory.owned[self.ptr] = self

    @property
    def ptr(self) -> int:
        return int(self.host.ctypes.data)

    def resize(self, shape: tuple[int, ...]) -> Buffer:
        assert np.prod(shape) <= self.host.size, "grows: on a GPU this waits for all that runs there"
        self.shape = shape
        return self

    def copy_from(self, values: Array, stream: Stream) -> Buffer:
        assert values.dtype == self._dtype
        assert values.flags.c_contiguous
        ctypes.memmove(self._memory.at(self.ptr, values.nbytes), values.ctypes.data, values.nbytes)
        return self

    def view(self, shape: tuple[int, ...]) -> SimpleNamespace:
        def copy_to(values: Array, stream: Stream) -> None:
            assert values.dtype == self._dtype
            ctypes.memmove(values.ctypes.data, self._memory.at(self.ptr, values.nbytes), values.nbytes)

        return SimpleNamespace(copy_to=copy_to)

    def free(self) -> None:
        del self._memory.owned[self.ptr]


class Runtime:
    """Stands for the module ``tensorrt_rtx``; the plan is a file that names its engine graph.

    Attributes:
        broken: which of ``load``, ``context``, ``run`` fails, with a message to the logger.
        ran: profile and new tokens of every call.
    """

    __version__ = VERSION

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, INFO=3)

        def log(self, severity: Any, message: str) -> None: ...

    class _Choice:
        def __getattr__(self, name: str) -> str:
            return name

    DynamicShapesKernelSpecializationStrategy = CudaGraphStrategy = _Choice()

    def __init__(self, memory: Memory) -> None:
        self.memory, self.broken = memory, ""
        self.ran: list[tuple[str, int]] = []
        self.strategies: list[tuple[str, str]] = []
        self._logger: Any = None

    def Runtime(self, logger: Any) -> Any:
        self._logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def fails(self, at: str) -> bool:
        if self.broken == at:
            self._logger.log(self.ILogger.Severity.ERROR, f"broken at {at}")
        self._logger.log(self.ILogger.Severity.INFO, "all is well")
        return self.broken == at

    def _load(self, plan: bytes) -> Any:
        if self.fails("load"):
            return None
        described = json.loads(plan)
        config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy=None, cuda_graph_strategy=None)

        def create_execution_context(options: Any) -> Any:
            self.strategies.append((options.dynamic_shapes_kernel_specialization_strategy, options.cuda_graph_strategy))
            return None if self.fails("context") else Context(self, Path(described["graph"]), described["profiles"])

        return SimpleNamespace(create_runtime_config=lambda: config, create_execution_context=create_execution_context)


class Context:
    """An execution context: shapes and addresses in, the engine graph's outputs to their addresses."""

    def __init__(self, runtime: Runtime, graph: Path, profiles: Mapping[str, Mapping[str, list[int]]]) -> None:
        self._runtime, self._profiles = runtime, profiles
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        inputs = ir.load(graph).graph.inputs
        self._inputs = {str(value.name): (value.dtype.numpy(), [a if isinstance(a, int) else str(a.value) for a in value.shape]) for value in inputs}
        self._profile = ""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = list(self._profiles)[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        ranges = self._profiles[self._profile]
        bounds = [(axis, axis) if isinstance(axis, int) else (ranges[axis][0], ranges[axis][2]) for axis in self._inputs[name][1]]
        fits = len(shape) == len(bounds) and all(low <= size <= high for size, (low, high) in zip(shape, bounds, strict=True))
        self._shapes |= {name: shape} if fits else {}
        return fits or self._runtime.fails("never")

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address in self._runtime.memory.owned

    def execute_async_v3(self, stream: int) -> bool:
        if self._runtime.fails("run"):
            return False
        memory = self._runtime.memory
        feeds = {}
        for name, (dtype, _) in self._inputs.items():
            host = np.empty(self._shapes[name], dtype)
            ctypes.memmove(host.ctypes.data, memory.at(self._addresses[name], host.nbytes), host.nbytes)
            feeds[name] = host
        self._runtime.ran.append((self._profile, feeds["position_ids"].shape[1]))  # every part has them
        names = [value.name for value in self._session.get_outputs()]
        for name, values in zip(names, map(np.ascontiguousarray, self._session.run(names, feeds)), strict=True):
            ctypes.memmove(memory.at(self._addresses[name], values.nbytes), values.ctypes.data, values.nbytes)
        return True


def write_plan(artifact: Path, graph: str, profiles: Mapping[str, Mapping[str, tuple[int, int, int]]], **entry: Any) -> dict[str, Any]:
    """Write a plan of an engine graph, and ``build.json`` as build writes it; gives the plan's entry."""
    folder = artifact / "engines" / f"a100-80gb-{entry.get('precision', 'fp16')}{entry.pop('suffix', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "part-00.plan"
    plan.write_text(json.dumps({"graph": str(artifact / graph), "profiles": profiles}))
    made = {
        "file": str(plan.relative_to(artifact)),
        "precision": "fp16",
        "target": "a100-80gb",
        "backend": "tensorrt-rtx",
        "profiles": profiles,
        "graph": graph,
        "plan_sha256": sha256_of(plan),
        "tensorrt_version": VERSION,
        "compute_capability": "8.0",
        **entry,
    }
    (folder / "build.json").write_text(json.dumps({"engines": [made], "passed": True}))
    return made
