from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from artifact.errors import ValidationError
from validation import spill
from validation.spill import Spill


def test_kept_arrays_are_what_was_given_and_in_no_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "BLOCK", 1000)
    place, rng = Spill(tmp_path), np.random.default_rng(0)
    given = [
        rng.standard_normal(shape).astype(dtype) for shape, dtype in (((3, 5), "f2"), ((0, 4), "f4"), ((7,), "f4"), ((40, 40), "f2"), ((9,), "f8"))
    ]
    kept = [place.keep(array) for array in given]
    for ours, theirs in zip(kept, given, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert list(tmp_path.iterdir()) == []


def test_kept_arrays_are_not_in_anonymous_memory(tmp_path: Path) -> None:
    place, array = Spill(tmp_path), np.ones(8 << 20)
    before = anonymous()
    kept = [place.keep(array) for _ in range(3)]
    assert anonymous() - before < array.nbytes
    assert sum(float(one[-1]) for one in kept) == 3


def anonymous() -> int:
    """Bytes of this process's own memory that no file backs."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def test_a_full_disk_is_an_error_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(ValidationError, match="can't be kept on disk: No space left on device") as caught:
        Spill(tmp_path).keep(np.ones(3))
    assert caught.value.hint == f"make room on the disk of {tmp_path}"
