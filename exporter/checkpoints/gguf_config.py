"""A GGUF file's metadata as a Llama config: keys are used, harmless or refused, as for config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.numbers import integer
from exporter.checkpoints import gguf_rope
from exporter.checkpoints.gguf_rope import stored_number

USED = frozenset(
    {
        *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.dimension_count", "rope.freq_base"),
        *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
        "attention.layer_norm_rms_epsilon",
        *gguf_rope.USED,
    }
)
REFUSED: Mapping[str, tuple[Any, ...]] = {
    **gguf_rope.REFUSED,
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "logit_scale": (1.0,),
}
"""Keys (after ``llama.``) that change the model, with the values that leave it as it is."""
HARMLESS = frozenset({"expert_used_count", "rope.scaling.finetuned", "tensor_data_layout"})
"""Keys that say nothing once the ones above are accepted; ``tensor_data_layout`` describes the interleaved rows that every Llama GGUF has."""
TIED_BY = "output.weight"
ATTENTION_BIAS, MLP_BIAS = re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.bias"), re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.bias")
"""No key says that a model has biases: one of them means that all are there, which is checked with the other tensors."""


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[LlamaConfig, list[str]]:
    """The config, and the ``llama.*`` keys that no table knows.

    Args:
        metadata: plain values by GGUF key.
        tensors: GGUF tensor names; the embedding is tied where ``output.weight`` is not among them, biases are there or not. Values have a ``shape``.

    Raises:
        CheckpointError: another architecture, a missing key, or a value that changes the model and is not supported.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"GGUF: general.architecture is {architecture!r}; supported: 'llama'",
            hint="convert the checkpoint to the Llama architecture, or use the exporter of its own family",
        )
    keys = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    _refuse(keys)
    heads, hidden_size = _required(keys, "attention.head_count"), _required(keys, "embedding_length")
    context_length = _required(keys, "context_length")
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=_required(keys, "feed_forward_length"),
        num_hidden_layers=_required(keys, "block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_required(keys, "attention.head_count_kv") if "attention.head_count_kv" in keys else heads,
        head_dim=_head_dim(keys, hidden_size, heads),
        vocab_size=_vocab_size(metadata, keys, tensors),
        max_position_embeddings=context_length,
        rms_norm_eps=stored_number(keys, "attention.layer_norm_rms_epsilon"),
        rope_theta=stored_number(keys, "rope.freq_base", 10000.0),
        tie_word_embeddings=TIED_BY not in tensors,
        attention_bias=any(ATTENTION_BIAS.fullmatch(name) for name in tensors),
        mlp_bias=any(MLP_BIAS.fullmatch(name) for name in tensors),
        rope_scaling=gguf_rope.scaling_from_keys(keys, context_length),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
    )
    return config, sorted("llama." + key for key in keys.keys() - USED - REFUSED.keys() - HARMLESS)


def _refuse(keys: Mapping[str, Any]) -> None:
    for key, allowed in REFUSED.items():
        if key in keys and keys[key] not in allowed:
            raise CheckpointError(f"GGUF: llama.{key} = {keys[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}")


def _head_dim(keys: Mapping[str, Any], hidden_size: int, heads: int) -> int:
    if "attention.key_length" not in keys and (heads <= 0 or hidden_size % heads):
        raise CheckpointError(f"GGUF: embedding_length {hidden_size} is not a multiple of attention.head_count {heads}, and key_length is not given")
    head_dim = _required(keys, "attention.key_length") if "attention.key_length" in keys else hidden_size // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise CheckpointError(f"GGUF: llama.{key} = {keys[key]} differs from the head's {head_dim} dimensions; that is not supported")
    return head_dim


def _vocab_size(metadata: Mapping[str, Any], keys: Mapping[str, Any], tensors: Mapping[str, Any]) -> int:
    if "vocab_size" in keys:
        return _required(keys, "vocab_size")
    if "token_embd.weight" in tensors:
        return int(tensors["token_embd.weight"].shape[0])
    return len(metadata.get("tokenizer.ggml.tokens", ()))


def _required(keys: Mapping[str, Any], key: str) -> int:
    return integer(f"GGUF: llama.{key}", keys.get(key))
