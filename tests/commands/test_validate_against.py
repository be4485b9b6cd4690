"""``validate --against`` and ``--save-reference`` from the command line: exit codes, what stdout holds, options that don't go together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
from artifact import manifest as manifests
from artifact.errors import ToolkitError
from artifact.manifest import read_manifest
from artifact.steps import run_step
from commands import validate as command
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from validation.reference import Reference

Run = Callable[..., str]


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 artifact: no floor, no strict mode."""
    folder = tmp_path_factory.mktemp("against") / "tiny"
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    run_step(folder, "export", {"source": str(tiny_checkpoint)}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32"))
    return folder


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Run:
    """Run the command in this process; its exit code must be the expected one. Returns stdout, or what it says on stderr."""
    monkeypatch.setattr(command, "_reopen", lambda *_: open_checkpoint(str(tiny_checkpoint)))

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, ["validate", *map(str, arguments)], env={"COLUMNS": "200"})
        error = result.exception if isinstance(result.exception, ToolkitError) else None
        assert (error.exit_code if error else result.exit_code) == code, result.output
        return f"{error} {error.hint}" if error else result.stdout if code in (0, 3) else result.output

    return run


def test_transformers_and_a_kept_reference(artifact: Path, validate: Run, tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    report = json.loads(validate(artifact, "--against", "transformers", "--save-reference", file, "--top-k", 16, "--json"))
    assert report["passed"] is True
    assert report["against"]["name"].startswith("transformers 5.")
    assert report["saved_reference"]["top_k"] == 16
    assert read_manifest(artifact)["steps"]["validate"]["options"]["against"] == "transformers"
    judged = json.loads(validate(artifact, "--against", file, "--out", tmp_path / "there", "--json"))
    assert judged["passed"] is True
    assert (tmp_path / "there" / "parity.xml").is_file()
    assert not (artifact / "reports" / "against-reference").exists()


def test_the_reference_against_transformers_is_said_in_words(artifact: Path, validate: Run) -> None:
    shown = validate(artifact, "--against", "transformers")
    assert "the reference against transformers 5." in shown
    assert "float32, eager attention: passed; hidden_error" in shown


def test_what_transformers_refuses_is_known_before_the_reference_runs(
    artifact: Path, validate: Run, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = make_checkpoint(tmp_path / "checkpoint", initializer_range=2.0)
    monkeypatch.setattr(command, "_reopen", lambda *_: open_checkpoint(str(refused)))
    monkeypatch.setattr(Reference, "run", lambda *_, **__: pytest.fail("the reference was run"))
    said = [validate(artifact, "--against", "transformers", code=1)]
    said.append(
        validate("--graph", artifact / "traced.onnx", "--checkpoint", refused, "--against", "transformers", "--out", tmp_path / "out", code=1)
    )
    assert all("can't express this model: Validation error for field 'initializer_range'" in one for one in said)
    assert all(one.endswith("leave out --against transformers") for one in said)


def test_two_graphs_end_with_0_and_with_3_where_a_limit_is_broken(
    artifact: Path, validate: Run, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    other = tmp_path / "other"
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", seed=1)))
    run_step(other, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32"))
    shown = validate(artifact, "--against", other)
    assert "not judged: 1 of 1 stages ran — against other: traced: KL" in shown
    assert f"report: {artifact}/reports/against-other/parity.html" in shown
    assert "must be <= 1e-06" in validate(artifact, "--against", other, "--max-kl", "1e-6", code=3)


def test_every_manifest_is_read_once(artifact: Path, validate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "reference.safetensors", tmp_path / "other"
    validate(artifact, "--save-reference", file)
    shutil.copytree(artifact, other)
    read: list[Path] = []
    monkeypatch.setattr(manifests, "read_manifest", lambda folder: (read.append(folder), read_manifest(folder))[1])
    lone = "--graph", artifact / "traced.onnx", "--out", tmp_path / "out"
    for arguments, folders in (
        ((artifact, "--against", file), [artifact]),
        ((artifact, "--against", other), [other, artifact]),
        ((artifact, "--against", other / "traced.onnx"), [other, artifact]),
        ((*lone, "--against", other / "traced.onnx"), [other]),
    ):
        validate(*arguments)
        assert read == folders, arguments
        read.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "nowhere"), "neither transformers, nor a folder"),
        (("--max-kl", "0.1"), "--max-kl is a limit of a comparison"),
        (("--top-k", "16"), "--top-k says how much --save-reference keeps"),
        (("--against", "transformers", "--out", "x"), "--out with --graph or another graph alone"),
        (("--save-reference", "x.npz"), "must end in .safetensors"),
    ],
)
def test_options_that_mean_nothing_are_refused(artifact: Path, validate: Run, options: tuple[str, ...], message: str) -> None:
    assert message in validate(artifact, *options, code=2)
