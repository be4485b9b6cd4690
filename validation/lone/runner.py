"""Run a lone graph in ONNX Runtime on the CPU, under its own names and dtypes.

Letters: B batch, S new tokens, P past, T = P + S, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from graphs.foreign.ports import Port, Ports
from validation.calls import Call, Turn, left_padded
from validation.graph_interface import load_session
from validation.lone.graph import LoneGraph
from validation.row_result import Array, RowResult, row_results
from validation.scenarios import Scenario


class LoneRunner:
    """A graph whose inputs and outputs were read from it, loaded once; its methods are those of ``GraphRunner``.

    Raises:
        ValidationError: ONNX Runtime can't load it.
    """

    def __init__(self, graph: LoneGraph, config: LlamaConfig) -> None:
        self.name = graph.path.name
        self.one_position = graph.one_position
        self._ports, self._config = graph.ports, config
        self._session = load_session(graph.path, threads=0)

    def run(self, scenario: Scenario) -> list[RowResult]:
        """All calls of a scenario; one result per row.

        Raises:
            ValidationError: ONNX Runtime stopped in one of the calls, or gave an output of another shape than its inputs ask for.
        """
        cache: list[Array] = []
        logits: list[Array] = []
        names = [self._ports.logits.name, *(port.name for port in self._ports.present)]
        for call in left_padded(scenario.turns()):
            of_call, *cache = outputs = self._run(names, call, cache)
            self._check(call, outputs)
            logits.append(of_call)
        return row_results(scenario, logits, cache, "left")

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """Logits [S, V] of one sequence from an empty cache."""
        call = next(left_padded([Turn((ids,), (0,))]))
        logits: Array = self._run([self._ports.logits.name], call, [])[0][0]
        return logits

    def _run(self, names: list[str], call: Call, cache: list[Array]) -> list[Array]:
        try:
            return [np.asarray(output) for output in self._session.run(names, lone_feeds(self._ports, self._config, call, cache))]
        except Exception as error:  # its exceptions share no base class
            batch, total = call.attention_mask.shape
            raise ValidationError(f"{self.name}: ONNX Runtime stopped at a batch of {batch} with {total} positions: {error}") from error

    def _check(self, call: Call, outputs: list[Array]) -> None:
        """Raise ValidationError unless the outputs have the shapes that this call must give."""
        batch, new = call.input_ids.shape
        heads, head_dim = self._config.num_key_value_heads, self._config.head_dim
        expected: list[tuple[int, ...]] = [(batch, 1 if self.one_position else new, self._config.vocab_size)]
        expected += [(batch, heads, call.end, head_dim)] * len(self._ports.present)
        for port, output, shape in zip((self._ports.logits, *self._ports.present), outputs, expected, strict=True):
            if output.shape != shape:
                raise ValidationError(
                    f"{self.name}: output {port.name} is {list(output.shape)} after {call.start} past and {new} new tokens, expected {list(shape)}"
                )


def lone_feeds(ports: Ports, config: LlamaConfig, call: Call, cache: list[Array]) -> dict[str, Array]:
    """Inputs of a call by the graph's names, in its dtypes; no cache is an empty one."""
    feeds = {ports.input_ids.name: _as(ports.input_ids, call.input_ids)}
    if ports.attention_mask is not None:
        feeds[ports.attention_mask.name] = _as(ports.attention_mask, call.attention_mask)
    if ports.position_ids is not None:
        positions = call.position_ids if len(ports.position_ids.shape) > 1 else call.position_ids[0]
        feeds[ports.position_ids.name] = _as(ports.position_ids, positions)
    shape = (len(call.input_ids), config.num_key_value_heads, 0, config.head_dim)
    past = cache or [np.zeros(shape, port.dtype.numpy()) for port in ports.past]
    return feeds | {port.name: _as(port, array) for port, array in zip(ports.past, past, strict=True)} if ports.past else feeds


def _as(port: Port, array: Array) -> Array:
    return array.astype(port.dtype.numpy(), copy=False)
