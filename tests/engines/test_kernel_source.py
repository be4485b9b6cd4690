"""engines/kernel_source.py: the CUDA text in a plan is counted piece by piece, and nothing else is."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from engines.kernel_source import FIRST_LINE, KernelSource, read_kernel_sources, source_bytes

SOURCE = FIRST_LINE + b"extern __global__ void kernel_0x1f() {}\n"


def piece(source: bytes, *, zero: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<II", zero, len(source) if length is None else length) + source


def plan(folder: Path, *pieces: bytes) -> Path:
    path = folder / "part-00.plan"
    path.write_bytes(b"weights" + b"more weights".join(pieces) + b"end")
    return path


def test_every_piece_counts_with_its_recorded_length(tmp_path: Path) -> None:
    assert source_bytes(read_kernel_sources(plan(tmp_path, piece(SOURCE), piece(SOURCE * 2)))) == 3 * len(SOURCE)


@pytest.mark.parametrize(
    "unknown",
    [piece(SOURCE, zero=1), piece(SOURCE, length=1 << 30), piece(SOURCE, length=3), SOURCE[:-1]],
    ids=["no zero before it", "longer than the file", "shorter than its first line", "no length"],
)
def test_what_is_not_recognised_is_not_counted(tmp_path: Path, unknown: bytes) -> None:
    assert source_bytes(read_kernel_sources(plan(tmp_path, unknown, piece(SOURCE)))) == len(SOURCE)


def test_plan_without_source_has_none(tmp_path: Path) -> None:
    assert source_bytes(read_kernel_sources(plan(tmp_path, b"only weights"))) == 0


def test_equal_texts_are_one_with_its_copies(tmp_path: Path) -> None:
    other = FIRST_LINE + b"extern __global__ void __launch_bounds__(512) _gemv_mha_v1_0x2e_vec(int* a) {}\n"
    found = read_kernel_sources(plan(tmp_path, piece(SOURCE), piece(other), piece(SOURCE), piece(SOURCE)))
    assert found == [KernelSource("kernel", len(SOURCE), 3), KernelSource("_gemv_mha_v1", len(other), 1)]


def test_text_without_a_kernel_has_no_name(tmp_path: Path) -> None:
    assert [source.kernel for source in read_kernel_sources(plan(tmp_path, piece(FIRST_LINE + b"headers")))] == [""]
