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
    return {file: name for file, name in asked.items() if written_digest(artifact, manifest, file) is None}


def require_unchanged(artifact: Path, manifest: Manifest, file: str) -> str | None:
    """Refuse a file that is not the one that its step wrote: what is made from it would be of nobody's model. What no step wrote is not judged.

    Returns:
        Its hash; None where no step wrote it.

    Raises:
        ArtifactError: it was changed; the hint is the command that makes it again.
    """
    makers = [name for name, step in manifest["steps"].items() if file in step["outputs"]]
    digest = written_digest(artifact, manifest, file)
    if makers and digest is None:
        name = makers[-1]
        raise ArtifactError(
            f"{artifact / file} is not the file that {name} wrote: it was changed since",
            hint=f"{_command(artifact, name, manifest)} makes it again; `inspect {artifact} --verify` names every changed file",
        )
    return digest


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def written_digest(artifact: Path, manifest: Manifest, file: str) -> str | None:
    """The hash that a step recorded of what is there; None where none of those that wrote the file did (two builds may write one engine graph)."""
    records = [step["outputs"][file] for step in manifest["steps"].values() if file in step["outputs"]]
    return next((record["sha256"] for record in records if unchanged(artifact / file, record)), None)


def _command(artifact: Path, step_id: str, manifest: Mapping[str, Any]) -> str:
    if step_id == "export":
        return export_command(artifact, manifest["model"])
    return command_of(artifact, step_id, manifest["steps"][step_id]["options"])
