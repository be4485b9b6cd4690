"""--weights reference and none: what is used where it lies, and a graph whose weights come later."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from artifact.errors import ArtifactError, ExportError
from artifact.manifest import read_manifest
from artifact.tensor_file import read_checksums
from commands.build import BuildOptions, build
from commands.export import ExportOptions, export
from commands.generate import generate
from commands.graphs import fuse, quantize
from commands.validate import ValidateOptions, validate
from commands.verify import verify_artifact
from exporter.checkpoints import CheckpointRequest
from validation.checksums import verify_checksums

ROOT = Path(__file__).resolve().parents[2]
REFERENCE, NONE, COPY = ExportOptions(weights="reference"), ExportOptions(weights="none"), ExportOptions()


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def use(folder: Path, options: ExportOptions = REFERENCE, out: Path | None = None, **kwargs: bool) -> Path:
    return export(CheckpointRequest(str(folder)), out, options, **kwargs)[0]


@pytest.mark.trace
def test_reference_adds_its_files_and_alters_none(folder: Path) -> None:
    before = files(folder)
    assert use(folder) == folder
    after = files(folder)
    assert {name: after[name] for name in before} == before
    added = {"traced.onnx", "manifest.json", "weights/checksums.json", "weights/rotary.safetensors"}
    assert after.keys() - before.keys() == added
    assert {tensor.file for tensor in read_checksums(folder).values()} == {"model.safetensors", "weights/rotary.safetensors"}


@pytest.mark.trace
def test_reference_goes_through_the_later_steps_without_packing(folder: Path) -> None:
    before = files(folder)
    use(folder)
    report = fuse(folder).report
    rules = {rule["rule"]: rule for rule in report["rules"]}
    assert report["passed"] is True
    assert {name: (rule["fired"], rule["expected"]) for name, rule in rules.items() if name.startswith("pack")} == {
        "pack_qkv": (0, 0),
        "pack_gate_up": (0, 0),  # although the library happens to store gate and up side by side
    }
    assert "--weights reference" in rules["pack_qkv"]["note"]
    assert rules["attention"]["fired"] == 2
    assert quantize(folder).report["quantized"] == 14
    assert verify_checksums(folder, read_manifest(folder)).as_report()["failed"] == []
    verified = verify_artifact(folder, read_manifest(folder), lambda *_: None)
    assert verified["passed"] is True
    assert verified["audit"]["orphaned_bytes"] == 0
    assert {name: raw for name, raw in files(folder).items() if name in before} == before


@pytest.mark.trace
def test_reference_finds_a_changed_shard(folder: Path) -> None:
    use(folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    failed = verify_checksums(folder, read_manifest(folder)).failed
    assert [entry["file"] for entry in failed] == ["model.safetensors"]


@pytest.mark.trace
def test_force_never_alters_a_checkpoints_own_folder(folder: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    use(folder)
    before, other = files(folder), make_checkpoint(tmp_path / "other", seed=1)
    for source, options in ((other, COPY), (folder, COPY), (folder, NONE)):
        with pytest.raises(ArtifactError, match="own folder"):
            use(source, options, folder, force=True)
    assert files(folder) == before
    use(folder, force=True)
    ours = ("manifest.json",)  # seconds
    assert {name: raw for name, raw in files(folder).items() if name not in ours} == {name: raw for name, raw in before.items() if name not in ours}


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def verified(folder: Path) -> dict[str, Any]:
    return verify_artifact(folder, read_manifest(folder), lambda *_: None)


@pytest.mark.trace
def test_verify_finds_a_bit_of_a_shard_outside_the_fingerprints_sample(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "wide", vocab_size=4096)
    use(folder)
    assert verified(folder)["passed"] is True
    flip(folder / "model.safetensors", (place := read_checksums(folder)["model.embed_tokens.weight"]).offset)
    assert place.length > 4096
    report = verified(folder)
    assert report["passed"] is False
    assert report["broken"] == ["model.safetensors: model.embed_tokens.weight is not what was exported"]


@pytest.mark.trace
def test_verify_finds_that_the_folder_is_another_checkpoint_now(folder: Path, tmp_path: Path) -> None:
    use(folder)
    moved = folder.rename(tmp_path / "moved")
    assert verified(moved)["passed"] is True
    config = moved / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06").replace("1e-5", "1e-6"))
    report = verified(moved)
    assert report["passed"] is False
    assert "is another checkpoint now" in report["broken"][0]
    (moved / "model.safetensors").unlink()
    assert "model.safetensors is missing" in verified(moved)["broken"]


@pytest.mark.trace
def test_reference_of_changed_shards_is_exported_again_with_force(folder: Path) -> None:
    use(folder)
    flip(folder / "model.safetensors", -1)
    with pytest.raises(ArtifactError, match="is another checkpoint now than the one that was exported") as caught:
        use(folder)
    assert "--force" in (caught.value.hint or "")
    use(folder, force=True)
    assert verified(folder)["passed"] is True


KILLED = """
import os, signal, sys
import exporter.weights
from commands.export import ExportOptions, export
from exporter.checkpoints import CheckpointRequest
exporter.weights.hash_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export(CheckpointRequest(sys.argv[1]), None, ExportOptions(weights="reference"))
"""


@pytest.mark.trace
def test_a_killed_reference_leaves_the_checkpoint_closed_to_others(
    folder: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, other = files(folder), make_checkpoint(tmp_path / "other", seed=1)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert json.loads((folder / "unfinished-export.json").read_text())["wanted"]["options"]["weights"] == "reference"
    for force in (False, True):
        with pytest.raises(ArtifactError, match=r"not an artifact folder \(it holds config\.json\)"):
            use(other, COPY, folder, force=force)
    assert {name: raw for name, raw in files(folder).items() if name in before} == before
    use(folder)
    assert files(folder).keys() - before.keys() == {"traced.onnx", "manifest.json", "weights/checksums.json", "weights/rotary.safetensors"}


@pytest.mark.trace
def test_a_users_hidden_files_stay(folder: Path) -> None:
    for name in (".lock", ".tmp-notes", ".gitattributes"):
        (folder / name).write_text("mine")
    before = files(folder)
    use(folder)
    use(folder, force=True)
    assert {name: raw for name, raw in files(folder).items() if name in before} == before


def test_a_strangers_journal_deletes_nothing(folder: Path, tmp_path: Path) -> None:
    """A downloaded folder may hold a file of our journal's name."""
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    names = ["model.safetensors", "config.json", "../victim.txt", str(victim)]
    entry = '{"size": 1, "mtime_ns": 1, "sha256": "x"}'
    entries = ", ".join(f'"{name}": {entry}' for name in names)
    (folder / "unfinished-export.json").write_text(f'{{"wanted": {{}}, "files": {{{entries}}}, "writing": ["{names[0]}", "{names[1]}"]}}')
    before = files(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="NaN"):
        use(folder)
    assert before.keys() - files(folder).keys() <= {"unfinished-export.json"}
    assert victim.read_text() == "mine"


