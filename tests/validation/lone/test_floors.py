"""A floor is measured once; a damaged or renamed file is measured again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from artifact.steps import StepContext
from validation.floor import no_floor
from validation.lone import floors
from validation.reference import Reference

IDS = [np.arange(20, dtype=np.int64)]


@pytest.fixture
def ask(exported_from, monkeypatch, tmp_path):
    """Ask for the floor; returns it and how often it has been measured so far."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(floors, "compute_floor", lambda *_: measured.append(1) or no_floor(f"number {len(measured)}"))
    reference = Reference(exported_from.config, exported_from.read)

    def call(fingerprint="a", ids=IDS):
        floor = floors.cached_floor(StepContext(Path(tmp_path)), fingerprint, reference, ids, [])
        return floor.reason, len(measured)

    return call


def kept(tmp_path):
    return sorted((tmp_path / "llama2trt" / "floors").iterdir())


def test_is_measured_once_for_a_checkpoint_and_its_tokens(ask) -> None:
    assert ask() == ask() == ("number 1", 1)
    assert ask("b") == ("number 2", 2)
    assert ask(ids=[IDS[0] + 1]) == ("number 3", 3)
    assert ask() == ("number 1", 3)


@pytest.mark.parametrize("damage", [lambda path: path.write_text(path.read_text().replace("1", "7")), lambda path: path.write_bytes(b"")])
def test_a_file_that_is_not_what_its_name_says_is_measured_again(ask, tmp_path, damage) -> None:
    ask()
    damage(kept(tmp_path)[0])
    assert ask() == ("number 2", 2)


def test_another_floor_under_its_name_is_not_taken(ask, tmp_path) -> None:
    ask()
    ask("b")
    first, second = kept(tmp_path)
    content, name = first.read_bytes(), second.name
    second.unlink()
    (second.parent / name).write_bytes(content)
    ask()
    assert ask("b")[1] == 3  # the one whose file is not its own was measured again


def test_a_folder_that_can_not_be_written_costs_a_measurement_and_no_more(ask, tmp_path, caplog) -> None:
    (tmp_path / "llama2trt").write_text("a file where the folder should be")
    assert [ask(), ask()] == [("number 1", 1), ("number 2", 2)]
    assert "the floor is not kept" in caplog.text
