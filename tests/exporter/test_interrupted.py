"""An export that is killed at any moment, runs out of disk or may not write: whole or visibly unfinished, and the same command carries on."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from artifact.config import LlamaConfig
from artifact.errors import ArtifactError, ExportError
from artifact.layout import tensor_shapes
from artifact.manifest import locked, read_manifest
from commands.export import ExportOptions, export
from commands.inspect import inspect
from exporter.checkpoints import CheckpointRequest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 12
KILLS = 16
SHAPE = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 192, "head_dim": 16}

KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import exporter.export  # before the children, who have their own copy of this process's memory
from commands.export import ExportOptions, export
from exporter.checkpoints import CheckpointRequest, open_checkpoint
from exporter.trace_cache import traced_layer

source, out, plain, kills = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
traced_layer(open_checkpoint(source).config, "fp16")  # kept for the children

def start(folder):
    child = os.fork()
    if child == 0:
        export(CheckpointRequest(source), folder, ExportOptions())
        os._exit(0)
    return child

begin = time.monotonic()
assert os.waitpid(start(plain), 0)[1] == 0
seconds = time.monotonic() - begin
moments, states, rng = [], [], random.Random(0)
while len(moments) < kills:
    child, moment = start(out), rng.uniform(0, seconds)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == signal.SIGKILL:
        moments.append(round(moment / seconds, 2))
        states.append(sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) if out.is_dir() else [])
    else:  # it was done before: begin anew, in a folder that is not there
        os.rename(out, f"{out}-{len(moments)}-{rng.random()}")
assert os.waitpid(start(out), 0)[1] == 0
assert "transformers" not in sys.modules
json.dump({"moments": moments, "states": states}, sys.stdout)
"""


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("deep") / "deep", **SHAPE)


def cli(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds seconds."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.trace
def test_killed_at_random_moments_the_rerun_ends_with_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "killed", tmp_path / "plain"
    command = [sys.executable, "-c", KILLER, str(checkpoint), str(out), str(plain), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    story = json.loads(done.stdout)
    assert len(story["moments"]) >= 15
    whole = files(plain)
    assert any("weights/layer-000.safetensors" in state for state in story["states"]), "no kill fell into the writing"
    for state in story["states"]:
        visible = {file for file in state if not Path(file).name.startswith(".")}
        assert not visible or "unfinished-export.json" in visible or visible == {*whole, "manifest.json"}, state
    assert files(out) == whole
    assert hidden(out) == []
    assert {file: entry["sha256"] for file, entry in outputs(out).items()} == {file: entry["sha256"] for file, entry in outputs(plain).items()}
    for earlier in tmp_path.glob("killed-*"):  # finished before their kill
        assert files(earlier) == whole


def outputs(artifact: Path) -> dict[str, dict[str, str]]:
    recorded: dict[str, dict[str, str]] = read_manifest(artifact)["steps"]["export"]["outputs"]
    return recorded


@pytest.mark.trace
def test_a_killed_command_is_visibly_unfinished_and_its_rerun_writes_only_what_is_missing(
    checkpoint: Path, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "art"
    command = cli("export", "--checkpoint", checkpoint, "--out", out)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = out / "weights" / "layer-002.safetensors"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists(), "the export was faster than the kill"
    written = {path.name: path.stat().st_ino for path in (out / "weights").glob("layer-*")}
    assert "is unfinished" in run_cli("fuse", out, code=1).stderr
    assert inspect(str(out))["unfinished"] == ["export"]
    listed = json.loads((out / "unfinished-export.json").read_text())["files"]
    assert first.name in written
    again = run_cli("export", "--checkpoint", checkpoint, "--out", out, "--json")
    assert json.loads(again.stdout)["audit"]["passed"] is True
    kept = {path.name for path in (out / "weights").glob("layer-*") if written.get(path.name) == path.stat().st_ino}
    assert kept >= {Path(file).name for file in listed if "layer" in file}
    assert not (out / "unfinished-export.json").exists()
    assert hidden(out) == []


def exported(source: Path, out: Path, **options: str) -> Path:
    return export(CheckpointRequest(str(source)), out, ExportOptions(**options))[0]  # type: ignore[arg-type]


@pytest.mark.trace
def test_another_export_does_not_carry_on_with_this_ones_files(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, deep, shallow = tmp_path / "art", make_checkpoint(tmp_path / "deep", num_hidden_layers=4), make_checkpoint(tmp_path / "shallow", seed=1)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("exporter.export.ir.save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            exported(deep, out)
    assert (out / "weights" / "layer-003.safetensors").exists()
    exported(shallow, out)
    assert files(out) == files(exported(shallow, tmp_path / "plain"))


@pytest.mark.trace
def test_a_file_size_limit_is_one_clear_error_and_nothing_looks_whole(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "art"
    limit = 100_000  # bytes: layer files are larger

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = cli("export", "--checkpoint", checkpoint, "--out", out)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=few_bytes)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert "layer-000.safetensors can't be written: File too large" in errors[0]
    assert len(errors) == 2
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == ["shared.safetensors", "unfinished-export.json"]


def sparse_checkpoint(folder: Path, template: Path, layers: int) -> Path:
    """A checkpoint of 19.2 GB a layer that takes no room: files of nothing, one a weight."""
    config = json.loads((template / "config.json").read_text()) | {"num_hidden_layers": layers, "intermediate_size": 100_000_000}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, (name, shape) in enumerate(tensor_shapes(LlamaConfig.from_hf(config)).items()):
        weight_map[name] = f"model-{number:05d}.safetensors"
        header = json.dumps({name: {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 * math.prod(shape)]}}).encode()
        with (folder / weight_map[name]).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 2 * math.prod(shape))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_disk_too_small_is_found_before_the_first_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    layers = 1 + math.ceil(free / 19.2e9)
    source = sparse_checkpoint(tmp_path / "vast", tiny_checkpoint, layers)
    start = time.monotonic()
    with pytest.raises(ExportError, match=r"the export needs [0-9.]+ GB more, [0-9.]+ GB are free on this disk") as caught:
        exported(source, tmp_path / "art")
    needed, found = (float(word) for word in re.findall(r"([0-9.]+) GB", str(caught.value)))
    assert needed == pytest.approx(19.2 * layers + 0.064, rel=1e-3)
    assert found == pytest.approx(free / 1e9, rel=0.2)  # others use the disk, too
    assert "--weights none" in (caught.value.hint or "")
    assert not (tmp_path / "art").exists()
    assert time.monotonic() - start < 60


def test_a_folder_that_cannot_be_written_is_a_clear_error(tiny_checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match=r"can't be written: (Permission denied|Operation not permitted|Read-only file system)") as caught:
        exported(tiny_checkpoint, Path("/sys/kernel/art"))
    assert (caught.value.hint or "").startswith("choose another --out")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_read_only_folder_of_somebody_else_is_a_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith("pytest"):
            parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            with locked(folder / "art"):
                os._exit(1)
        except ArtifactError as error:
            os._exit(0 if "can't be written: Permission denied" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_foreign_folder_is_a_clear_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.doc").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"not an artifact folder \(it holds thesis\.doc\)"):
        exported(tiny_checkpoint, tmp_path / "documents")
    assert [path.name for path in (tmp_path / "documents").iterdir()] == ["thesis.doc"]
