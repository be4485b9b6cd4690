"""Run a graph in ONNX Runtime one layer at a time: what ``GraphRunner`` gives, in the memory of one layer.

A session of a whole float16 graph holds every weight in float32: 27 GB at 7B. Here the graph is cut at its layers, the cuts are proven to be the
graph (``graphs.joined``), and everything that will be asked for goes through each layer while it is open (``streamed_pass``). Logits are made when
they are asked for, because those of all calls together would not fit.
Letters: B batch, L tokens of a row, V vocab.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.io_spec import Dtype, KvCache
from artifact.progress import Progress, silent
from graphs.joined import body_key, cut_graph, joined_difference
from validation.calls import FORMS, Turn
from validation.graph_interface import ModelPorts, check_contract, fixed_capacity
from validation.layers_alone import LayersAlone
from validation.local_ratio import TOKENS
from validation.row_result import Array, RowResult, row_results
from validation.scenarios import Scenario
from validation.spill import Spill
from validation.stray_slots import UNWRITTEN, stray_slots
from validation.streamed_pass import Batch, StreamedPass


@dataclass
class Finished:
    """Batches that have been through the layers of one graph. An engine graph has its stage's own layers: they need not run twice.

    Attributes:
        layers: ``body_key`` of the graph whose they are.
        batches: by ``_key``.
    """

    layers: str = ""
    batches: dict[str, Batch] = field(default_factory=dict)

    def enter(self, layers: str) -> None:
        """Begin with a graph of these layers: what others have left is dropped."""
        if layers != self.layers:
            self.layers, self.batches = layers, {}


class StreamedRunner:
    """A graph with the contract's inputs and outputs, in cuts; its methods are those of ``GraphRunner``.

    Args:
        graph: the ONNX file; its external data lies beside it.
        config, dtype, kv_cache: the model it must be.
        one_position: whether it is an engine graph, with logits [B, 1, V].
        finished: what another graph with the same layers has computed is taken from here; None computes all.
        progress: told the layer that is being run.

    Attributes:
        capacity: slots of a static cache that the graph is fixed to; None where the caller chooses.
        joined: what the joined cuts and the graph differ in; empty where they are the same.
        layer_errors: of every layer alone (layers_alone.py); None until hidden states to begin from were expected.

    Raises:
        FusionError: the graph can't be cut at its layers.
        ValidationError: its inputs and outputs are not the contract's.
    """

    def __init__(
        self,
        graph: Path,
        config: LlamaConfig,
        dtype: Dtype,
        kv_cache: KvCache = "dynamic",
        *,
        one_position: bool = False,
        finished: Finished | None = None,
        progress: Progress = silent,
    ) -> None:
        model = ir.load(graph)
        ports = ModelPorts(model)
        check_contract(graph.name, ports, config, dtype, kv_cache, one_position=one_position)
        self.name, self.one_position, self.capacity = graph.name, one_position, fixed_capacity(ports)
        self._form, self._is_static = FORMS[kv_cache], kv_cache == "static"
        cuts = cut_graph(model)
        difference, moved = joined_difference(cuts)
        self.joined: list[str] | None = [*(f"output {name}" for name in difference.outputs), *difference.only_left, *difference.only_right, *moved]
        if len(cuts.layers) != config.num_hidden_layers:
            raise ValidationError(f"{graph.name}: its nodes name {len(cuts.layers)} layers, expected {config.num_hidden_layers}")
        self._pass = StreamedPass(cuts, config, dtype, graph.stem, Spill(graph.parent), progress)
        self._finished = finished if finished is not None else Finished()
        self._finished.enter(body_key(cuts))
        self._tail: Any = None
        self.layer_errors: list[float] | None = None

    def expect(
        self, scenarios: Sequence[Scenario], sequences: Sequence[NDArray[np.int64]], capacity: int = 0, *, alone: Sequence[Array] = ()
    ) -> None:
        """Take what will be asked for through all layers at once.

        Args:
            scenarios: for ``run``.
            sequences: token ids [L] each, for ``logits``.
            capacity: slots of a static cache in the scenarios, unless the graph fixes them.
            alone: the reference's N+1 hidden states [L, E], for ``layer_errors`` of a float16 graph; empty where they are not wanted.

        Raises:
            ValidationError: ONNX Runtime stopped, or a static cache is too small.
        """
        wanted = [*(self._of_scenario(scenario, capacity) for scenario in scenarios), *map(self._of_sequence, sequences)]
        new = {key: batch for batch in wanted if (key := _key(batch)) not in self._finished.batches}
        lone = self._alone(alone) if len(alone) else None
        if new or lone:
            self._tail = None  # lm_head need not stay in memory while layers run
            self._pass.run([*new.values(), *([lone] if lone else ())])
            self._finished.batches |= new
        if lone:
            self.layer_errors = lone.errors

    def run(self, scenario: Scenario, capacity: int = 0) -> list[RowResult]:
        """As ``GraphRunner.run``."""
        batch = self._done(self._of_scenario(scenario, capacity))
        results = row_results(scenario, self._logits(batch), batch.caches, self._form.padding)
        if self._is_static:
            for row, result in enumerate(results):
                result.strays = stray_slots(scenario, row, batch.caches)
        return results

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """As ``GraphRunner.logits``."""
        logits: Array = self._logits(self._done(self._of_sequence(ids)))[0][0]
        return logits

    def _of_scenario(self, scenario: Scenario, capacity: int) -> Batch:
        calls = tuple(self._form.calls(scenario.turns()))
        return Batch(calls, (self.capacity or capacity) if self._is_static else 0, UNWRITTEN, keeps_caches=True)

    def _of_sequence(self, ids: NDArray[np.int64]) -> Batch:
        (call,) = self._form.calls([Turn((ids,), (0,))])
        return Batch((call,), call.empty_length)

    def _alone(self, states: Sequence[Array]) -> LayersAlone:
        """The layers alone; ids are 0, because the layers are fed hidden states."""
        (call,) = self._form.calls([Turn((np.zeros(min(TOKENS, len(states[0])), np.int64),), (0,))])
        return LayersAlone((call,), call.empty_length, states=states)

    def _done(self, batch: Batch) -> Batch:
        """The batch after all layers; one that was not expected is taken through them now."""
        key = _key(batch)
        if key not in self._finished.batches:
            self._tail = None
            self._pass.run([batch])
            self._finished.batches[key] = batch
        return self._finished.batches[key]

    def _logits(self, batch: Batch) -> list[Array]:
        if self._tail is None:
            self._tail = self._pass.open_tail()
        return [self._pass.logits(self._tail, batch, number) for number in range(len(batch.calls))]


def _key(batch: Batch) -> str:
    """What decides a batch's results: its calls and its cache."""
    digest = hashlib.sha256(repr((batch.slots, batch.fill, batch.keeps_caches)).encode())
    for call in batch.calls:
        for name, array in call.inputs().items():
            digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
