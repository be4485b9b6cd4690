"""The same benchmark checkpoint in the other formats. Rows of q and k stay where they are: memory does not depend on their order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

META_PARTS = 8
META_NAMES = {  # Hugging Face module → Meta's, and the axis that its parts split
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0), "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1), "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1), "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "model.embed_tokens": ("tok_embeddings", 1), "model.norm": ("norm", None), "lm_head": ("output", 0),
}  # fmt: skip
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def as_safetensors(source: Path, out: Path) -> Path:
    """The folder itself."""
    del out
    return source


def as_bin(source: Path, out: Path) -> Path:
    """One pytorch_model.bin."""
    out.mkdir()
    (out / "config.json").write_text((source / "config.json").read_text())
    torch.save(dict(_tensors(source)), out / "pytorch_model.bin")
    return out


def as_meta(source: Path, out: Path) -> Path:
    """Eight model-parallel parts and params.json."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    tensors = dict(_tensors(source))
    for part in range(META_PARTS):
        torch.save({_meta_name(name): _meta_part(name, tensor, part) for name, tensor in tensors.items()}, out / f"consolidated.{part:02d}.pth")
    params = {"dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"]}
    params |= {"n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"], "vocab_size": -1}
    (out / "params.json").write_text(json.dumps(params))
    return out


def as_gguf(source: Path, out: Path) -> Path:
    """One GGUF file of F16 matrices and F32 norms."""
    config = json.loads((source / "config.json").read_text())
    path = out.with_suffix(".gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in _tensors(source):
        layer, module = _split(name)
        stored = f"{f'blk.{layer}.' if layer is not None else ''}{GGUF_NAMES[module]}.weight"
        writer.add_tensor(stored, (tensor.float() if tensor.ndim == 1 else tensor).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


FORMATS: dict[str, Callable[[Path, Path], Path]] = {"safetensors": as_safetensors, ".bin": as_bin, "Meta, 8 parts": as_meta, "GGUF F16": as_gguf}


def _tensors(source: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(source.glob("*.safetensors")):
        yield from load_file(path).items()


def _split(name: str) -> tuple[str | None, str]:
    parts = name.removesuffix(".weight").split(".")
    return (parts[2], ".".join(parts[3:])) if parts[:2] == ["model", "layers"] else (None, ".".join(parts))


def _meta_name(name: str) -> str:
    layer, module = _split(name)
    return f"{f'layers.{layer}.' if layer is not None else ''}{META_NAMES[module][0]}.weight"


def _meta_part(name: str, tensor: Tensor, part: int) -> Tensor:
    axis = META_NAMES[_split(name)[1]][1]
    return tensor if axis is None else tensor.chunk(META_PARTS, dim=axis)[part].clone()
