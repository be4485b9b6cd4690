"""The oracle: the reference model in float32 on the checkpoint's own weights, one layer in memory at a time.

Full sequences in one forward, without a cache and without padding, so that a graph's cache, chunks and masks are judged by something that has
none of them. Layer-major: a layer's weights are read once and advance every sequence, so that 13B costs the memory of one layer.
Letters: L tokens of a sequence, K kv heads, D head_dim, E hidden, V vocab, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.layout import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from artifact.progress import Progress, silent
from exporter.model import DecoderLayer, RMSNorm, attention_allowed
from exporter.rope import rotary_tables

Array = NDArray[Any]
Read = Callable[[str], Tensor]
OnLayer = Callable[[int, DecoderLayer], None]
AfterLayer = Callable[[int, DecoderLayer, Sequence[Tensor], Sequence[Tensor]], None]
"""``after_layer(number, layer, entered, left)``: the hidden states [1, L, E] of all sequences before and behind a layer, which may be changed."""
Store = Callable[[Array], Array]


def as_is(array: Array) -> Array:
    """The array, in memory."""
    return array


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference computed for one sequence of L tokens.

    Attributes:
        final_hidden: [L, E] after the final norm; ``logits`` makes logits of it when they are needed.
        keys, values: per layer [K, L, D] float32, keys rotated as a cache holds them; empty where they were not kept.
        hidden: N+1 arrays [L, E] float32, the input of every layer and the output of the last; None where not kept.
        ranges: name → largest |value| per layer; filled by the range audit.
    """

    final_hidden: Tensor
    lm_head: Tensor = field(repr=False)
    keys: list[Array] = field(default_factory=list, repr=False)
    values: list[Array] = field(default_factory=list, repr=False)
    hidden: list[Array] | None = field(default=None, repr=False)
    ranges: dict[str, list[float]] = field(default_factory=dict)

    @torch.inference_mode()
    def logits(self, window: slice = slice(None)) -> NDArray[np.float32]:
        """Logits [n, V] float32 of the positions of ``window``."""
        return F.linear(self.final_hidden[window], self.lm_head).float().numpy()


class Reference:
    """The reference model, streamed.

    Args:
        config: the model's shape.
        read: name → weight as the checkpoint holds it, any float dtype; called once per run for a layer's weights.
    """

    def __init__(self, config: LlamaConfig, read: Read) -> None:
        self.config = config
        self.read = read
        self._stored: dict[str, torch.dtype] = {}

    def decoder_layer(self, index: int, dtype: torch.dtype = torch.float32) -> DecoderLayer:
        """One decoder layer with its weights in ``dtype``."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config)
        weights = {name: self._weight(f"{layer_prefix(index)}.{name}", dtype) for name in layer.state_dict()}
        layer.load_state_dict(weights, assign=True)
        return layer.eval()

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[NDArray[np.int64]],
        *,
        keep_hidden: Collection[int] = (),
        keep_cache: Collection[int] | None = None,
        dtype: torch.dtype = torch.float32,
        on_layer: OnLayer | None = None,
        after_layer: AfterLayer | None = None,
        store: Store = as_is,
        progress: Progress = silent,
    ) -> list[ReferenceRun]:
        """Run every sequence alone, from position 0.

        Args:
            sequences: token ids [L] each, of any lengths.
            keep_hidden: indices of sequences whose hidden states are kept.
            keep_cache: indices of sequences whose keys and values are kept; None keeps all.
            dtype: of weights and activations.
            on_layer: called with each loaded layer before it is used, for hooks.
            after_layer: called with each layer when all sequences have been through it.
            store: what is kept of every layer goes through it, to lie elsewhere than in memory.
            progress: told which layer runs.
        """
        kept_cache = range(len(sequences)) if keep_cache is None else keep_cache
        states = self.embed(sequences, dtype)
        caches: list[tuple[list[Array], list[Array]]] = [([], []) for _ in sequences]
        hidden: dict[int, list[Array]] = {index: [store(_array(states[index]))] for index in keep_hidden}
        tables = rotary_tables(self.config, dtype)
        for number in range(self.config.num_hidden_layers):
            progress("reference, layer by layer", number, self.config.num_hidden_layers)
            layer = self.decoder_layer(number, dtype)
            if on_layer is not None:
                on_layer(number, layer)
            entered = list(states)
            for index, state in enumerate(entered):
                states[index], present = self.advance(layer, state, tables)
                if index in kept_cache:
                    for kept, tensor in zip(caches[index], present, strict=True):
                        kept.append(store(_array(tensor)))
                if index in hidden:
                    hidden[index].append(store(_array(states[index])))
            if after_layer is not None:
                after_layer(number, layer, entered, states)
            del layer  # before the next one is read
        norm = self.final_norm(dtype)
        lm_head = self.lm_head.to(dtype)
        return [ReferenceRun(norm(state)[0], lm_head, *caches[index], hidden.get(index)) for index, state in enumerate(states)]

    def embed(self, sequences: Sequence[NDArray[np.int64]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Token ids [L] each → what enters the first layer, [1, L, E] each; only these rows become float32."""
        table = self.read(EMBEDDING)
        return [F.embedding(torch.from_numpy(ids), table)[None].float().to(dtype) for ids in sequences]

    def advance(self, layer: DecoderLayer, state: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One layer further: [B, L, E] from position 0 → [B, L, E], and its keys and values [B, K, L, D].

        Args:
            layer: of ``decoder_layer``.
            state: what enters it.
            tables: ``rotary_tables`` in the dtype of the state.
        """
        batch, length, _ = state.shape
        cos, sin = (table[None, None, :length] for table in tables)  # [1, 1, L, D/2]
        mask = attention_allowed(torch.ones(1, length, dtype=torch.int64), length)
        empty = state.new_zeros(batch, self.config.num_key_value_heads, 0, self.config.head_dim)
        output, present = layer(state, cos, sin, mask, (empty, empty))
        return output, present

    def final_norm(self, dtype: torch.dtype = torch.float32) -> RMSNorm:
        """The norm behind the last layer."""
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self._weight(FINAL_NORM, dtype)}, assign=True)
        return norm

    @cached_property
    def lm_head(self) -> Tensor:
        """[V, E] float32; the embedding where it is tied."""
        return self._weight(self.head_name, torch.float32)

    def keep_head(self, store: Store) -> None:
        """Lay ``lm_head`` elsewhere than in memory: it is needed now and then as long as logits are compared, and is gigabytes of a large model."""
        self.lm_head = torch.from_numpy(store(self.lm_head.numpy()))

    @property
    def head_name(self) -> str:
        """The weight that makes logits."""
        return EMBEDDING if self.config.tie_word_embeddings else LM_HEAD

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        weight = self.read(name)
        self._stored[name] = weight.dtype
        return weight.to(dtype)

    def is_float16(self, name: str) -> bool:
        """Whether a weight that was read is float16 in the checkpoint: rounding it again would change nothing."""
        return self._stored.get(name) == torch.float16


def _array(tensor: Tensor) -> Array:
    """[1, …] of any float dtype → […] float32."""
    return tensor[0].float().numpy()
