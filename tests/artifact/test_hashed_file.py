"""artifact/hashed_file.py: whatever the sizes of the blocks, the file holds them one after the other."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from artifact import hashed_file
from artifact.hashed_file import HashedFile

SIZES = [(), (1,), (4096,), (4095, 1), (1, 8 << 20, 3), ((8 << 20) - 1, 1, 1), (5_000_001, 5_000_003, 20_000_017)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_file_is_its_blocks_one_after_the_other(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    blocks, digest = [os.urandom(size) for size in sizes], hashlib.sha256()
    with HashedFile(tmp_path / "file") as file:
        for block in blocks:
            file.write(memoryview(block), digest.update)
        file.wait()
    content = b"".join(blocks)
    assert (tmp_path / "file").read_bytes() == content
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()


def test_file_system_without_direct_writes_gets_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed_file.os, "O_DIRECT", 0)
    with HashedFile(tmp_path / "file") as file:
        file.write(memoryview(b"abc"))
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_direct_write_that_is_cut_short_is_finished_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, pwrite, calls = os.urandom(9 << 20), os.pwrite, []

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        return pwrite(descriptor, data[:8192], offset) - 1000 if len(calls) == 1 else pwrite(descriptor, data, offset)

    monkeypatch.setattr(hashed_file.os, "pwrite", short)
    with HashedFile(tmp_path / "file") as file:
        file.write(memoryview(content))
    assert calls[1] == 7192
    assert (tmp_path / "file").read_bytes() == content


def test_error_of_the_writing_thread_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hashed_file.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), HashedFile(tmp_path / "file") as file:
        file.write(memoryview(b"abc"))
