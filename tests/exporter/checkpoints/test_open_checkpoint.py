from __future__ import annotations

from pathlib import Path

import pytest

from artifact.errors import CheckpointError
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.protocol import folder_name


def test_open_checkpoint_says_what_it_accepts_when_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder") as caught:
        open_checkpoint(str(tmp_path / "nothing"))
    assert all(word in (caught.value.hint or "") for word in ("config.json", ".gguf", "demo"))


def test_open_checkpoint_refuses_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
        open_checkpoint(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_open_checkpoint_hints_at_the_folder_of_a_single_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="a single file") as caught:
        open_checkpoint(str(tmp_path / name))
    assert str(tmp_path) in (caught.value.hint or "")


def test_open_checkpoint_hints_at_the_gguf_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="GGUF files") as caught:
        open_checkpoint(str(tmp_path))
    assert str(tmp_path / "x.gguf") in (caught.value.hint or "")


@pytest.mark.parametrize(("text", "name"), [("Llama 2 (7B)", "llama-2-7b"), ("..", "model"), ("../../etc", "etc"), ("SmolLM2.Q4_1", "smollm2.q4_1")])
def test_folder_name_is_safe(text: str, name: str) -> None:
    assert folder_name(text) == name
