"""manifest.json: what an artifact is and which steps made it. Every file is written under a temporary name, synced and renamed; the manifest last."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifact.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = 1
LOCK = ".lock"
_TEMPORARY = ".tmp-"
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


def require_artifact(artifact: Path) -> Manifest:
    """The manifest of a folder that must be an artifact, with graphs of the form that the steps after export take.

    Raises:
        ArtifactError: no such folder, nothing was exported into it, or its graph has a static cache, which only export and inspect know yet.
    """
    manifest = read_manifest(artifact) if artifact.is_dir() else None
    if manifest is None or manifest["model"] is None:
        raise ArtifactError(f"{artifact} is not an artifact folder", hint=f"python cli.py export --checkpoint SRC --out {artifact}")
    if manifest["model"].get("kv_cache", "dynamic") == "static":
        raise ArtifactError(
            f"{artifact} has a static KV cache: fuse, quantize, build, validate and generate of that form are not there yet",
            hint="export with --kv-cache dynamic into another folder; only export and inspect know the static form",
        )
    return manifest


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success sync and rename it, on failure remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_TEMPORARY + path.name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def locked(artifact: Path) -> Iterator[None]:
    """Hold the folder's lock, and clear away what a killed run left unfinished; may be nested within one process.

    A folder that is empty at the end, because the step failed before its first file, is removed.

    Raises:
        ArtifactError: another process holds it.
    """
    folder = artifact.resolve()
    if folder in _held:
        yield
        return
    with _lock_file(folder):
        _held.add(folder)
        try:
            for leftover in folder.rglob(_TEMPORARY + "*"):
                leftover.unlink()
            yield
        finally:
            _held.discard(folder)
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


@contextmanager
def _lock_file(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = (folder / LOCK).stat().st_ino == os.fstat(file.fileno()).st_ino  # not one that its holder has just removed
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise ArtifactError(f"another run is working in {folder}", hint="wait for it to end, or choose another --out")
        yield


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size, time and SHA-256 of a file: what tells whether it is still the one that a step wrote."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}


def unchanged(path: Path, recorded: dict[str, Any]) -> bool:
    """Whether a file is the recorded one: by size and time, and by hash where only the time differs."""
    if not path.is_file() or path.stat().st_size != recorded["size"]:
        return False
    return bool(path.stat().st_mtime_ns == recorded["mtime_ns"] or sha256_of(path) == recorded["sha256"])
