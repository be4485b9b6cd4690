"""Giving back pages of mapped files: the values stay, the memory goes."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from artifact.mapped import forget

PAGES = 64


def resident() -> int:
    """Bytes of mapped files in this process's memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("skipped", [0, 100])
def test_pages_are_given_back_and_read_again(tmp_path: Path, skipped: int) -> None:
    path = tmp_path / "values"
    expected = np.arange(PAGES * 4096 * 4, dtype=np.float16) + 1
    expected.tofile(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        values = np.frombuffer(mapped, np.float16)[skipped:].reshape(4, -1)
        assert float(values.astype(np.float32).max()) > 0
        before = resident()
        forget(values[1:3])
        assert before - resident() >= values[1:3].nbytes - (64 << 10)
        np.testing.assert_array_equal(values.reshape(-1), expected[skipped:])
        del values


def test_what_is_not_mapped_is_left() -> None:
    values = np.ones((4, 4096), np.float32)
    forget(values)
    forget(values[:, :7])
    assert (values == 1).all()
