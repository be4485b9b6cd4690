"""commands/estimate.py: which model is meant without fetching one, and what a person and a program get."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli
from artifact.errors import ArtifactError, CheckpointError, EngineError, UsageError
from artifact.manifest import FORMAT, write_manifest
from artifact.presets import preset
from commands.estimate import EstimateOptions, cache_disk, estimate_command, find_model
from commands.machine_rates import measure_rates
from exporter.checkpoints.request import CheckpointRequest


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("exporter.checkpoints.hub_cache.find_snapshot", lambda repository, revision: None)


def test_a_size_is_known_without_its_weights_and_its_download_is_said() -> None:
    model = find_model(CheckpointRequest(size="13b"))
    assert (model.name, model.config.num_hidden_layers) == ("meta-llama/Llama-2-13b-hf", 40)
    assert model.download_bytes == pytest.approx(26.0e9, rel=0.01)


def test_a_size_that_was_never_published_has_nothing_to_download() -> None:
    model = find_model(CheckpointRequest(size="llama1-33b"))
    assert (model.name, model.download_bytes) == ("llama1-33b", 0)


def test_a_folder_is_read_and_random_weights_are_not_calibrated_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert find_model(CheckpointRequest(str(tiny_checkpoint))).config.hidden_size == 32
    random = CheckpointRequest("random:0", size="7b")
    assert find_model(random).random
    steps = estimate_command(random, EstimateOptions(precision="int8"), out=tmp_path)["steps"]
    assert "calibrate" not in [step["step"] for step in steps]


def artifact(folder: Path, **described: Any) -> CheckpointRequest:
    """An artifact's manifest, for an estimate reads no more."""
    folder.mkdir(exist_ok=True)
    model = {"name": "seven", "source": "random", "format": "safetensors", "fingerprint": "0", "dtype": "fp16", "config": asdict(preset("7b"))}
    steps = described.pop("steps", {})
    write_manifest(folder, {"format": FORMAT, "model": model | {"kv_cache": "dynamic"} | described, "steps": steps})
    return CheckpointRequest(str(folder))


def test_linears_that_are_not_packed_take_more_to_build(tmp_path: Path) -> None:
    """An fp32 engine is built from the trace, and in the checkpoint's own files q, k and v lie apart."""

    def build(request: CheckpointRequest, precision: str = "fp16") -> int:
        steps = {step["step"]: step for step in estimate_command(request, EstimateOptions(precision), out=tmp_path)["steps"]}
        return int(steps["build"]["disk_bytes"])

    half = build(CheckpointRequest(size="7b"))
    assert build(CheckpointRequest(size="7b"), "fp32") / half == pytest.approx(3.5, rel=0.01)
    assert build(artifact(tmp_path / "copy", weights="copy")) == half
    assert build(artifact(tmp_path / "place", weights="reference")) / half == pytest.approx(1.75, rel=0.01)


def made(artifact: Path, file: str, inputs: dict[str, str], **options: Any) -> dict[str, Any]:
    """A recorded step whose file is there; its hash is its name."""
    (artifact / file).parent.mkdir(parents=True, exist_ok=True)
    (artifact / file).write_text(file)
    return {"inputs": inputs, "outputs": {file: {"sha256": file}}, "options": options}


