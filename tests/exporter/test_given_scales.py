"""exporter/given_scales.py: the scales of a quantised checkpoint, kept as the weights have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from artifact.errors import ExportError
from artifact.given import GIVEN_FILE, SMALLEST_SCALE
from artifact.steps import StepContext
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.quantised_model import QuantisedCheckpoint
from exporter.given_scales import write_scales

PINNED = Path(__file__).parent / "checkpoints" / "quantised"
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def opened(path: Path) -> QuantisedCheckpoint:
    checkpoint = open_checkpoint(str(path))
    assert isinstance(checkpoint, QuantisedCheckpoint)
    return checkpoint


@pytest.mark.parametrize("name", ["w8a8-static", "w4a16-pack", "modelopt-w8a8"])
def test_scales_are_written_in_the_order_of_the_model(tmp_path: Path, name: str) -> None:
    checkpoint = opened(PINNED / name)
    write_scales(StepContext(tmp_path), checkpoint, "fp16")
    with safe_open(tmp_path / GIVEN_FILE, "np") as file:
        names = sorted(file.keys(), key=lambda key: json.loads(header(tmp_path / GIVEN_FILE))[key]["data_offsets"])
        assert [key for key in names if key.endswith("weight_scale")] == [f"{module}.weight_scale" for module in checkpoint.usable]
        assert any(key.endswith("input_scale") for key in names) == (checkpoint.given.activations == "static")
        for module in checkpoint.usable:
            expected = checkpoint.scales(module, 0, checkpoint.linears[module].shape[0]).numpy()
            assert np.array_equal(file.get_tensor(f"{module}.weight_scale"), expected)


def header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_input_scale_is_the_checkpoints(tmp_path: Path) -> None:
    write_scales(StepContext(tmp_path), opened(PINNED / "w8a8-static"), "fp16")
    stored = load_file(PINNED / "w8a8-static" / "model.safetensors")[f"{Q}.input_scale"]
    with safe_open(tmp_path / GIVEN_FILE, "pt") as file:
        assert torch.equal(file.get_tensor(f"{Q}.input_scale"), stored.float())


def test_rows_that_take_a_pre_quant_scale_take_it_into_their_scales(tmp_path: Path) -> None:
    checkpoint = opened(PINNED / "modelopt-w8a8")
    up = "model.layers.0.mlp.up_proj"
    factor = load_file(PINNED / "modelopt-w8a8" / "model.safetensors")["model.layers.0.mlp.down_proj.pre_quant_scale"].float()
    scales, levels = checkpoint.scales(up, 0, 64), checkpoint.linears[up].levels(0, 64).float()
    assert torch.equal(scales, checkpoint.linears[up].scales(0, 64) * factor[:, None])
    assert torch.allclose(checkpoint.read(f"{up}.weight"), levels * scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_scale_too_small_for_float16_is_refused_unless_its_row_is_zero(tmp_path: Path, dtype: str) -> None:
    folder = Path(shutil.copytree(PINNED / "w8a16-naive", tmp_path / "small"))
    tensors = load_file(folder / "model.safetensors")
    scale = tensors[f"{V}.weight_scale"].float()
    scale[3], scale[5] = SMALLEST_SCALE / 2, SMALLEST_SCALE / 2
    tensors[f"{V}.weight"][5] = 0
    tensors[f"{V}.weight"][3] = torch.arange(32, dtype=torch.int8)
    save_file(tensors | {f"{V}.weight_scale": scale}, folder / "model.safetensors")
    if dtype == "fp32":
        write_scales(StepContext(tmp_path), opened(folder), "fp32")
        return
    with pytest.raises(ExportError, match=rf"{V}: a scale of row 3 is 1\.19e-07, too small for float16 weights") as caught:
        write_scales(StepContext(tmp_path), opened(folder), "fp16")
    assert caught.value.hint == "export with --dtype fp32"
    tensors[f"{V}.weight"][3] = 0
    save_file(tensors | {f"{V}.weight_scale": scale}, folder / "model.safetensors")
    write_scales(StepContext(tmp_path), opened(folder), "fp16")
