"""Models on the hub and published sizes, as the commands see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import FusionError, ValidationError
from artifact.hub_folder import cache_folder
from artifact.manifest import read_manifest
from artifact.progress import silent
from commands import doctor, inspect, run, validate
from exporter.checkpoints import CheckpointRequest
from exporter.checkpoints.hub import fetch_snapshot

ROOT = Path(__file__).resolve().parents[4]
NAME = "org/Tiny-hf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Put = Callable[..., Path]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(hub: Any, tmp_path: Path, run_cli: Cli) -> Cli:
    """A command whose hub is the one on this machine."""
    return lambda *arguments, code=0: run_cli(*arguments, code=code, folder=tmp_path)


@pytest.fixture
def process(hub: Any, cache: Path, tmp_path: Path) -> Cli:
    """The same as a process, which gets the hub by the variables that a user sets."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        there = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(tmp_path / "token")}
        command = [sys.executable, str(ROOT / "cli.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | there)

    return start


@pytest.mark.trace
def test_export_of_a_hub_id_records_the_commit_and_says_what_it_downloads(
    hub: Any, sharded: Path, process: Cli, tmp_path: Path, put_in_cache: Put, tiny_checkpoint: Path
) -> None:
    hub.add(NAME, sharded)
    result = process("export", "--checkpoint", NAME, "--json")
    assert json.loads(result.stdout)["artifact"] == "artifacts/tiny-hf"
    assert "downloading org/Tiny-hf@0123456: 1 MB in 2 files" in result.stderr
    model = read_manifest(tmp_path / "artifacts" / "tiny-hf")["model"]
    assert model["request"] == {"source": NAME, "revision": COMMIT}
    put_in_cache(NAME, tiny_checkpoint, commit="f" * 40)  # the branch moves on; validate still opens what was exported
    hub.stop()
    for moved_to in (None, NAME):
        assert validate._reopen(moved_to, model, silent).fingerprint == model["fingerprint"]
    local = validate._reopen(str(sharded), model, silent)  # a revision is of the hub: not of the folder it moved to
    assert local.fingerprint == model["fingerprint"]
    with pytest.raises(ValidationError, match="is not the checkpoint that this artifact was made from"):
        validate._reopen(str(tiny_checkpoint), model, silent)


@pytest.mark.trace
def test_run_records_the_commit(put_in_cache: Put, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_cache(NAME, sharded)

    def stop(*_: object, **__: object) -> None:
        raise FusionError("far enough")

    monkeypatch.setattr(run, "fuse", stop)
    with pytest.raises(FusionError, match="far enough"):
        run.run(CheckpointRequest(NAME), tmp_path / "art", ())
    assert read_manifest(tmp_path / "art")["model"]["request"] == {"source": NAME, "revision": COMMIT}


def test_gated_model_is_one_error_and_one_hint_and_leaves_no_folder(hub: Any, sharded: Path, cli: Cli, tmp_path: Path) -> None:
    hub.add("meta-llama/Llama-2-7b-hf", sharded, gated=401)
    result = cli("export", "--size", "7b", code=1)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("asking")]
    assert lines[0] == "error: meta-llama/Llama-2-7b-hf is gated: its licence must be accepted, and nobody is logged in"
    assert lines[1].startswith(f"hint: accept the licence at {hub.endpoint}/meta-llama/Llama-2-7b-hf")
    assert result.stdout == ""
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    "arguments", [("--size", "8b"), ("--checkpoint", "demo", "--revision", "x"), ("--size", "7b", "--config", "c.json"), (), ("--revision", "x")]
)
def test_options_that_do_not_go_together_are_exit_code_two(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli("export", *arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert "hint: " in result.stderr


def test_inspect_of_a_size_asks_nobody(cache: Path) -> None:
    report = inspect.inspect("70b-chat")
    assert (report["kind"], report["repository"], report["parameters"]) == ("published size", "meta-llama/Llama-2-70b-chat-hf", 68_976_648_192)
    assert report["cached"] == "not here"
    assert inspect.inspect("llama1-33b")["repository"].startswith("none")


def test_inspect_of_a_size_says_what_the_cache_holds(put_in_cache: Put, sharded: Path) -> None:
    folder = put_in_cache("meta-llama/Llama-2-7b-hf", sharded)
    assert inspect.inspect("7b")["cached"] == str(folder)
    put_in_cache("meta-llama/Llama-2-13b-hf", sharded, leave_out=("model-00002-of-00002.safetensors",))
    assert inspect.inspect("13b")["cached"] == "incomplete: lacks model-00002-of-00002.safetensors"


def test_inspect_of_a_hub_id_lists_it_and_downloads_nothing(hub: Any, sharded: Path) -> None:
    hub.add(NAME, sharded)
    report = inspect.inspect(NAME)
    assert (report["kind"], report["revision"]) == ("model on the hub, not downloaded", COMMIT)
    assert report["files"]["model-00001-of-00002.safetensors"] == (sharded / "model-00001-of-00002.safetensors").stat().st_size
    assert report["bytes"] == sum(report["files"].values())
    assert hub.downloads() == []
    fetch_snapshot(NAME, None, silent, lambda config: None)
    assert report["bytes_that_export_reads"] == sum(report["files"][name] for name in hub.downloads())


def test_inspect_of_a_hub_id_opens_what_the_cache_holds_whole(put_in_cache: Put, sharded: Path) -> None:
    put_in_cache(NAME, sharded)
    report = inspect.inspect(NAME)
    assert (report["kind"], report["name"]) == ("checkpoint (safetensors)", "tiny-hf")


def test_doctor_says_where_published_models_are_kept_and_asks_nobody(hub: Any, cache: Path) -> None:
    report = doctor.doctor()["hub"]
    assert report == {"cache": str(cache), "endpoint": hub.endpoint, "logged_in": False, "offline": False, "reachable": None, "why": None}
    assert hub.asked == []


def test_doctor_asks_the_hub_when_told_to(hub: Any, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("meta-llama/Llama-2-7b-hf", sharded)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    report = doctor.doctor(ask_hub=True)["hub"]
    assert (report["reachable"], report["logged_in"], report["why"]) == (True, True, None)
    hub.stop()
    report = doctor.doctor(ask_hub=True)["hub"]
    assert report["reachable"] is False
    assert "can't be reached" in report["why"]


def test_cache_folder_is_the_hubs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name in (None, *reversed(names)):
        if name:
            monkeypatch.setenv(name, str(tmp_path / name))
        theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert str(cache_folder()) == theirs
