"""artifact/ownership.py: a folder is ours where every file is one that a step has begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifact.errors import ArtifactError
from artifact.journal import Journal
from artifact.manifest import LOCK, fingerprint
from artifact.ownership import check_belongs

COPY, REFERENCE = ({"options": {"weights": mode}} for mode in ("copy", "reference"))


def begun(folder: Path, *files: str, wanted: dict[str, dict[str, str]] = COPY, finished: bool = False) -> None:
    """A step that was killed."""
    journal = Journal(folder, "export", wanted)
    journal.begin()
    for file in files:
        journal.begin(file)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("x")
        if finished:
            journal.add(file, fingerprint(folder / file))
    (folder / LOCK).touch()


@pytest.mark.parametrize("finished", [False, True])
def test_an_interrupted_exports_folder_is_ours(tmp_path: Path, finished: bool) -> None:
    begun(tmp_path, "config.json", "weights/shared.safetensors", finished=finished)
    (tmp_path / ".gitignore").touch()
    check_belongs(tmp_path, "abc", force=False)


@pytest.mark.parametrize("file", ["thesis.doc", "weights/mine.safetensors", "model.safetensors", "notes/a.txt"])
def test_one_file_more_makes_it_foreign(tmp_path: Path, file: str) -> None:
    begun(tmp_path, "config.json", "weights/shared.safetensors")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    for force in (False, True):
        with pytest.raises(ArtifactError, match=rf"it holds ({file}|notes)"):
            check_belongs(tmp_path, "abc", force=force)


def test_a_lock_alone_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    check_belongs(tmp_path, "abc", force=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"it holds config\.json"):
        check_belongs(tmp_path, "abc", force=False)


def test_a_journal_can_not_claim_a_checkpoints_files(tmp_path: Path) -> None:
    begun(tmp_path, "model.safetensors")
    with pytest.raises(ArtifactError, match=r"it holds model\.safetensors"):
        check_belongs(tmp_path, "abc", force=True)
    (tmp_path / "model.safetensors").unlink()
    begun(tmp_path, "config.json", wanted=REFERENCE)
    with pytest.raises(ArtifactError, match=r"it holds config\.json"):
        check_belongs(tmp_path, "abc", force=True)


def test_another_command_after_a_reference_clears_away_no_file_of_the_checkpoint(tmp_path: Path) -> None:
    begun(tmp_path, "config.json", "traced.onnx", wanted=REFERENCE)
    Journal.reopen(tmp_path, "export", COPY, set())
    assert [path.name for path in sorted(tmp_path.glob("[!.]*"))] == ["config.json", "unfinished-export.json"]


def test_a_file_is_named_before_its_first_byte(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "export", COPY)
    journal.begin("traced.onnx")
    assert json.loads(journal.path.read_text())["writing"] == ["traced.onnx"]
    journal.add("traced.onnx", {"size": 0, "mtime_ns": 0, "sha256": ""})
    assert json.loads(journal.path.read_text())["writing"] == []
