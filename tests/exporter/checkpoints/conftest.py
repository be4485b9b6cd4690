"""A tiny Llama with formula weights, and writers of it in each format, independent of the readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.layout import tensor_shapes

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=96,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def config() -> LlamaConfig:
    return CONFIG


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """float32 values that differ everywhere and are exact in float16."""
    return formula_weights(CONFIG)


@pytest.fixture
def biased_weights() -> dict[str, Tensor]:
    """The same model with all biases that a Llama can have."""
    return formula_weights(replace(CONFIG, attention_bias=True, mlp_bias=True))


def formula_weights(config: LlamaConfig) -> dict[str, Tensor]:
    return {
        name: ((torch.arange(np.prod(shape)) * 7919 + 31 * seed) % 2039 - 1019).div(1024).reshape(shape)
        for seed, (name, shape) in enumerate(tensor_shapes(config).items())
    }


@pytest.fixture
def write_folder(tmp_path: Path, weights: dict[str, Tensor]) -> Callable[..., Path]:
    """``write_folder(config=…, tensors=…, shards=…)``: a Hugging Face folder."""

    def write(config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None, shards: int = 1, name: str = "Tiny Llama") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tensors = weights if tensors is None else tensors
        (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() if config is None else config))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        weight_map = {tensor: f"model-{1 + index % shards:05d}-of-{shards:05d}.safetensors" for index, tensor in enumerate(tensors)}
        for file in set(weight_map.values()):
            save_file({tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


def gguf_name(name: str) -> str:
    """`model.layers.1.self_attn.q_proj.weight` → `blk.1.attn_q.weight`; another name stays."""
    *parts, kind = name.split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:])]}.{kind}"
    return f"{GGUF_NAMES[name.removesuffix('.weight')]}.weight" if name.removesuffix(".weight") in GGUF_NAMES else name


def interleave(weight: np.ndarray[Any, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k, row by row: [heads·D, in] or a bias [heads·D], row i + j·D/2 of a head goes to row 2i + j."""
    output = np.empty_like(weight)
    for row in range(len(weight)):
        head, place = divmod(row, head_dim)
        j, i = divmod(place, head_dim // 2)
        output[head * head_dim + 2 * i + j] = weight[row]
    return output


@pytest.fixture
def write_gguf(tmp_path: Path, weights: dict[str, Tensor]) -> Callable[..., Path]:
    """``write_gguf(tensors=…, kind=…, metadata=…)``: a GGUF file; metadata replaces keys after ``llama.``, None leaves one out."""

    def write(
        tensors: dict[str, Tensor] | None = None,
        kind: str = "F32",
        metadata: dict[str, Any] | None = None,
        architecture: str = "llama",
        tokenizer: dict[str, Any] | None = None,
        name: str = "tiny.gguf",
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in (default_metadata() | (metadata or {})).items():
            _add(writer, f"{architecture}.{key}", value)
        ids = {"tokenizer.ggml.bos_token_id": CONFIG.bos_token_id, "tokenizer.ggml.eos_token_id": CONFIG.eos_token_id}
        for key, value in (ids | (tokenizer or {})).items():
            _add(writer, key, value)
        for tensor, values in (weights if tensors is None else tensors).items():
            array = values.numpy()
            if tensor.split(".")[-2] in ("q_proj", "k_proj"):
                array = interleave(array, CONFIG.head_dim)
            stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(tensor), gguf.quants.quantize(array, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


def default_metadata() -> dict[str, Any]:
    return {
        "block_count": CONFIG.num_hidden_layers,
        "context_length": CONFIG.max_position_embeddings,
        "embedding_length": CONFIG.hidden_size,
        "feed_forward_length": CONFIG.intermediate_size,
        "attention.head_count": CONFIG.num_attention_heads,
        "attention.head_count_kv": CONFIG.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": CONFIG.rms_norm_eps,
        "rope.dimension_count": CONFIG.head_dim,
        "rope.freq_base": CONFIG.rope_theta,
        "vocab_size": CONFIG.vocab_size,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
