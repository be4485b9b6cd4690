"""Run a whole graph in ONNX Runtime on the CPU, call by call, with its caches fed back.

It proves structure: wiring, masks, cache and positions. It does not prove float16: ONNX Runtime computes most of a float16 graph in float32
(design §4; strict.py rounds).
Letters: B batch, S new tokens of a call, L real tokens of a row, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.io_spec import Dtype, GraphValue
from validation.scenarios import Call, Scenario

Array = NDArray[Any]
PROVIDERS = ["CPUExecutionProvider"]
DTYPES: dict[str, Any] = {"fp16": np.float16, "fp32": np.float32}
ORT_TYPES = {"int64": "tensor(int64)", "fp16": "tensor(float16)", "fp32": "tensor(float)"}
SESSION_ENTRIES = {
    # DequantizeLinear + MatMul becomes MatMulNBits, which rounds activations to int8 too: another computation than the graph's. In ONNX Runtime
    # 1.31 the first switch alone leaves it on (measured: KL 0.0069 where the graph's own is lower); the second keeps every Q/DQ node as written.
    "session.enable_dq_matmulnbits_fusion": "0",
    "session.disable_quant_qdq": "1",
    "session.intra_op.allow_spinning": "0",  # waiting threads that spin halve the speed of everything else on two cores
}


@dataclass
class RowResult:
    """What a graph computed for one row of a scenario, padding removed.

    Attributes:
        positions: token indices that have logits; all of them, or the last of each call where a graph gathers one position.
        logits: [len(positions), V], the graph's dtype.
        keys, values: per layer [K, L, D], the graph's dtype, after the last call.
    """

    positions: NDArray[np.int64]
    logits: Array
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)

    def without_caches(self) -> RowResult:
        """The logits alone."""
        return RowResult(self.positions, self.logits)

    def gathered(self, positions: NDArray[np.int64]) -> RowResult:
        """Some positions alone, copied, without the caches."""
        at = np.searchsorted(self.positions, positions)
        assert np.array_equal(self.positions[at], positions)
        return RowResult(positions, self.logits[at].copy())


class GraphRunner:
    """A graph with the contract's inputs and outputs, loaded once.

    Args:
        graph: the ONNX file; its external data lies beside it.
        config, dtype: the model it must be.
        one_position: whether it is an engine graph, with logits [B, 1, V].
        threads: of ONNX Runtime; 0 lets it choose.

    Raises:
        ValidationError: ONNX Runtime can't load it, chose other providers, or its inputs and outputs are not the contract's.
    """

    def __init__(self, graph: Path, config: LlamaConfig, dtype: Dtype, *, one_position: bool = False, threads: int = 0) -> None:
        self.name = graph.name
        self.config = config
        self.dtype = dtype
        self.one_position = one_position
        self._session = load_session(graph, threads)
        _check_interface(graph.name, self._session.get_inputs(), io_spec.graph_inputs(config, dtype), "input")
        _check_interface(graph.name, self._session.get_outputs(), io_spec.graph_outputs(config, dtype, one_position=one_position), "output")

    def run(self, scenario: Scenario) -> list[RowResult]:
        """All calls of a scenario; one result per row.

        Raises:
            ValidationError: ONNX Runtime stopped in one of the calls.
        """
        cache: list[Array] | None = None
        columns: list[NDArray[np.int64]] = []
        logits: list[Array] = []
        for call in scenario.calls():
            outputs = self.call(call, cache)
            logits.append(outputs[0])
            columns.append(np.arange(call.end - outputs[0].shape[1], call.end))
            cache = outputs[1:]
        return split_rows(scenario, np.concatenate(columns), np.concatenate(logits, axis=1), cache or [])

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """Logits [L, V] of one sequence from an empty cache; the caches are not computed where nothing else needs them."""
        window = Scenario("window", (ids,), (0,), (len(ids),))
        feeds = call_feeds(self.config, self.dtype, next(window.calls()))
        logits: Array = self._run([io_spec.LOGITS], feeds)[0][0]
        return logits

    def call(self, call: Call, cache: list[Array] | None) -> list[Array]:
        """One call: logits, then keys and values of every layer in turn, as the graph gives them; None is an empty cache."""
        names = [value.name for value in io_spec.graph_outputs(self.config, self.dtype)]
        return self._run(names, call_feeds(self.config, self.dtype, call, cache))

    def _run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        try:
            return [np.asarray(output) for output in self._session.run(names, feeds)]
        except Exception as error:  # its exceptions share no base class
            batch, total = feeds[io_spec.ATTENTION_MASK].shape
            raise ValidationError(f"{self.name}: ONNX Runtime stopped at a batch of {batch} with {total} positions: {error}") from error


def call_feeds(config: LlamaConfig, dtype: Dtype, call: Call, cache: list[Array] | None = None) -> dict[str, Array]:
    """Graph inputs of a call by name.

    Args:
        config, dtype: of the model.
        call: the new tokens.
        cache: keys and values of each layer in turn, [B, K, P, D]; None is an empty one.
    """
    names = [value.name for value in io_spec.graph_inputs(config, dtype)]
    if cache is None:
        shape = (len(call.input_ids), config.num_key_value_heads, 0, config.head_dim)
        cache = [np.zeros(shape, DTYPES[dtype]) for _ in range(2 * config.num_hidden_layers)]
    return dict(zip(names, [call.input_ids, call.attention_mask, call.position_ids, *cache], strict=True))


def load_session(graph: Path, threads: int) -> Any:
    """A session on the CPU that computes what the graph says.

    Raises:
        ValidationError: ONNX Runtime can't load it, or chose other providers.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=PROVIDERS)
    except Exception as error:  # its exceptions share no base class
        hint = "python cli.py inspect --verify ART finds a damaged file"
        raise ValidationError(f"{graph.name}: ONNX Runtime can't load it: {error}", hint=hint) from error
    if session.get_providers() != PROVIDERS:
        raise ValidationError(f"{graph.name}: ONNX Runtime runs it on {session.get_providers()}, asked for {PROVIDERS}")
    return session


def _check_interface(graph: str, found: list[Any], expected: list[GraphValue], what: str) -> None:
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


def split_rows(scenario: Scenario, columns: NDArray[np.int64], logits: Array, cache: list[Array]) -> list[RowResult]:
    """Take padding off: logits [B, columns, V] and caches [B, K, W, D] → one result per row."""
    results = []
    for row, pad in enumerate(scenario.pads):
        real = columns >= pad
        keys, values = ([tensor[row, :, pad:] for tensor in cache[kind::2]] for kind in (0, 1))
        results.append(RowResult(columns[real] - pad, logits[row, real], keys, values))
    return results
