"""The static cache: the same Llama, with keys and values written into a cache of fixed capacity, in place.

Dynamic:  present = past ++ new                     the cache grows by S at every call; one mask entry a key
Static:   present[b, :, w[b] + s] = new[b, :, s]    the cache keeps its size C; w = cache_write_indices

Shapes that do not change from step to step are what a TensorRT engine wants: caches bound once, no copy. Rows of a batch are padded on the
right: padding is written behind a row's real tokens, is never attended to by them, and is overwritten by the tokens that follow.
Letters: B batch, S new tokens, C capacity, K kv heads, D head_dim, E hidden, V vocab.
Source: https://onnx.ai/onnx/operators/onnx__TensorScatter.html, onnx__Attention.html (opset 24).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from exporter.model import Cache, Decoder, LlamaModel


@torch.library.custom_op("llama2trt::tensor_scatter", mutates_args=())
def tensor_scatter(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    """Write new keys or values into the cache; ONNX's TensorScatter (axis −2, mode linear), to which the trace translates it.

    Args:
        cache: [B, K, C, D].
        new: [B, K, S, D], dtype of ``cache``.
        write_indices: [B] int64, slot of each row's first new token; at most C − S.

    Returns:
        [B, K, C, D], a copy; ``cache`` is left alone.

    Raises:
        RuntimeError: an index beyond the capacity.
    """
    slots = write_indices[:, None] + torch.arange(new.shape[2], device=new.device)  # [B, S]
    return cache.scatter(2, slots[:, None, :, None].expand(new.shape), new)


@tensor_scatter.register_fake
def _(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    return torch.empty_like(cache)


class StaticDecoder(Decoder):
    """``Decoder`` with a static cache."""

    def forward(  # type: ignore[override]  # the other cache form has other inputs
        self, input_ids: Tensor, position_ids: Tensor, cache_write_indices: Tensor, key_value_lengths: Tensor, past: Sequence[Cache]
    ) -> tuple[Tensor, list[Cache]]:
        """Token ids → final hidden states [B, S, E] and the present caches; arguments as in ``StaticLlamaModel.forward``."""
        mask = slots_allowed(cache_write_indices, key_value_lengths, input_ids.shape[1], past[0][0].shape[2])
        return self.decode(input_ids, position_ids, past, mask, partial(_write, cache_write_indices))


class StaticLlamaModel(LlamaModel):
    """``LlamaModel`` with a static cache; the same parameters under the same names."""

    decoder_class = StaticDecoder

    def forward(  # type: ignore[override]  # the other cache form has other inputs
        self, input_ids: Tensor, position_ids: Tensor, cache_write_indices: Tensor, key_value_lengths: Tensor, past: Sequence[Cache]
    ) -> tuple[Tensor, list[Cache]]:
        """One forward pass over new tokens.

        Args:
            input_ids: [B, S] int64; a shorter row is padded on the right.
            position_ids: [B, S] int64, below max_position_embeddings.
            cache_write_indices: [B] int64, slot of each row's first new token.
            key_value_lengths: [B] int64, slots in use afterwards: ``cache_write_indices + S``, padding included.
            past: per layer keys and values [B, K, C, D], finite everywhere.

        Returns:
            logits [B, S, V] and per layer the present keys and values [B, K, C, D].
        """
        hidden, presents = self.model(input_ids, position_ids, cache_write_indices, key_value_lengths, past)
        return self.logits(hidden), presents


def slots_allowed(write_indices: Tensor, key_value_lengths: Tensor, n_new: int, capacity: int) -> Tensor:
    """Which slots each new token may attend to: causal, aligned to the lower right of the slots in use, and always its own.

    This is the mask of ONNX's Attention (opset 24) with ``is_causal`` and ``nonpad_kv_seqlen = key_value_lengths``. A token's own slot is within it
    whenever the lengths are what they should be; it is allowed in any case, so that no row is ever fully masked (NaN on a GPU).

    Args:
        write_indices, key_value_lengths: [B] int64.
        n_new: S.
        capacity: C.

    Returns:
        [B, 1, S, C] bool, True = attend.
    """
    slot = torch.arange(capacity, device=write_indices.device)  # [C]
    row = torch.arange(n_new, device=write_indices.device)[:, None]  # [S, 1]
    last = row + (key_value_lengths - n_new)[:, None, None, None]  # [B, 1, S, 1]
    own = row + write_indices[:, None, None, None]  # [B, 1, S, 1]
    return (slot <= last) | (slot == own)


def _write(write_indices: Tensor, past: Tensor, new: Tensor) -> Tensor:
    present: Tensor = tensor_scatter(past, new, write_indices)
    return present
