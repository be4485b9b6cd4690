"""Giving back pages of mapped files: the values stay, the memory goes."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from artifact.mapped import forget

PAGES = 64
SMAPS = Path("/proc/self/smaps")


def resident(path: Path) -> int:
    """Bytes of a mapped file in this process's memory."""
    lines = SMAPS.read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return int(next(line for line in lines[begin:] if line.startswith("Rss:")).split()[1]) * 1024


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not say what is resident")
@pytest.mark.parametrize("skipped", [0, 100])
def test_pages_are_given_back_and_read_again(tmp_path: Path, skipped: int) -> None:
    path = tmp_path / "values"
    expected = np.arange(PAGES * 4096 * 4, dtype=np.float16) + 1
    expected.tofile(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        values = np.frombuffer(mapped, np.float16)[skipped:].reshape(4, -1)
        assert float(values.astype(np.float32).max()) > 0
        before = resident(path)
        forget(values[1:3])
        assert before - resident(path) >= values[1:3].nbytes - 2 * mmap.PAGESIZE
        np.testing.assert_array_equal(values.reshape(-1), expected[skipped:])
        del values


def test_what_was_written_into_a_private_mapping_is_left(tmp_path: Path) -> None:
    path = tmp_path / "values"
    np.zeros(4 * 4096, np.float32).tofile(path)
    values = np.memmap(path, np.float32, mode="c")
    values[:] = 1
    forget(values)
    assert (values == 1).all()


def test_what_is_not_mapped_is_left() -> None:
    values = np.ones((4, 4096), np.float32)
    forget(values)
    forget(values[:, :7])
    assert (values == 1).all()
