"""exporter/weights.py: streamed, converted, checked, hashed, and laid out so that packing is a wider view of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from artifact.config import LlamaConfig
from artifact.errors import ExportError
from artifact.io_spec import Dtype
from artifact.layout import tensor_shapes
from artifact.steps import StepContext
from artifact.tensor_file import read_checksums
from exporter.blocks import ROW_BYTES
from exporter.checkpoints import open_checkpoint
from exporter.rope import rotary_tables
from exporter.weights import ROTARY_COS, ROTARY_SIN, plan_weights, rotary_blocks, write_weights


def test_written_weights_are_the_checkpoints(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    stored = {tensor.name: tensor for tensor in write_weights(StepContext(tmp_path), checkpoint, "fp16")}
    assert read_checksums(tmp_path) == stored
    for name in tensor_shapes(checkpoint.config):
        raw = (tmp_path / stored[name].file).read_bytes()[stored[name].offset :][: stored[name].length]
        assert blake3(raw).hexdigest() == stored[name].blake3
        with safe_open(tmp_path / stored[name].file, "np") as file:
            assert np.array_equal(file.get_tensor(name), checkpoint.read(name).numpy())


def test_packed_projections_lie_side_by_side(tiny_checkpoint: Path) -> None:
    plan = plan_weights(open_checkpoint(str(tiny_checkpoint)).config, "fp16")
    for layer in range(2):
        by_name = {tensor.name.split(f"layers.{layer}.")[1]: tensor for tensor in plan[f"weights/layer-{layer:03d}.safetensors"][1]}
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            room = "self_attn" if "q_proj" in names else "mlp"
            parts = [by_name[f"{room}.{name}.weight"] for name in names]
            assert all(left.offset + left.length == right.offset for left, right in pairwise(parts))


def test_rotary_tables_are_stored_as_the_model_uses_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    write_weights(StepContext(tmp_path), checkpoint, "fp16")
    with safe_open(tmp_path / "weights" / "rotary.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(ROTARY_COS), rotary_tables(checkpoint.config, torch.float16)[0])


@pytest.mark.parametrize(("dtype", "word"), [(torch.float16, "fp16"), (torch.float32, "fp32")])
def test_rotary_tables_are_made_some_positions_at_a_time(tiny_checkpoint: Path, dtype: torch.dtype, word: Dtype) -> None:
    config = replace(open_checkpoint(str(tiny_checkpoint)).config, head_dim=128, max_position_embeddings=50_001)
    for name, table in zip((ROTARY_COS, ROTARY_SIN), rotary_tables(config, dtype), strict=True):
        blocks = [bytes(block) for block in rotary_blocks(config, word, name)]
        assert len(blocks) > 1
        assert max(map(len, blocks)) <= ROW_BYTES
        assert b"".join(blocks) == bytes(table.numpy().data.cast("B"))


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        (
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1e5, "original_max_position_embeddings": 32},
            r"rotary_emb\.cos: .* overflow fp16 \(largest 100000",
        ),
        ({"rope_type": "linear", "factor": 1e-39}, r"rotary_emb\.cos: .* are NaN or Inf as the config's rope scaling gives them"),
    ],
)
def test_rotary_tables_that_are_no_numbers_are_refused(tiny_checkpoint: Path, tmp_path: Path, scaling: dict[str, Any], reason: str) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    config = LlamaConfig.from_hf(checkpoint.config.to_hf() | {"rope_parameters": scaling | {"rope_theta": 10000.0}})
    with pytest.raises(ExportError, match=reason):
        write_weights(StepContext(tmp_path), replace(checkpoint, config=config), "fp16")  # type: ignore[type-var]
    assert not (tmp_path / "weights" / "rotary.safetensors").exists()


def test_nothing_that_looks_whole_is_left_when_a_tensor_is_bad(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of"):
        write_weights(StepContext(tmp_path / "out"), open_checkpoint(str(folder)), "fp16")
    assert not (tmp_path / "out" / "weights" / "layer-001.safetensors").exists()
    assert not (tmp_path / "out" / "weights" / "checksums.json").exists()
    assert not list((tmp_path / "out").rglob(".llama2trt-*"))