class TestRefused:
    """Each with its reason, before anything is written."""

    def refuse(self, folder: Path, options: ExportOptions = REFERENCE, out: Path | None = None) -> str:
        before = files(folder)
        with pytest.raises(ExportError) as caught:
            use(folder, options, out)
        assert files(folder) == before
        assert caught.value.hint
        return str(caught.value)

    def test_another_dtype(self, folder: Path) -> None:
        assert "is F16, an artifact of fp32 holds F32" in self.refuse(folder, ExportOptions("fp32", weights="reference"))

    def test_links(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "blob")
        (folder / "model.safetensors").symlink_to("blob")
        assert "model.safetensors is a link" in self.refuse(folder)

    def test_a_hub_cache(self, folder: Path, tmp_path: Path) -> None:
        blob, snapshot = tmp_path / "models--x" / "blobs" / "abc", tmp_path / "models--x" / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        blob.parent.mkdir()
        shutil.copy(folder / "model.safetensors", blob)
        shutil.copy(folder / "config.json", snapshot)
        (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
        assert "a hub cache is made of them" in self.refuse(snapshot)

    def test_hard_links(self, folder: Path, tmp_path: Path) -> None:
        os.link(folder / "model.safetensors", tmp_path / "second")
        assert "model.safetensors has a second name" in self.refuse(folder)

    def test_another_folder(self, folder: Path, tmp_path: Path) -> None:
        assert "itself the artifact" in self.refuse(folder, out=tmp_path / "art")

    def test_another_format(self, tmp_path: Path) -> None:
        from exporter.in_place import check_in_place

        class Quantised:
            format = "gguf"

        with pytest.raises(ExportError, match="this checkpoint is gguf"):
            check_in_place(Quantised(), CheckpointRequest("x.gguf"), None, "fp16")  # type: ignore[arg-type]

    def test_an_adapter(self, folder: Path) -> None:
        from exporter.checkpoints import open_checkpoint
        from exporter.in_place import check_in_place

        with pytest.raises(ExportError, match="can't merge an adapter"):
            check_in_place(open_checkpoint(str(folder)), CheckpointRequest(str(folder), lora=folder), None, "fp16")


@pytest.mark.trace
def test_graph_alone_refuses_what_needs_weights_and_carries_on(folder: Path, tmp_path: Path) -> None:
    out = use(folder, NONE, tmp_path / "art")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "manifest.json", "traced.onnx"]
    report = read_manifest(out)["steps"]["export"]["report"]
    assert (report["weights_bytes"], report["audit"]) == (0, None)
    graph = (out / "traced.onnx").read_bytes()
    fused = fuse(out).report  # rewriting reads no weight
    assert fused["passed"] is True
    needy: list[Callable[[], object]] = [
        lambda: quantize(out),
        lambda: build(out, "fp16", BuildOptions()),
        lambda: validate(out, ValidateOptions()),
        lambda: generate(out, "hello"),
    ]
    for step in needy:
        with pytest.raises(ArtifactError, match=r"holds the graph alone \(--weights none\)") as caught:
            step()
        assert caught.value.hint == f"python cli.py export --checkpoint {folder} --out {out} --dtype fp16"
    verified = verify_artifact(out, read_manifest(out), lambda *_: None)
    assert (verified["passed"], verified["audit"], verified["broken"]) == (None, None, [])
    assert "compared with nothing: this folder holds the graph alone (--weights none)" in verified["words"]
    use(folder, COPY, out)
    assert (out / "traced.onnx").read_bytes() == graph
    assert fuse(out).up_to_date
    assert quantize(out).report["quantized"] == 8
    assert verify_artifact(out, read_manifest(out), lambda *_: None)["passed"] is True


@pytest.mark.trace
def test_graph_alone_never_removes_weights_unasked(folder: Path, tmp_path: Path) -> None:
    out = use(folder, COPY, tmp_path / "art")
    with pytest.raises(ArtifactError, match="--weights none would remove them"):
        use(folder, NONE, out)
    shutil.copytree(out, tmp_path / "copy")
    use(folder, NONE, out, force=True)
    assert not list((out / "weights").glob("*"))


@pytest.mark.trace
def test_fuse_names_a_shard_that_is_cut_off_and_who_owns_it(folder: Path) -> None:
    use(folder)
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ArtifactError, match=r"model\.safetensors has .* bytes, and must have at least") as caught:
        fuse(folder)
    assert caught.value.hint == "it is the checkpoint's own file: put it back as it was"
