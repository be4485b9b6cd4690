"""One tiny float16 model in every format: the artifact is the same, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.layout import tensor_shapes
from artifact.manifest import read_manifest
from commands.export import ExportOptions, export
from exporter.checkpoints import CheckpointRequest

Writer = Callable[..., Path]
FORMATS = {"sharded": "safetensors", "bin": "bin", "sharded-bin": "bin", "meta-1": "meta", "meta-2": "meta", "meta-8": "meta", "gguf": "gguf"}


@pytest.fixture
def wide(config: LlamaConfig) -> LlamaConfig:
    """Grouped-query attention that eight parts can share: one key-value head each."""
    return replace(config, hidden_size=64, intermediate_size=96, num_attention_heads=16, num_key_value_heads=8, head_dim=4)


@pytest.fixture
def half(wide: LlamaConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).mul(0.2).add(len(shape) == 1).half() for name, shape in tensor_shapes(wide).items()}


def exported(source: Path, out: Path) -> dict[str, str]:
    export(CheckpointRequest(str(source)), out, ExportOptions())
    files = [out / "traced.onnx", *sorted((out / "weights").iterdir())]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.trace
def test_every_format_of_a_model_exports_to_the_same_bytes(
    write_folder: Writer,
    write_bin: Writer,
    write_meta: Writer,
    write_gguf: Writer,
    wide: LlamaConfig,
    half: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    hugging = {"config": wide.to_hf(), "tensors": half}
    context = {"max_seq_len": wide.max_position_embeddings}
    norms = {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in half.items()}
    sources = {
        "sharded": write_folder(**hugging, shards=3, name="sharded"),
        "bin": write_bin(**hugging, name="bin"),
        "sharded-bin": write_bin(**hugging, shards=3, name="sharded-bin"),
        "gguf": write_gguf(tensors=norms, kind="F16", config=wide),
        **{f"meta-{n}": write_meta(parts=n, tensors=half, config=wide, params=context, name=f"meta-{n}") for n in (1, 2, 8)},
    }
    expected = exported(write_folder(**hugging, name="one"), tmp_path / "out-one")
    assert len(expected) == 2 + 1 + wide.num_hidden_layers + 1  # graph, checksums, shared, layers, rotary
    for name, source in sources.items():
        assert exported(source, tmp_path / f"out-{name}") == expected, name
        model = read_manifest(tmp_path / f"out-{name}")["model"]
        assert model["format"] == FORMATS[name]
        assert model["config"] == read_manifest(tmp_path / "out-one")["model"]["config"]
