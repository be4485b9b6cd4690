"""Checkpoints for the benchmarks: real widths, random float16 weights of a sane scale, one safetensors file a layer."""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from artifact.config import LlamaConfig  # noqa: E402
from artifact.layout import tensor_shapes  # noqa: E402

BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16",
}  # fmt: skip
SHAPES = {  # hidden, ffn, layers, heads, kv heads
    "1.1b": (2048, 5632, 22, 32, 4),
    "3.4b": (3200, 8640, 26, 32, 32),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
BLOCK_VALUES = 1 << 23


def config_of(size: str, layers: int | None = None) -> dict[str, object]:
    """config.json of a size; fewer layers where ``layers`` says so."""
    config = BASE | dict(zip(KEYS, SHAPES[size], strict=True))
    return config | ({} if layers is None else {"num_hidden_layers": layers})


def write_checkpoint(folder: Path, config: dict[str, object], dtype: str = "F16") -> int:
    """Write a Hugging Face folder, a block in memory at a time; returns the bytes of its weights.

    ``dtype`` is F16, or BF16 (the upper half of float32's bits).
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(LlamaConfig.from_hf(dict(config)))
    files: dict[str, str] = {name: _file(name) for name in shapes}
    noise = np.random.default_rng(0).standard_normal(BLOCK_VALUES, np.float32)
    for file in dict.fromkeys(files.values()):
        _write_file(folder / file, {name: shapes[name] for name in shapes if files[name] == file}, noise, dtype)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sum(2 * prod(shape) for shape in shapes.values())


def _file(name: str) -> str:
    layer = name.split(".")[2] if name.startswith("model.layers.") else "shared"
    return f"model-{layer}.safetensors"


def _write_file(path: Path, shapes: dict[str, tuple[int, ...]], noise: np.ndarray, dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + 2 * prod(shape)]}
        position += 2 * prod(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            scaled = 1 + 0.1 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
            values = scaled.astype(np.float16) if dtype == "F16" else (scaled.view(np.uint32) >> 16).astype(np.uint16)
            for start in range(0, prod(shape), BLOCK_VALUES):
                file.write(values[: min(BLOCK_VALUES, prod(shape) - start)])
