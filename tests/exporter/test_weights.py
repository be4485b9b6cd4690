"""exporter/weights.py: streamed, converted, checked, hashed, and laid out so that packing is a wider view of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from artifact.errors import ExportError
from artifact.layout import tensor_shapes
from artifact.steps import StepContext
from artifact.tensor_file import read_checksums
from exporter.checkpoints import open_checkpoint
from exporter.rope import rotary_tables
from exporter.weights import ROTARY_COS, plan_weights, write_weights


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
