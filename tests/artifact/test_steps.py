"""artifact/steps.py and manifest.py: up to date or not, whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from artifact import steps
from artifact.errors import ArtifactError
from artifact.manifest import atomic_write, locked, read_manifest
from artifact.ownership import check_belongs
from artifact.step_kinds import Step
from artifact.steps import Outcome, StepContext, run_step, why_to_do

PACKAGES = ("numpy",)


@pytest.fixture(autouse=True)
def two_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two small steps, `first` → one.txt and `second` (reads one.txt) → two.txt, whose rules are files that a test can change."""
    (tmp_path / "rules").mkdir()
    for name in ("first", "second"):
        (tmp_path / "rules" / f"{name}.py").write_text("1")
    monkeypatch.setattr(steps, "ROOT", tmp_path / "rules")
    monkeypatch.setattr(steps, "STEPS", {"first": Step((), ("first.py",), PACKAGES), "second": Step(("one.txt",), ("second.py",), PACKAGES)})


def make(artifact: Path, text: str = "same", **options: object) -> tuple[Outcome, Outcome]:
    """Run both steps; `second` copies what `first` wrote."""

    def first(step: StepContext) -> dict[str, object]:
        with step.write("one.txt") as path:
            path.write_text(text)
        return {"text": text}

    def second(step: StepContext) -> dict[str, object]:
        with step.write("deep/two.txt") as path:
            path.write_text((step.artifact / "one.txt").read_text())
        return {}

    return run_step(artifact, "first", options, first), run_step(artifact, "second", {}, second)


def test_second_call_finds_everything_up_to_date(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    assert [outcome.up_to_date for outcome in make(artifact)] == [False, False]
    again = make(artifact)
    assert [outcome.up_to_date for outcome in again] == [True, True]
    assert again[0].report == {"text": "same"}


def test_changed_option_redoes_the_step_and_only_what_depends_on_its_result(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    make(artifact)
    first, second = make(artifact, level=2)
    assert "options changed: level" in first.reason
    assert second.up_to_date  # one.txt came out the same
    first, second = make(artifact, text="other", level=3)
    assert "inputs changed: one.txt" in second.reason


def test_changed_rule_redoes_the_step(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    make(artifact)
    (tmp_path / "rules" / "second.py").write_text("2")
    first, second = make(artifact)
    assert first.up_to_date
    assert second.reason == "rules changed"


def test_changed_version_redoes_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tmp_path / "a"
    make(artifact)
    monkeypatch.setattr(steps, "_versions", lambda packages: {"numpy": "0"})
    first, _ = make(artifact)
    assert first.reason == "versions changed: numpy"


@pytest.mark.parametrize("damage", ["delete", "change", "same size"])
def test_damaged_output_redoes_the_step(tmp_path: Path, damage: str) -> None:
    artifact = tmp_path / "a"
    make(artifact)
    path = artifact / "deep" / "two.txt"
    if damage == "delete":
        path.unlink()
    else:
        path.write_text("same!" if damage == "change" else "sane")
        os.utime(path, ns=(1, 1))
    first, second = make(artifact)
    assert first.up_to_date
    assert "deep/two.txt is missing or was changed" in second.reason
    assert path.read_text() == "same"


def test_touched_output_with_the_same_bytes_is_up_to_date(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    make(artifact)
    os.utime(artifact / "one.txt", ns=(1, 1))
    assert [outcome.up_to_date for outcome in make(artifact)] == [True, True]


def test_missing_input_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no traced\.onnx") as caught:
        steps.require(tmp_path, "traced.onnx")
    assert "cli.py export" in (caught.value.hint or "")


def test_failing_step_leaves_nothing(tmp_path: Path) -> None:
    artifact = tmp_path / "a"

    def fail(step: StepContext) -> dict[str, object]:
        with step.write("one.txt") as path:
            path.write_text("half")
            raise ArtifactError("disk full")

    with pytest.raises(ArtifactError, match="disk full"):
        run_step(artifact, "first", {}, fail)
    assert not artifact.exists()


def test_failing_step_keeps_what_was_there(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    make(artifact)

    def fail(step: StepContext) -> dict[str, object]:
        with step.write("one.txt") as path:
            path.write_text("half")
            raise ArtifactError("disk full")

    with pytest.raises(ArtifactError, match="disk full"):
        run_step(artifact, "first", {}, fail, force=True)
    assert (artifact / "one.txt").read_text() == "same"
    assert [outcome.up_to_date for outcome in make(artifact)] == [True, True]


def test_files_that_a_step_no_longer_writes_are_removed(tmp_path: Path) -> None:
    artifact = tmp_path / "a"

    def write(name: str) -> None:
        def work(step: StepContext) -> dict[str, object]:
            with step.write(name) as path:
                path.write_text(name)
            return {}

        run_step(artifact, "first", {"name": name}, work)

    write("part-0.txt")
    write("part-1.txt")
    assert sorted(path.name for path in artifact.glob("*.txt")) == ["part-1.txt"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    make(artifact)
    leftover = artifact / "deep" / ".llama2trt-two.txt"
    leftover.write_text("half")
    make(artifact)
    assert not leftover.exists()


def _hold(artifact: Path, ready: object, release: object) -> None:
    with locked(artifact):
        ready.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path / "a", ready, release))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ArtifactError, match="another run is working"):
            make(tmp_path / "a")
    finally:
        release.set()
        other.join()
    assert make(tmp_path / "a")[0].reason == "not done yet"


def test_lock_nests_within_a_process(tmp_path: Path) -> None:
    with locked(tmp_path / "a"):
        assert not make(tmp_path / "a")[0].up_to_date


def test_atomic_write_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_unreadable_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_folder_of_another_checkpoint_is_refused_unless_forced(tmp_path: Path) -> None:
    model = {"name": "other", "source": "/x", "fingerprint": "abc"}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "model": model, "steps": {}}))
    with pytest.raises(ArtifactError, match="belongs to another checkpoint: other"):
        check_belongs(tmp_path, "def", force=False)
    check_belongs(tmp_path, "def", force=True)
    check_belongs(tmp_path, "abc", force=False)


def test_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "thesis.doc").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"not an artifact folder \(it holds thesis\.doc\)"):
        check_belongs(folder, "abc", force=False)


def test_why_a_step_would_be_done_is_told_without_doing_it(tmp_path: Path) -> None:
    artifact = tmp_path / "a"
    assert why_to_do(artifact, "first", {}) == "not done yet"
    make(artifact)
    before = (artifact / "manifest.json").read_bytes()
    assert (why_to_do(artifact, "first", {}), why_to_do(artifact, "second", {})) == ("", "")
    assert why_to_do(artifact, "first", {"level": 2}) == "options changed: level"
    (tmp_path / "rules" / "second.py").write_text("2")
    assert why_to_do(artifact, "second", {}) == "rules changed"
    assert (artifact / "manifest.json").read_bytes() == before
