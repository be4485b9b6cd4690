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
        config: LlamaConfig = CONFIG,
        quantize: Callable[..., Any] = gguf.quants.quantize,
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in (default_metadata(config) | (metadata or {})).items():
            _add(writer, f"{architecture}.{key}", value)
        ids = {"tokenizer.ggml.bos_token_id": CONFIG.bos_token_id, "tokenizer.ggml.eos_token_id": CONFIG.eos_token_id}
        for key, value in (ids | (tokenizer or {})).items():
            _add(writer, key, value)
        for tensor, values in (weights if tensors is None else tensors).items():
            array = values.numpy()
            if tensor.split(".")[-2] in ("q_proj", "k_proj"):
                array = interleave(array, config.head_dim)
            stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else gguf.GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(tensor), quantize(array, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


def default_metadata(config: LlamaConfig) -> dict[str, Any]:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)


@pytest.fixture
def write_bin(tmp_path: Path, weights: dict[str, Tensor]) -> Callable[..., Path]:
    """``write_bin(config=…, tensors=…, shards=…)``: a Hugging Face folder with pytorch_model*.bin."""

    def write(config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None, shards: int = 1, name: str = "Tiny bin") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tensors = weights if tensors is None else tensors
        (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() if config is None else config))
        if shards == 1:
            torch.save(tensors, folder / "pytorch_model.bin")
            return folder
        weight_map = {tensor: f"pytorch_model-{1 + index % shards:05d}-of-{shards:05d}.bin" for index, tensor in enumerate(tensors)}
        for file in set(weight_map.values()):
            torch.save({tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


META_NAMES = {
    "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
"""Hugging Face's module → Meta's, and the axis that model-parallel parts split."""


def meta_name(name: str) -> tuple[str, int | None]:
    """`model.layers.1.self_attn.q_proj.weight` → `layers.1.attention.wq.weight`, 0."""
    parts = name.removesuffix(".weight").split(".")
    layer = f"layers.{parts[2]}." if parts[:2] == ["model", "layers"] else ""
    module, axis = META_NAMES[".".join(parts[3:]) if layer else name.removesuffix(".weight")]
    return f"{layer}{module}.weight", axis


def default_params(config: LlamaConfig) -> dict[str, Any]:
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }


@pytest.fixture
def write_meta(tmp_path: Path, weights: dict[str, Tensor]) -> Callable[..., Path]:
    """``write_meta(parts=…, params=…, tensors=…)``: a Meta folder; params replace keys, None leaves one out; embedding_axis 0 is Llama 3's."""

    def write(
        parts: int = 1,
        params: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
        config: LlamaConfig = CONFIG,
        embedding_axis: int = 1,
        name: str = "Tiny meta",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        held: list[dict[str, Tensor]] = [{"rope.freqs": torch.arange(4.0)} for _ in range(parts)]
        for tensor, values in (weights if tensors is None else tensors).items():
            stored, axis = meta_name(tensor)
            axis = embedding_axis if stored == "tok_embeddings.weight" else axis
            rotated = tensor.endswith(("q_proj.weight", "k_proj.weight"))
            whole = torch.from_numpy(interleave(values.float().numpy(), config.head_dim)).to(values.dtype) if rotated else values
            for index, part in enumerate(held):
                part[stored] = whole if axis is None else whole.chunk(parts, dim=axis)[index].clone()
        for index, part in enumerate(held):
            torch.save(part, folder / f"consolidated.{index:02d}.pth")
        given = default_params(config) | (params or {})
        (folder / "params.json").write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
        return folder

    return write


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """``write_adapter(tensors, config=…)``: a PEFT folder; config replaces keys, None leaves one out."""

    def write(tensors: dict[str, Tensor], config: dict[str, Any] | None = None, kind: str = "safetensors", name: str = "adapter") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"} | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
        if kind == "safetensors":
            save_file(tensors, folder / "adapter_model.safetensors")
        else:
            torch.save(tensors, folder / "adapter_model.bin")
        return folder

    return write
