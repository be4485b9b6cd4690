"""A folder's format, by what lies in it; one reader each."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import ArtifactError, CheckpointError
from artifact.manifest import MANIFEST, read_manifest
from exporter.checkpoints.huggingface import open_huggingface
from exporter.checkpoints.json_file import CONFIG
from exporter.checkpoints.meta_config import PARAMS
from exporter.checkpoints.meta_model import open_meta
from exporter.checkpoints.meta_parts import PART
from exporter.checkpoints.protocol import Checkpoint
from exporter.checkpoints.quantised import read_quantised_config
from exporter.checkpoints.quantised_model import open_quantised
from exporter.checkpoints.shards import has_weights


def open_folder(folder: Path, *, size: str | None = None) -> Checkpoint:
    """Open a Hugging Face or a Meta folder; one that holds both, as the hub's do, is read as Hugging Face's.

    Raises:
        CheckpointError: an artifact that this toolkit made, no format that can be read, or as the reader of the format says.
    """
    _refuse_artifact(folder)
    names = {path.name for path in folder.iterdir()}
    meta = PARAMS in names or any(PART.fullmatch(name) for name in names)
    if meta and not (CONFIG in names and has_weights(folder)):
        return open_meta(folder, size=size)
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ggufs and CONFIG not in names:
        raise CheckpointError(f"{folder}: a folder with GGUF files and no {CONFIG}", hint=f"give one of its files: {folder / ggufs[0]}")
    return open_quantised(folder) if CONFIG in names and read_quantised_config(folder) else open_huggingface(folder)


def _refuse_artifact(folder: Path) -> None:
    """Say of an artifact folder what it is; one that is the checkpoint's own folder is both."""
    try:
        model = read_manifest(folder)["model"] if (folder / MANIFEST).is_file() else None
    except ArtifactError:  # another tool's manifest.json
        return
    if model is not None and model.get("weights") != "reference":
        raise CheckpointError(
            f"{folder} is an artifact that was exported from {model['source']}, and no checkpoint",
            hint=f"python cli.py fuse {folder} goes on with it; --checkpoint {model['source']} exports the same model again",
        )
