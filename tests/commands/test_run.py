"""run: every step once, and then only what depends on what changed; validate's exit code as a release job sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifact.progress import silent
from commands import run as run_module

Reported = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def reported(run_cli: Callable[..., subprocess.CompletedProcess[str]]) -> Reported:
    """A command with --json: exit code, and the one object on stdout."""

    def run(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(run_cli(*arguments, "--json", code=code).stdout)
        return report

    return run


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64, for which TensorRT has attention kernels."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-64", head_dim=64)


@pytest.fixture(scope="module")
def first(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, reported: Reported) -> tuple[Path, dict[str, Any]]:
    """An artifact that was made for fp16, and then for int8 too; the second report."""
    out = tmp_path_factory.mktemp("run") / "artifact"
    reported("run", "--checkpoint", checkpoint, "--precision", "fp16", "--out", out)
    return out, reported("run", "--checkpoint", checkpoint, "--precision", "fp16", "--precision", "int8", "--out", out)


@pytest.mark.parity
def test_one_more_precision_leaves_the_other_engine_alone(first: tuple[Path, dict[str, Any]]) -> None:
    assert [step["step"] for step in first[1]["steps"] if step["done"]] == ["quantize-int8", "build-int8", "validate"]


@pytest.mark.parity
def test_run_makes_everything_the_contract_names(first: tuple[Path, dict[str, Any]]) -> None:
    out, report = first
    assert report["passed"] is True
    names = "traced.onnx fused.onnx int8.onnx fused-engine.onnx int8-engine.onnx manifest.json reports/parity.json reports/parity.md".split()
    names += ["reports/parity.html", "reports/parity.xml", "engines/a100-80gb-fp16/build.json", "engines/a100-80gb-int8/part-00.plan"]
    assert [name for name in names if not (out / name).is_file()] == []
    validate = report["validate"]
    assert [stage["stage"] for stage in validate["stages"]] == ["traced", "fused", "fused-engine", "fused-engine-gemv", "int8", "int8-engine"]
    keys = "backend max_abs mean_abs noise_ratio strict_noise_ratio worst_local_ratio range_peak mean_kl top1_agreement perplexity checks".split()
    assert all(stage.keys() >= set(keys) for stage in validate["stages"])
    assert {entry["stage"] for entry in validate["not_run"]} == {"engine a100-80gb-fp16", "engine a100-80gb-int8"}
    assert "quality not" in validate["headline"]  # random ids: no tokenizer
    engine = report["build-int8"]["engines"][0]
    assert engine.keys() >= {"file", "precision", "target", "backend", "bytes", "build_s", "peak_rss_mb", "profiles", "kernels", "bytes_per_weight"}
    assert not list(out.rglob(".llama2trt-*"))


@pytest.mark.parity
def test_run_carries_a_static_cache_through_every_step(checkpoint: Path, tmp_path: Path, reported: Reported) -> None:
    out = tmp_path / "artifact"
    command = ("run", "--checkpoint", checkpoint, "--kv-cache", "static", "--capacity", "64", "--precision", "fp16", "--out", out)
    report = reported(*command)
    assert report["passed"] is True
    (engine,) = report["build-fp16"]["engines"]
    assert (engine["kv_cache"], engine["capacity"]) == ("static", 64)
    assert [stage["stage"] for stage in report["validate"]["stages"]] == ["traced", "fused", "fused-engine"]
    assert [step["step"] for step in reported(*command)["steps"] if step["done"]] == []


@pytest.mark.parity
def test_second_run_does_nothing_and_changed_options_redo_what_depends_on_them(
    first: tuple[Path, dict[str, Any]], checkpoint: Path, tmp_path: Path, reported: Reported
) -> None:
    out = shutil.copytree(first[0], tmp_path / "artifact")
    again = ("run", "--checkpoint", checkpoint, "--precision", "fp16", "--precision", "int8", "--out", out)
    report = reported(*again)
    assert [step["step"] for step in report["steps"] if step["done"]] == []
    assert report["validate"]["verdict"] == first[1]["validate"]["verdict"]
    report = reported(*again, "--max-batch", "2")
    assert [step["step"] for step in report["steps"] if step["done"]] == ["build-fp16", "build-int8", "validate"]


@pytest.mark.parity
def test_validate_exits_three_and_names_the_tensor_of_a_changed_byte(first: tuple[Path, dict[str, Any]], tmp_path: Path, reported: Reported) -> None:
    out = shutil.copytree(first[0], tmp_path / "artifact")
    weights = out / "weights" / "layer-001.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[5000] ^= 0x40
    weights.write_bytes(raw)
    report = reported("validate", out, "--stage", "fused", code=3)
    assert report["passed"] is False
    assert [failed["tensor"] for failed in report["checksums"]["failed"] if failed["tensor"]] == ["model.layers.1.self_attn.q_proj.weight"]


@pytest.mark.parity
def test_engines_of_another_checkpoint_are_not_certified(
    first: tuple[Path, dict[str, Any]], make_checkpoint: Callable[..., Path], tmp_path: Path, reported: Reported
) -> None:
    out = shutil.copytree(first[0], tmp_path / "artifact")
    other = make_checkpoint(tmp_path / "other", head_dim=64, seed=1)
    reported("export", "--checkpoint", other, "--out", out, "--force")
    reported("fuse", out)
    reported("quantize", out)
    report = reported("validate", out, "--stage", "traced", code=3)
    assert any("build-a100-80gb-fp16 was made from" in failed["expected"] for failed in report["checksums"]["failed"])


@pytest.mark.parity
def test_moved_and_changed_checkpoints_are_noticed(first: tuple[Path, dict[str, Any]], checkpoint: Path, tmp_path: Path, reported: Reported) -> None:
    out = shutil.copytree(first[0], tmp_path / "artifact")
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    report = reported("run", "--checkpoint", moved, "--precision", "fp16", "--out", out)
    assert [step["step"] for step in report["steps"] if step["done"]] == []  # copied with its times: the same files in another place
    (moved / "generation_config.json").write_text("{}")
    report = reported("run", "--checkpoint", moved, "--precision", "fp16", "--out", out)
    assert [step["step"] for step in report["steps"] if step["done"]] == ["export", "validate"]
    assert (out / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--weights", "none"), 2, "needs the weights"),
        (("--kv-cache", "static"), 1, "a static cache needs --capacity"),
        (("--kv-cache", "static", "--max-length", "64"), 1, "--max-length is for a dynamic cache"),
        (("--capacity", "64"), 1, "--capacity is for a static cache"),
        (("--decode-gemv", "--weights", "reference"), 1, "--weights reference leaves them apart"),
        (("--decode-gemv", "--precision", "fp16", "--precision", "int8"), 1, "--decode-gemv is for fp16 engines, not int8"),
    ],
)
def test_run_refuses_at_once_what_a_later_step_would_refuse(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], code: int, words: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = run_cli("run", "--checkpoint", checkpoint, "--out", tmp_path / "a", *options, code=code)
    assert result.stdout == ""
    assert words in result.stderr
    assert not (tmp_path / "a").exists()


def test_what_is_forced_is_calibrated_once_for_all_that_read_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = SimpleNamespace(report={"passed": True}, up_to_date=False, reason="forced")
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(run_module, "quantize", lambda artifact, **given: asked.append((given["scheme"], given["recalibrate"])) or done)
    for step in ("fuse", "build_all", "validate"):
        monkeypatch.setattr(run_module, step, lambda *_, **__: done)
    run_module._after_export(tmp_path, ("fp16", "int8", "int4", "int8-smoothquant"), run_module.RunOptions(), True, silent)
    assert asked == [("int8", True), ("int4", False), ("int8-smoothquant", True)]
