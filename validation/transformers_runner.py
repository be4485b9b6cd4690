"""Run Hugging Face's Llama over the scenarios and the text, one layer in memory at a time, with its own masks and caches.

Layer-major, as ``streamed_pass`` runs a graph: every call of every batch goes through a layer while it is open, prefill, decode steps, chunks and
padded rows alike, each batch with a cache of that layer. That is possible because every token is known beforehand.
Letters: B batch, S new tokens of a call, L tokens of a row, T columns so far, E hidden, V vocab, K kv heads, D head_dim, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from artifact.progress import Progress, silent
from validation.calls import Call, Turn, left_padded
from validation.float16_costs import relative_errors
from validation.reference import Store, as_is
from validation.row_result import Array, RowResult, row_results
from validation.scenarios import Scenario
from validation.transformers_model import TransformersModel


@dataclass
class _Batch:
    """Calls of one batch, in order: what leaves the last layer for each [B, S, E], and keys and values of each layer in turn [B, K, T, D]."""

    calls: tuple[Call, ...]
    keeps_caches: bool
    hidden: list[Tensor] = field(default_factory=list)
    caches: list[Array] = field(default_factory=list)


class TransformersRunner:
    """Transformers' model, run as a graph is; ``run`` and ``logits`` are those of ``GraphRunner``.

    Args:
        model: its modules.
        store: what is kept of every layer goes through it, to lie elsewhere than in memory.
        progress: told which layer runs.

    Attributes:
        hidden_errors: of the first scenario's hidden state after each layer against ``hidden`` of ``expect`` (float16_costs.py), [N].
    """

    one_position = False

    def __init__(self, model: TransformersModel, *, store: Store = as_is, progress: Progress = silent) -> None:
        self._model, self._store, self._progress = model, store, progress
        self._batches: dict[str, _Batch] = {}
        self._tail: tuple[nn.Module, nn.Module] | None = None
        self.hidden_errors: list[float] = []

    @torch.inference_mode()
    def expect(self, scenarios: Sequence[Scenario], sequences: Sequence[NDArray[np.int64]], hidden: Sequence[Array]) -> None:
        """Take all that will be asked for through the layers.

        Args:
            scenarios: for ``run``; the first has one call of one row.
            sequences: token ids [L] each, for ``logits``.
            hidden: the reference's N+1 hidden states of the first scenario's row.

        Raises:
            ValidationError: transformers' model has another number of layers than the reference.
        """
        for scenario in scenarios:
            self._batches[scenario.name] = _Batch(tuple(left_padded(scenario.turns())), keeps_caches=True)
        for ids in sequences:
            self._batches[_key(ids)] = _Batch(tuple(left_padded([Turn((ids,), (0,))])), keeps_caches=False)
        first = self._batches[scenarios[0].name]
        layers = len(hidden) - 1
        self._model.require_depth(layers)
        states = iter(self._model.embed([torch.from_numpy(call.input_ids) for batch in self._batches.values() for call in batch.calls]))
        for batch in self._batches.values():
            batch.hidden = [next(states) for _ in batch.calls]
        for number in range(layers):
            self._progress("transformers, layer by layer", number, layers)
            layer = self._model.layer(number)
            for batch in self._batches.values():
                self._advance(layer, batch)
            del layer  # before the next one is read
            self.hidden_errors += relative_errors([first.hidden[0][0].numpy()], [hidden[number + 1]])

    def run(self, scenario: Scenario) -> list[RowResult]:
        """All calls of a scenario; one result per row, with the caches."""
        batch = self._batches[scenario.name]
        return row_results(scenario, [self._logits(state) for state in batch.hidden], batch.caches, "left")

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """Logits [L, V] of one sequence from an empty cache."""
        logits: Array = self._logits(self._batches[_key(ids)].hidden[0])[0]
        return logits

    def _advance(self, layer: nn.Module, batch: _Batch) -> None:
        """All calls of a batch through one layer, from an empty cache of transformers'."""
        cache = self._model.new_cache()
        for number, call in enumerate(batch.calls):
            state, positions = batch.hidden[number], torch.from_numpy(call.position_ids)
            mask = self._model.mask(state, torch.from_numpy(call.attention_mask), positions, cache)
            rotary = self._model.rotary(state, position_ids=positions)
            batch.hidden[number] = layer(
                state, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, position_embeddings=rotary
            )
        if batch.keeps_caches:
            batch.caches += [self._store(tensor.numpy()) for tensor in (cache.layers[0].keys, cache.layers[0].values)]

    @torch.inference_mode()
    def _logits(self, state: Tensor) -> Array:
        if self._tail is None:
            self._tail = self._model.norm(), self._model.head()
        norm, head = self._tail
        logits: Array = head(norm(state)).numpy()
        return logits


def _key(ids: NDArray[np.int64]) -> str:
    return f"{len(ids)} {ids.tobytes().hex()}"
