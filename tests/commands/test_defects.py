"""What a user meets who mistypes, moves or mixes files: one error that names it, and what is stale or not known is said."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from artifact import manifest as manifest_file
from artifact.errors import ArtifactError, CheckpointError, UsageError
from artifact.manifest import locked
from commands import doctor
from commands.export import ExportOptions, export
from commands.generate import generate
from commands.graphs import fuse, quantize
from commands.inspect import inspect
from commands.summary import summarize
from exporter.checkpoints import CheckpointRequest, open_checkpoint, open_request


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fused artifact, not to be changed."""
    out, _ = export(CheckpointRequest(str(tiny_checkpoint)), tmp_path_factory.mktemp("made") / "art", ExportOptions())
    fuse(out)
    return out


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(made, tmp_path / "art")


@pytest.mark.trace
@pytest.mark.parametrize("options", [ExportOptions("fp32"), ExportOptions("fp16", "static")], ids=["dtype", "cache"])
def test_what_came_of_another_export_is_stale_and_refused(artifact: Path, tiny_checkpoint: Path, options: ExportOptions) -> None:
    assert inspect(str(artifact))["stale"] == []
    export(CheckpointRequest(str(tiny_checkpoint)), artifact, options)
    report = inspect(str(artifact))
    assert report["stale"] == [f"fuse is stale: it was made from another traced.onnx; python cli.py fuse {artifact} --target tensorrt"]
    assert any(sheet.title == "stale" for sheet in summarize("inspect", report))
    if options.kv_cache == "dynamic":
        with pytest.raises(ArtifactError, match=r"fused\.onnx is stale: fuse made it from another traced\.onnx"):
            quantize(artifact)
        fuse(artifact)
        assert inspect(str(artifact))["stale"] == []


@pytest.mark.trace
def test_fuse_names_a_weight_file_that_is_gone_or_cut_off(artifact: Path) -> None:
    weights = artifact / "weights" / "layer-001.safetensors"
    assert fuse(artifact).up_to_date
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"layer-001\.safetensors has {size - 1:,} bytes, and must have {size:,}") as caught:
        fuse(artifact)
    assert str(caught.value.hint).startswith("python cli.py export --checkpoint ")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"has no weights/layer-001\.safetensors, which its graphs point into"):
        fuse(artifact)
    (artifact / "weights" / "checksums.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no weights/checksums\.json"):
        fuse(artifact)


@pytest.mark.trace
def test_a_name_that_is_no_stage_is_a_usage_error_with_those_there_are(made: Path) -> None:
    with pytest.raises(UsageError, match=r"--stage 'bogus' is not a stage; .* has: traced, fused$"):
        generate(made, "w1", stage="bogus")
    with pytest.raises(ArtifactError, match=r"has no int8\.onnx") as caught:
        generate(made, "w1", stage="int8")
    assert "quantize" in str(caught.value.hint)


@pytest.mark.trace
def test_an_artifact_is_not_taken_for_a_checkpoint(made: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is an artifact that was exported from .*, and no checkpoint") as caught:
        open_checkpoint(str(made))
    assert str(caught.value.hint).startswith(f"python cli.py fuse {made} goes on with it; --checkpoint {tiny_checkpoint}")


def test_another_tools_manifest_does_not_hide_a_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").write_text('{"files": []}')
    assert open_checkpoint(str(tmp_path / "model")).format == "safetensors"


def test_a_config_that_is_not_there_is_named_as_it_was_given() -> None:
    with pytest.raises(CheckpointError, match=r"--config /nope\.json: no such file") as caught:
        open_request(CheckpointRequest("random", config=Path("/nope.json")))
    assert "--config FILE" in str(caught.value.hint)


def test_a_folder_that_cannot_be_made_is_one_error() -> None:
    with pytest.raises(ArtifactError, match="/proc/foo can't be made: No such file or directory"), locked(Path("/proc/foo")):
        pass
    assert Path("/proc/foo") not in manifest_file._held


FETCH = "fetch published models (--size, ORG/NAME)"


@pytest.mark.parametrize(
    ("hub", "state", "hint"),
    [
        ({"offline": False, "reachable": None, "why": None}, "not asked", "doctor --hub asks"),
        ({"offline": False, "reachable": True, "why": None}, "yes", None),
        ({"offline": False, "reachable": False, "why": "the hub can't be reached"}, "no", "the hub can't be reached"),
        ({"offline": True, "reachable": None, "why": None}, "no", "HF_HUB_OFFLINE is set: only what the local cache holds"),
    ],
)
def test_doctor_says_no_more_of_the_hub_than_it_asked(monkeypatch: pytest.MonkeyPatch, hub: dict[str, object], state: str, hint: str | None) -> None:
    monkeypatch.setattr(doctor, "_hub", lambda installed, ask: hub)
    row = next(row for row in doctor.doctor()["can"] if row["what"] == FETCH)
    assert (row["state"], row["hint"]) == (state, hint)


@pytest.mark.parametrize("number", [math.nan, math.inf, "16", True, None])
def test_lora_scale_must_be_a_finite_number(number: object) -> None:
    from exporter.checkpoints.lora_config import _parsed

    good = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    assert _parsed(good).scaling("q_proj") == 2
    with pytest.raises(CheckpointError, match="lora_alpha must be a finite number, got"):
        _parsed(good | {"lora_alpha": number})
    with pytest.raises(CheckpointError, match=r"alpha_pattern\['q_proj'\] must be a finite number, got"):
        _parsed(good | {"alpha_pattern": {"q_proj": number}})