def test_steps_that_an_artifact_has_behind_it_are_not_counted_again(tmp_path: Path) -> None:
    folder, length = tmp_path / "art", {"max_length": None, "capacity": None}
    steps = {
        "export": made(folder, "traced.onnx", {}),
        "fuse": made(folder, "fused.onnx", {"traced.onnx": "traced.onnx"}),
        "quantize-int8": made(folder, "int8.onnx", {"fused.onnx": "fused.onnx"}),
        "build-a100-80gb-int8": made(folder, "engines/x.plan", {"int8.onnx": "int8.onnx"}, max_batch=4, **length),
    }

    def left(precision: str, request: CheckpointRequest, **options: Any) -> list[str]:
        report = estimate_command(request, EstimateOptions(precision, **options))
        return [step["step"] for step in report["steps"]]

    request = artifact(folder, steps=steps)
    assert left("int8", request) == ["validate"]
    assert left("int8", request, max_batch=2) == ["build", "validate"]
    assert left("fp16", request) == ["build", "validate"]
    assert left("int4", request) == ["calibrate", "quantize", "build", "validate"]
    other = steps | {"calibrate": made(folder, "calibration.safetensors", {})}
    assert left("int4", artifact(folder, steps=other)) == ["quantize", "build", "validate"]
    assert "calibrate" in left("int8-smoothquant", artifact(folder, steps=other))
    spent = steps | {"calibrate": made(folder, "calibration.safetensors", {}) | {"outputs": {}, "spent": {"calibration.safetensors": "x"}}}
    assert left("int4", artifact(folder, steps=spent)) == ["calibrate", "quantize", "build", "validate"]
    own = steps | {"calibrate-int8-smoothquant": made(folder, "calibration-int8-smoothquant.safetensors", {})}
    assert "calibrate" not in left("int8-smoothquant", artifact(folder, steps=own))
    stale = steps | {"fuse": steps["fuse"] | {"inputs": {"traced.onnx": "another"}}}
    assert left("int8", artifact(folder, steps=stale)) == ["fuse", "calibrate", "quantize", "build", "validate"]
    (folder / "int8.onnx").unlink()
    assert left("int8", artifact(folder, steps=steps)) == ["calibrate", "quantize", "build", "validate"]
    assert "export" in left("fp16", artifact(folder, steps=steps, weights="none"))


def test_an_artifact_is_what_it_is(tmp_path: Path) -> None:
    request = artifact(tmp_path / "art", kv_cache="static")
    report = estimate_command(request, EstimateOptions(capacity=512))
    assert (report["kv_cache"], report["max_length"]) == ("static", 512)
    with pytest.raises(UsageError, match=r"was exported with a static cache; --kv-cache dynamic is another"):
        estimate_command(request, EstimateOptions(kv_cache="dynamic"))
    with pytest.raises(EngineError, match="a fp32 engine needs an fp32 artifact; this one is fp16"):
        estimate_command(request, EstimateOptions("fp32", capacity=512))


@pytest.mark.parametrize("same", [True, False])
def test_the_disk_of_the_hubs_cache_is_looked_at_where_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, same: bool) -> None:
    if not same:
        monkeypatch.setattr("commands.estimate.cache_folder", lambda: Path("/proc"))
    assert (cache_disk(tmp_path) is None) == same


@pytest.mark.parametrize("source", ["meta-llama/Llama-2-7b-hf", "demo"])
def test_what_would_be_fetched_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="an estimate downloads nothing") as error:
        find_model(CheckpointRequest(source))
    assert error.value.hint


def test_no_model_no_target_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model was given"):
        find_model(CheckpointRequest())
    with pytest.raises(EngineError, match="no target 'h100'"):
        estimate_command(CheckpointRequest(size="7b"), EstimateOptions(target="h100"), out=tmp_path)
    with pytest.raises(EngineError, match="--capacity is for a static cache"):
        estimate_command(CheckpointRequest(size="7b"), EstimateOptions(capacity=512), out=tmp_path)


def test_rates_are_measured_and_a_closed_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = measure_rates(tmp_path / "not" / "there")
    assert rates.disk_gb_s > 0
    assert rates.gflops > 0

    def closed(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", closed)
    with pytest.raises(ArtifactError, match="can't be written to: Permission denied"):
        measure_rates(tmp_path)


def test_the_command_says_what_fits_and_how_fast_it_can_be(tmp_path: Path) -> None:
    arguments = ["estimate", "--size", "13b", "--precision", "int8", "--target", "a100-40gb", "--out", str(tmp_path)]
    shown = CliRunner().invoke(cli.app, arguments, terminal_width=200)
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    for line in (
        "a100-40gb needs 2 GPUs, one part each",
        "what fits: --precision int4; or --max-batch 3",
        "decode reads fewer bytes; prefill multiplies",
    ):
        assert line in words, words
    report = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).output)
    assert (report["device"]["fit"]["gpus"], report["parts"]["count"], report["fits"]) == (2, 2, False)
