"""Whose folder is this? What may be exported into, and what never is: somebody's documents, another model, a checkpoint's own files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from artifact.errors import ArtifactError
from artifact.journal import is_ours, read_record
from artifact.manifest import UNFINISHED, read_manifest
from artifact.tensor_file import WeightsMode


def check_belongs(artifact: Path, fingerprint: str, *, force: bool, weights: WeightsMode = "copy") -> None:
    """Refuse to export into a folder that holds another checkpoint, or any file that no export has begun.

    A lock or a journal proves nothing: a killed ``--weights reference`` leaves both in a checkpoint's own folder. Every file has to be named.

    Args:
        artifact: the folder, there or not.
        fingerprint: of the checkpoint.
        force: replace another checkpoint's artifact, and what is recorded of a checkpoint's own folder; never another's own files.
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
    foreign = next(_foreign(artifact), None)
    if foreign is not None and weights != "reference":
        raise ArtifactError(f"{artifact} is not empty and not an artifact folder (it holds {foreign})", hint="choose another --out")


def _foreign(artifact: Path) -> Iterator[str]:
    """Visible files and folders that no interrupted step of ours has begun."""
    journals = sorted(artifact.glob(UNFINISHED))
    ours = {path.name for path in journals}
    for record in map(read_record, journals):
        ours |= {file for file in record.named if is_ours(artifact, file, in_place=record.in_place)}
    folders = {parent.as_posix() for file in ours for parent in Path(file).parents}
    for folder, subfolders, files in os.walk(artifact):
        here = Path(folder).relative_to(artifact)
        known = {name: (here / name).as_posix() for name in sorted([*subfolders, *files]) if not name.startswith(".")}
        yield from (path for name, path in known.items() if path not in ours and not (name in subfolders and path in folders))
        subfolders[:] = [name for name in subfolders if name in known]


def _check_model(artifact: Path, model: dict[str, str], fingerprint: str, *, force: bool, weights: WeightsMode) -> None:
    held = model.get("weights", "copy")
    same = model["fingerprint"] == fingerprint
    if held == "reference" and weights != "reference":
        raise ArtifactError(
            f"{artifact} is the own folder of a checkpoint, {model['name']}, which an export must not alter", hint="choose another --out"
        )
    if held == "reference" and not same and not force:
        raise ArtifactError(f"{artifact} is another checkpoint now than the one that was exported", hint="--force to export it as it is now")
    if not same and not force:
        raise ArtifactError(
            f"{artifact} belongs to another checkpoint: {model['name']} from {model['source']}",
            hint="choose another --out, or --force to replace it",
        )
    if held == "copy" and weights == "none" and not force:
        raise ArtifactError(f"{artifact} holds its weights; --weights none would remove them", hint="choose another --out, or --force to remove them")
