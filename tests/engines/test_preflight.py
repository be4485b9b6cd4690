"""engines/preflight.py: the bounds cover what was measured, and a lack is refused with numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from artifact.errors import EngineError
from engines.preflight import check_room, memory_needed, plan_size

MEASURED = [  # weights MB, layers, peak anonymous MB, plan MB: packed graphs, TensorRT-RTX 1.7.1, two profiles
    (269, 30, 809, 290),
    (163, 30, 846, 202),
    (326, 30, 803, 345),
    (880, 2, 1088, 881),
    (13_476, 32, 13_300, 13_497),
    (13_339, 40, 13_400, 13_386),
]


@pytest.mark.parametrize(("weights", "layers", "peak", "plan"), MEASURED)
def test_bounds_hold_and_are_not_wild(weights: int, layers: int, peak: int, plan: int) -> None:
    memory, disk = memory_needed(weights * 10**6, layers, packed=True) / 1e6, plan_size(weights * 10**6, layers, packed=True) / 1e6
    assert peak <= memory <= 1.35 * peak
    assert plan <= disk <= 1.3 * plan


def test_unpacked_graphs_need_more() -> None:
    assert memory_needed(10**9, 2, packed=False) > 1.5 * memory_needed(10**9, 2, packed=True)
    assert plan_size(10**9, 2, packed=False) > 1.5 * plan_size(10**9, 2, packed=True)


def test_refuses_too_little_memory_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 10**9))
    with pytest.raises(EngineError, match=r"about 14\.9 GB of memory, 8\.0 GB are free") as error:
        check_room(tmp_path, 13_476 * 10**6, 32, packed=True)
    assert error.value.hint


def test_refuses_a_full_disk_where_the_folder_is_still_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    with pytest.raises(EngineError, match=r"about 0\.3 GB of disk, .* has 0\.1 GB free"):
        check_room(tmp_path / "engines" / "a100", 269 * 10**6, 30, packed=True)


def test_passes_where_there_is_room(tmp_path: Path) -> None:
    check_room(tmp_path / "engines", 10**6, 1, packed=True)
