from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_checkpoint, open_request

Writer = Callable[..., Path]


def assert_rows_are_the_whole(checkpoint: Checkpoint, *paths: Path) -> None:
    kept = []
    for name, shape in checkpoint.shapes.items():
        whole, rows = checkpoint.read(name), shape[0]
        for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 3 + 5), (3, 3)):
            piece = checkpoint.read_rows(name, start, stop)
            assert torch.equal(piece, whole[start:stop]), (name, start, stop)
            assert piece.dtype == whole.dtype
            kept.append(piece)
    mapped = Path("/proc/self/maps").read_text()
    assert not any(str(path) in mapped for path in paths)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("source", ["write_folder", "write_bin"])
def test_read_rows_of_a_huggingface_folder(request: pytest.FixtureRequest, source: str, shards: int) -> None:
    folder = request.getfixturevalue(source)(shards=shards)
    assert_rows_are_the_whole(open_checkpoint(str(folder)), folder)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_read_rows_of_a_gguf_file(write_gguf: Writer, kind: str) -> None:
    path = write_gguf(kind=kind)
    assert_rows_are_the_whole(open_checkpoint(str(path)), path)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_read_rows_of_a_meta_folder(write_meta: Writer, parts: int) -> None:
    folder = write_meta(parts=parts)
    assert_rows_are_the_whole(open_checkpoint(str(folder)), folder)


def test_read_rows_of_random_weights_and_of_a_merged_adapter(
    write_adapter: Writer, config: LlamaConfig, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    names = [f"model.layers.{layer}.{module}" for layer in range(2) for module in ("self_attn.q_proj", "mlp.down_proj")]
    pairs = {f"base_model.model.{name}.lora_A.weight": torch.randn(4, weights[f"{name}.weight"].shape[1]) for name in names}
    pairs |= {f"base_model.model.{name}.lora_B.weight": torch.randn(weights[f"{name}.weight"].shape[0], 4) for name in names}
    for lora in (None, write_adapter(pairs)):
        assert_rows_are_the_whole(open_request(CheckpointRequest("random", config=tmp_path / "config.json", lora=lora)), tmp_path)
