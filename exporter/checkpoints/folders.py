"""A folder's format, by what lies in it; one reader each."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import CheckpointError
from exporter.checkpoints.huggingface import CONFIG, open_huggingface
from exporter.checkpoints.meta_config import PARAMS
from exporter.checkpoints.meta_model import open_meta
from exporter.checkpoints.meta_parts import PART
from exporter.checkpoints.protocol import Checkpoint
from exporter.checkpoints.shards import has_weights


def open_folder(folder: Path, *, size: str | None = None) -> Checkpoint:
    """Open a Hugging Face or a Meta folder; one that holds both, as the hub's do, is read as Hugging Face's.

    Raises:
        CheckpointError: no format that can be read, or as the reader of the format says.
    """
    names = {path.name for path in folder.iterdir()}
    meta = PARAMS in names or any(PART.fullmatch(name) for name in names)
    if meta and not (CONFIG in names and has_weights(folder)):
        return open_meta(folder, size=size)
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ggufs and CONFIG not in names:
        raise CheckpointError(f"{folder}: a folder with GGUF files and no {CONFIG}", hint=f"give one of its files: {folder / ggufs[0]}")
    return open_huggingface(folder)
