"""Load a graph in ONNX Runtime on the CPU, and hold its inputs and outputs against the contract (artifact/io_spec.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import onnxruntime

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.io_spec import CAPACITY, Dtype, GraphValue, KvCache, graph_inputs, graph_outputs, past_name

PROVIDERS = ["CPUExecutionProvider"]
ORT_TYPES = {"int64": "tensor(int64)", "fp16": "tensor(float16)", "fp32": "tensor(float)"}
ORT_NAMES = {ir.DataType.INT64: "int64", ir.DataType.FLOAT16: "float16", ir.DataType.FLOAT: "float"}
DISABLED = ["MatMulScaleFusion"]
"""It folds a scale into a product where no other node reads the constant: in one layer alone, and not in a graph whose layers share it."""
SESSION_ENTRIES = {
    # DequantizeLinear + MatMul becomes MatMulNBits, which rounds activations to int8 too: another computation than the graph's. In ONNX Runtime
    # 1.31 the first switch alone leaves it on (measured: KL 0.0069 where the graph's own is lower); the second keeps every Q/DQ node as written.
    "session.enable_dq_matmulnbits_fusion": "0",
    "session.disable_quant_qdq": "1",
    "session.intra_op.allow_spinning": "0",  # waiting threads that spin halve the speed of everything else on two cores
}


def session_options(threads: int = 0) -> Any:
    """Options of every session that runs more than one node: ``SESSION_ENTRIES``, and no warnings; ``threads`` of ONNX Runtime, 0 lets it choose."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    return options


def load_session(graph: Path, threads: int = 0) -> Any:
    """A session with ``SESSION_ENTRIES``.

    Args:
        graph: the ONNX file; its external data lies beside it.
        threads: of ONNX Runtime; 0 lets it choose.

    Raises:
        ValidationError: ONNX Runtime can't load it, or chose other providers.
    """
    try:
        session = onnxruntime.InferenceSession(graph, session_options(threads), providers=PROVIDERS, disabled_optimizers=DISABLED)
    except Exception as error:  # its exceptions share no base class
        hint = "python cli.py inspect --verify ART finds a damaged file"
        raise ValidationError(f"{graph.name}: ONNX Runtime can't load it: {error}", hint=hint) from error
    if session.get_providers() != PROVIDERS:
        raise ValidationError(f"{graph.name}: ONNX Runtime runs it on {session.get_providers()}, asked for {PROVIDERS}")
    return session


class ModelPorts:
    """A graph that is not loaded, its inputs and outputs described as a session's are."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph

    def get_inputs(self) -> list[Port]:
        """Inputs that are no initializers."""
        return [_port(value) for value in self._graph.inputs if not value.is_initializer()]

    def get_outputs(self) -> list[Port]:
        """Outputs."""
        return [_port(value) for value in self._graph.outputs]


class Port(NamedTuple):
    """One input or output, as ONNX Runtime describes it: ``tensor(float16)``, and sizes or axis names."""

    name: str
    type: str
    shape: list[int | str | None]


def _port(value: ir.Value) -> Port:
    kind = ORT_NAMES.get(value.dtype, str(value.dtype)) if value.dtype is not None else "?"
    return Port(str(value.name), f"tensor({kind})", [size if isinstance(size, int) else size.value for size in value.shape or ()])


def fixed_capacity(session: Any) -> int | None:
    """Slots that an engine graph's static caches are fixed to; None where the graph leaves them open."""
    past = next((value for value in session.get_inputs() if value.name == past_name(0, "key")), None)
    length = past.shape[2] if past is not None and len(past.shape) == 4 else None
    return length if isinstance(length, int) else None


def check_contract(graph: str, session: Any, config: LlamaConfig, dtype: Dtype, kv_cache: KvCache, *, one_position: bool) -> None:
    """Compare a session's inputs and outputs with the contract; the capacity of a static engine graph may be a number.

    Raises:
        ValidationError: one is missing, is not in the contract, or has another dtype, rank or size.
    """
    capacity = fixed_capacity(session) if one_position and kv_cache == "static" else None
    inputs = graph_inputs(config, dtype, kv_cache, one_position=one_position)
    outputs = graph_outputs(config, dtype, kv_cache, one_position=one_position)
    for found, expected, what in ((session.get_inputs(), inputs, "input"), (session.get_outputs(), outputs, "output")):
        _check(graph, found, [_with_capacity(value, capacity) for value in expected], what)


def _with_capacity(value: GraphValue, capacity: int | None) -> GraphValue:
    return value if capacity is None else replace(value, shape=tuple(capacity if axis == CAPACITY else axis for axis in value.shape))


def _check(graph: str, found: list[Any], expected: list[GraphValue], what: str) -> None:
    got = {value.name: (value.type, tuple(value.shape)) for value in found}
    wanted = {value.name: (ORT_TYPES[value.dtype], value.shape) for value in expected}
    for name in wanted.keys() - got.keys():
        raise ValidationError(f"{graph}: no {what} {name}; it has {', '.join(list(got)[:4])} … ({len(got)}, expected {len(wanted)})")
    for name in got.keys() - wanted.keys():
        raise ValidationError(f"{graph}: {what} {name} is not in the contract (expected {len(wanted)} {what}s, got {len(got)})")
    for name, value in wanted.items():
        if not _fits(got[name], value):
            raise ValidationError(f"{graph}: {what} {name} is {_show(got[name])}, expected {_show(value)}")


def _fits(got: tuple[str, tuple[Any, ...]], wanted: tuple[str, tuple[int | str, ...]]) -> bool:
    """Same type, rank and fixed sizes; what must be dynamic is dynamic (ONNX Runtime renames or drops axis names where it infers a shape itself)."""
    if got[0] != wanted[0] or len(got[1]) != len(wanted[1]):
        return False
    return all(size == axis if isinstance(axis, int) else not isinstance(size, int) for size, axis in zip(got[1], wanted[1], strict=True))


def _show(value: tuple[str, tuple[Any, ...]]) -> str:
    return f"{value[0]} {list(value[1])}"
