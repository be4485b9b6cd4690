"""Whose folder is this? What may be exported into, and what never is: somebody's documents, another model, a checkpoint's own files."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import ArtifactError
from artifact.journal import unfinished_steps
from artifact.manifest import LOCK, read_manifest
from artifact.tensor_file import WeightsMode


def check_belongs(artifact: Path, fingerprint: str, *, force: bool, weights: WeightsMode = "copy") -> None:
    """Refuse to export into a folder that holds another checkpoint, or something that is no artifact.

    Args:
        artifact: the folder, there or not.
        fingerprint: of the checkpoint.
        force: replace another checkpoint's artifact; never another's own files.
        weights: ``reference`` takes the checkpoint's own folder, whose files are foreign.

    Raises:
        ArtifactError: the folder belongs to another checkpoint and ``force`` is not given, or holds foreign files.
    """
    if not artifact.exists():
        return
    if not artifact.is_dir():
        raise ArtifactError(f"{artifact} is a file, not a folder", hint="choose another --out")
    model = read_manifest(artifact)["model"]
    if model is not None:
        _check_model(artifact, model, fingerprint, force=force, weights=weights)
        return
    foreign = [path.name for path in artifact.iterdir() if not path.name.startswith(".")]
    ours = bool(unfinished_steps(artifact)) or (artifact / LOCK).exists()  # an export marks a folder before its first file
    if foreign and not ours and weights != "reference":
        raise ArtifactError(f"{artifact} is not empty and not an artifact folder (it holds {sorted(foreign)[0]})", hint="choose another --out")


def _check_model(artifact: Path, model: dict[str, str], fingerprint: str, *, force: bool, weights: WeightsMode) -> None:
    held = model.get("weights", "copy")
    same = model["fingerprint"] == fingerprint
    if held == "reference" and not (same and weights == "reference"):
        raise ArtifactError(
            f"{artifact} is the own folder of a checkpoint, {model['name']}, which an export must not alter", hint="choose another --out"
        )
    if not same and not force:
        raise ArtifactError(
            f"{artifact} belongs to another checkpoint: {model['name']} from {model['source']}",
            hint="choose another --out, or --force to replace it",
        )
    if held == "copy" and weights == "none" and not force:
        raise ArtifactError(f"{artifact} holds its weights; --weights none would remove them", hint="choose another --out, or --force to remove them")
