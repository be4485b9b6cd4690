from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exporter.checkpoints import Checkpoint, open_checkpoint


def assert_rows_are_the_whole(checkpoint: Checkpoint) -> None:
    for name, shape in checkpoint.shapes.items():
        whole, rows = checkpoint.read(name), shape[0]
        for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 3 + 5)):
            piece = checkpoint.read_rows(name, start, stop)
            assert torch.equal(piece, whole[start:stop]), (name, start, stop)
            assert piece.dtype == whole.dtype


def test_read_rows_of_a_huggingface_folder(tiny_checkpoint: Path) -> None:
    assert_rows_are_the_whole(open_checkpoint(str(tiny_checkpoint)))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_read_rows_of_a_gguf_file(write_gguf: Callable[..., Path], kind: str) -> None:
    assert_rows_are_the_whole(open_checkpoint(str(write_gguf(kind=kind))))
