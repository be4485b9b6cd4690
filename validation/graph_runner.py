"""Run a whole graph in ONNX Runtime on the CPU, call by call, with its caches fed back.

It proves structure: wiring, masks, cache and positions. It does not prove float16: ONNX Runtime computes most of a float16 graph in float32
(docs/adr/006; strict.py rounds).

A static cache is written in place, as an engine does it: past and present are one buffer.
Letters: B batch, S new tokens of a call, L real tokens of a row, P past, C capacity, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.io_spec import Dtype, KvCache
from validation.calls import FORMS, AnyCall, StaticCall, Turn
from validation.graph_interface import check_contract, fixed_capacity, load_session
from validation.in_place import check_room, run_in_place
from validation.row_result import Array, RowResult, row_results
from validation.scenarios import Scenario
from validation.stray_slots import UNWRITTEN, stray_slots


class GraphRunner:
    """A graph with the contract's inputs and outputs, loaded once.

    Args:
        graph: the ONNX file; its external data lies beside it.
        config, dtype, kv_cache: the model it must be.
        one_position: whether it is an engine graph, with logits [B, 1, V].
        threads: of ONNX Runtime; 0 lets it choose.

    Attributes:
        capacity: slots of a static cache that the graph is fixed to; None where the caller chooses.
        joined: None, because nothing is cut.
        layer_errors: None, because no layer is run alone here.

    Raises:
        ValidationError: ONNX Runtime can't load it, chose other providers, or its inputs and outputs are not the contract's.
    """

    def __init__(
        self, graph: Path, config: LlamaConfig, dtype: Dtype, kv_cache: KvCache = "dynamic", *, one_position: bool = False, threads: int = 0
    ) -> None:
        self.name = graph.name
        self.config = config
        self.dtype = dtype
        self.kv_cache = kv_cache
        self.one_position = one_position
        self.joined: list[str] | None = None
        self.layer_errors: list[float] | None = None
        self._session = load_session(graph, threads)
        check_contract(graph.name, self._session, config, dtype, kv_cache, one_position=one_position)
        self.capacity = fixed_capacity(self._session)

    def expect(
        self, scenarios: Sequence[Scenario], sequences: Sequence[NDArray[np.int64]], capacity: int = 0, *, alone: Sequence[Array] = ()
    ) -> None:
        """What will be asked for; nothing to prepare, because the whole graph is loaded."""

    def run(self, scenario: Scenario, capacity: int = 0) -> list[RowResult]:
        """All calls of a scenario; one result per row.

        Args:
            scenario: what to run.
            capacity: slots of a static cache, unless the graph fixes them; they hold ``UNWRITTEN`` until they are written.

        Raises:
            ValidationError: ONNX Runtime stopped in one of the calls, or a static cache is too small.
        """
        form = FORMS[self.kv_cache]
        cache = self.new_cache(len(scenario.rows), capacity, UNWRITTEN)
        logits: list[Array] = []
        for call in form.calls(scenario.turns()):
            of_call, *cache = self.call(call, cache)
            logits.append(of_call)
        results = row_results(scenario, logits, cache, form.padding)
        if self.kv_cache == "static":
            for row, result in enumerate(results):
                result.strays = stray_slots(scenario, row, cache)
        return results

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """Logits [L, V] of one sequence from an empty cache; the caches are not computed where nothing else needs them."""
        call = next(FORMS[self.kv_cache].calls([Turn((ids,), (0,))]))
        logits: Array = self._run([io_spec.LOGITS], call, self._feeds(call, None))[0][0]
        return logits

    def new_cache(self, batch: int, capacity: int = 0, fill: float = 0.0) -> list[Array]:
        """Keys and values of each layer in turn, before the first call: [B, K, 0, D], or [B, K, C, D] of a static cache.

        Args:
            batch: B.
            capacity: C, unless the graph fixes it.
            fill: what the slots hold; any finite value will do.
        """
        length = (self.capacity or capacity) if self.kv_cache == "static" else 0
        return filled_caches(self.config, self.dtype, batch, length, fill)

    def call(self, call: AnyCall, cache: list[Array] | None) -> list[Array]:
        """One call: logits, then keys and values of every layer in turn; None is an empty cache.

        A dynamic cache is left alone, and the present one is another; a static one is written in place and returned.

        Raises:
            ValidationError: ONNX Runtime stopped, or a static cache has too few slots.
        """
        if isinstance(call, StaticCall):
            return self._run_in_place(call, cache or self.new_cache(len(call.input_ids), call.in_use))
        names = [value.name for value in io_spec.graph_outputs(self.config, self.dtype)]
        return self._run(names, call, self._feeds(call, cache))

    def _feeds(self, call: AnyCall, cache: list[Array] | None) -> dict[str, Array]:
        return call_feeds(self.config, self.dtype, call, cache, one_position=self.one_position)

    def _run(self, names: list[str], call: AnyCall, feeds: dict[str, Array]) -> list[Array]:
        try:
            return [np.asarray(output) for output in self._session.run(names, feeds)]
        except Exception as error:  # its exceptions share no base class
            raise self._stopped(call, error) from error

    def _run_in_place(self, call: StaticCall, cache: list[Array]) -> list[Array]:
        check_room(self.name, call, cache[0].shape[2])
        try:
            logits = run_in_place(self._session, io_spec.LOGITS, self._feeds(call, cache), io_spec.cache_names(self.config))
        except Exception as error:  # its exceptions share no base class
            raise self._stopped(call, error) from error
        return [logits, *cache]

    def _stopped(self, call: AnyCall, error: Exception) -> ValidationError:
        batch = len(call.input_ids)
        return ValidationError(f"{self.name}: ONNX Runtime stopped at a batch of {batch} with {call.in_use} positions: {error}")


def call_feeds(config: LlamaConfig, dtype: Dtype, call: AnyCall, cache: list[Array] | None = None, *, one_position: bool = False) -> dict[str, Array]:
    """Graph inputs of a call by name.

    Args:
        config, dtype: of the model.
        call: the new tokens, laid out for its cache form.
        cache: keys and values of each layer in turn, [B, K, P or C, D]; None is an empty one, of just the slots that the call needs.
        one_position: whether the graph is an engine graph.
    """
    kv_cache: KvCache = "static" if isinstance(call, StaticCall) else "dynamic"
    cache = filled_caches(config, dtype, len(call.input_ids), call.empty_length) if cache is None else cache
    known: dict[str, Array] = {**call.inputs(), **dict(zip((past for past, _ in io_spec.cache_names(config)), cache, strict=True))}
    return {value.name: known[value.name] for value in io_spec.graph_inputs(config, dtype, kv_cache, one_position=one_position)}


def filled_caches(config: LlamaConfig, dtype: Dtype, batch: int, length: int, fill: float = 0.0) -> list[Array]:
    """Keys and values of each layer in turn, [B, K, length, D], all of one value."""
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    return [np.full(shape, fill, io_spec.NUMPY_DTYPES[dtype]) for _ in range(len(io_spec.CACHE_KINDS) * config.num_hidden_layers)]
