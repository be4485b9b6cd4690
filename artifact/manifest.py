"""manifest.json: what an artifact is and which steps made it. Every file is written under a temporary name, synced and renamed; the manifest last."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifact.errors import ArtifactError
from artifact.hashing import sha256_of
from artifact.io_spec import KvCache

MANIFEST = "manifest.json"
FORMAT = 1
LOCK = ".llama2trt.lock"
_TEMPORARY = ".llama2trt-"
"""Ours alone, because an artifact may be somebody's checkpoint folder."""
UNFINISHED = "unfinished-*.json"
"""Journals of steps that were interrupted (artifact/journal.py)."""
STATIC_STEPS = (
    "export",
    "inspect",
    "fuse",
    "quantize",
    "build",
    "validate",
    "generate",
    "bench",
)
"""Steps that know the static cache; every other one refuses it by name."""
_UNWRITABLE = {
    errno.ENOSPC: "free some space and give the same command again: what is whole is kept",
    errno.EDQUOT: "your quota is used up: free some space and give the same command again",
    errno.EFBIG: "the system limits the size of a file (ulimit -f)",
    errno.EROFS: "choose another --out",
    errno.EACCES: "choose another --out, or make the folder writable",
    errno.EPERM: "choose another --out, or make the folder writable",
    errno.ENOTDIR: "a file is where a folder of this path should be: choose another --out",
    errno.EEXIST: "a file is where the folder should be: choose another --out",
    errno.EISDIR: "a folder has this name: choose another --out",
    errno.EIO: "the disk fails: look at the system's log",
}
"""Why the system refuses to write → what to do."""
_held: set[Path] = set()
"""Folders that this process has locked."""
Manifest = dict[str, Any]


def read_manifest(artifact: Path) -> Manifest:
    """The manifest of an artifact folder; an empty one where the folder has none yet.

    Raises:
        ArtifactError: the file is not a manifest of this format.
    """
    path = artifact / MANIFEST
    if not path.exists():
        return {"format": FORMAT, "model": None, "steps": {}}
    try:
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not a manifest: {error}", hint="export into another folder") from error
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version}; this version reads format {FORMAT}", hint="export again into another folder")
    return manifest


def write_manifest(artifact: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step."""
    with atomic_write(artifact / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def require_artifact(artifact: Path, step: str, *, weights: bool = False) -> Manifest:
    """The manifest of a folder that must be an artifact, with graphs of a form that the step takes.

    Args:
        artifact: the folder.
        step: who asks, as the user knows it: the name of a command.
        weights: whether the step reads them, too.

    Raises:
        ArtifactError: no such folder, nothing was exported into it, its export is unfinished, it holds the graph alone, or its graphs have a
            static cache and the step is none of ``STATIC_STEPS``.
    """
    if (artifact / UNFINISHED.replace("*", "export")).exists():
        raise ArtifactError(f"the export into {artifact} is unfinished", hint="give the same export command again: it carries on")
    manifest = read_manifest(artifact) if artifact.is_dir() else None
    if manifest is None or manifest["model"] is None:
        raise ArtifactError(f"{artifact} is not an artifact folder", hint=f"python cli.py export --checkpoint SRC --out {artifact}")
    if kv_cache_of(manifest["model"]) == "static" and step not in STATIC_STEPS:
        raise ArtifactError(
            f"{artifact} has a static KV cache, which {step} does not take yet; {', '.join(STATIC_STEPS)} do",
            hint="export with --kv-cache dynamic into another folder",
        )
    if weights and manifest["model"].get("weights") == "none":
        raise ArtifactError(f"{artifact} holds the graph alone (--weights none)", hint=export_command(artifact, manifest["model"]))
    return manifest


def kv_cache_of(model: Mapping[str, Any]) -> KvCache:
    """The cache form of a manifest's model; artifacts from before there were two have the dynamic one."""
    found: KvCache = model.get("kv_cache", "dynamic")
    return found


def export_command(artifact: Path, model: Mapping[str, Any]) -> str:
    """The command that exports a model again, its weights included."""
    request = model.get("request", {"source": model["source"]})
    named = {"checkpoint" if key == "source" else key: value for key, value in request.items()}
    static = {"kv-cache": "static"} if kv_cache_of(model) == "static" else {}
    options = {**named, "out": artifact, "dtype": model["dtype"], **static}
    return " ".join(["python cli.py export", *(f"--{key} {shlex.quote(str(value))}" for key, value in options.items())])


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success sync (unless it need not outlive a power cut) and rename it, on failure remove it.

    Raises:
        ArtifactError: the system refuses to write: disk full, read-only, no permission.
    """
    temporary = path.with_name(_TEMPORARY + path.name)
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            _sync(path.parent)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write into one error that says what to do.

    Raises:
        ArtifactError: disk full, read-only, no permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise ArtifactError(f"{path} can't be written: {os.strerror(error.errno)}", hint=_UNWRITABLE[error.errno]) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(artifact: Path) -> Iterator[None]:
    """Hold the folder's lock, and clear away what a killed run left unfinished; may be nested within one process.

    No lock file stays behind, and no folder that is empty at the end, because the step failed before its first file.

    Raises:
        ArtifactError: another process holds it.
    """
    folder = artifact.resolve()
    if folder in _held:
        yield
        return
    with writable(folder), _lock_file(folder):
        _held.add(folder)
        try:
            for leftover in list(folder.rglob(_TEMPORARY + "*")):
                leftover.unlink()
            yield
        finally:
            _held.discard(folder)
            (folder / LOCK).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


@contextmanager
def _lock_file(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _UNWRITABLE:
            raise
        raise ArtifactError(f"{folder} can't be made: {os.strerror(error.errno or 0)}", hint="choose another --out") from error
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = (folder / LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino  # not one that its holder has just removed
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise ArtifactError(f"another run is working in {folder}", hint="wait for it to end, or choose another --out")
        yield


FINGERPRINT = ("size", "mtime_ns", "sha256")


def fingerprint(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Size, time and SHA-256 of a file: what tells whether it is still the one that a step wrote; the hash is computed unless it is known."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path) if sha256 is None else sha256}


def unchanged(path: Path, recorded: dict[str, Any]) -> bool:
    """Whether a file is the recorded one: by size and time, and by hash where only the time differs."""
    if not path.is_file() or path.stat().st_size != recorded["size"]:
        return False
    return bool(path.stat().st_mtime_ns == recorded["mtime_ns"] or sha256_of(path) == recorded["sha256"])
