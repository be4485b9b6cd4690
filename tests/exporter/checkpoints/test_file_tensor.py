from __future__ import annotations

from pathlib import Path

import pytest
import torch

from artifact.errors import CheckpointError
from exporter.checkpoints.file_tensor import FileTensor

ROWS, COLUMNS = 4096, 2048


@pytest.fixture
def stored(tmp_path: Path) -> FileTensor:
    """16 MiB of float16 behind ten bytes of something else."""
    path = tmp_path / "x"
    path.write_bytes(b"0123456789" + torch.arange(ROWS * COLUMNS).remainder(2039).half().numpy().tobytes())
    return FileTensor.contiguous(path, "F16", (ROWS, COLUMNS), 10, ROWS * COLUMNS * 2)


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_read_rows_gives_the_rows_and_leaves_nothing_of_the_file_mapped(stored: FileTensor) -> None:
    whole = torch.arange(ROWS * COLUMNS).remainder(2039).half().reshape(ROWS, COLUMNS)
    rows = stored.read_rows(17, 1025)
    assert torch.equal(rows, whole[17:1025])
    assert rows.untyped_storage().nbytes() == (1025 - 17) * COLUMNS * 2
    assert torch.equal(stored.read(), whole)
    assert not mapped(stored.path)


def test_read_rows_of_no_row_is_empty(stored: FileTensor) -> None:
    assert stored.read_rows(5, 5).shape == (0, COLUMNS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_read_rows_follows_the_strides_of_a_slice_and_of_a_transposed_view(tmp_path: Path, dtype: torch.dtype) -> None:
    word = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    whole = torch.arange(60).to(dtype).reshape(6, 10)
    (tmp_path / "x").write_bytes(whole.view(torch.uint8).numpy().tobytes())
    for view in (whole[:, 3:7], whole.t(), whole[2:].t(), whole[:, 4:5], whole[1:2]):
        where = FileTensor(tmp_path / "x", word, tuple(view.shape), view.storage_offset() * dtype.itemsize, 0, view.stride())
        assert torch.equal(where.read(), view)
        assert torch.equal(where.read_rows(1, len(view)), view[1:])


def test_read_rows_says_where_a_file_ends_that_has_become_shorter(stored: FileTensor) -> None:
    stored.path.write_bytes(stored.path.read_bytes()[:-6])
    with pytest.raises(CheckpointError, match=rf"^x: the file ends at byte {10 + ROWS * COLUMNS * 2 - 6:,}, within a tensor$"):
        stored.read_rows(ROWS - 2, ROWS)
