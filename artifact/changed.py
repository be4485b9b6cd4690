"""Files that were changed by hand: recorded as a step's, and not the bytes that it wrote any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifact.errors import ArtifactError
from artifact.manifest import Manifest, export_command, unchanged
from artifact.stale import command_of

MOST_BYTES = 64 << 20


def changed_files(artifact: Path, manifest: Manifest, *, most_bytes: int = MOST_BYTES) -> dict[str, str]:
    """File → the step that wrote it, of all that are missing or were changed.

    A file whose size is the recorded one and whose time is not is hashed, up to ``most_bytes``; larger ones are left to `inspect --verify`.
    """
    makers = {file: (name, record) for name, step in manifest["steps"].items() for file, record in step["outputs"].items()}
    asked = {file: name for file, (name, record) in makers.items() if record["size"] <= most_bytes or not _has_size(artifact / file, record["size"])}
    return {file: name for file, name in asked.items() if not _as_written(artifact, manifest, file)}


def require_unchanged(artifact: Path, manifest: Manifest, file: str) -> None:
    """Refuse a file that is not the one that its step wrote: what is made from it would be of nobody's model. What no step wrote is not judged.

    Raises:
        ArtifactError: it was changed; the hint is the command that makes it again.
    """
    makers = [name for name, step in manifest["steps"].items() if file in step["outputs"]]
    if makers and not _as_written(artifact, manifest, file):
        name = makers[-1]
        raise ArtifactError(
            f"{artifact / file} is not the file that {name} wrote: it was changed since",
            hint=f"{_command(artifact, name, manifest)} makes it again; `inspect {artifact} --verify` names every changed file",
        )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _as_written(artifact: Path, manifest: Manifest, file: str) -> bool:
    """Whether any step that wrote the file (two builds may write one engine graph) wrote what is there."""
    records = [step["outputs"][file] for step in manifest["steps"].values() if file in step["outputs"]]
    return any(unchanged(artifact / file, record) for record in records)


def _command(artifact: Path, step_id: str, manifest: Mapping[str, Any]) -> str:
    if step_id == "export":
        return export_command(artifact, manifest["model"])
    return command_of(artifact, step_id, manifest["steps"][step_id]["options"])
