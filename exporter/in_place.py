"""`--weights reference`: the checkpoint's own folder becomes the artifact; graphs point into its shards, and nothing of it is altered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from artifact.errors import ExportError
from artifact.hashing import tensor_digest
from artifact.io_spec import Dtype
from artifact.progress import Progress
from artifact.tensor_file import StoredTensor
from exporter.blocks import STORED_DTYPES, tensor_blocks
from exporter.checkpoints import Checkpoint, CheckpointRequest
from exporter.checkpoints.protocol import InFiles

SAFETENSORS = "safetensors"
COPY = "--weights copy --out ART makes an artifact of its own"


def check_in_place(checkpoint: Checkpoint, request: CheckpointRequest, out: Path | None, dtype: Dtype) -> Path:
    """The folder that becomes the artifact.

    Raises:
        ExportError: the checkpoint can't be used as it lies; the reason is named.
    """
    if not isinstance(checkpoint, InFiles) or checkpoint.format != SAFETENSORS:
        raise ExportError(f"--weights reference takes a folder of safetensors; this checkpoint is {checkpoint.format}", hint=COPY)
    if request.lora is not None:
        raise ExportError("--weights reference can't merge an adapter: the checkpoint's bytes stay as they are", hint=COPY)
    folder = checkpoint.folder
    if out is not None and out.resolve() != folder.resolve():
        raise ExportError(f"--weights reference makes {folder} itself the artifact; --out names {out}", hint="leave --out away")
    for name in checkpoint.shapes:
        if (reason := _objection(checkpoint, name, dtype)) is not None:
            raise ExportError(f"--weights reference can't use {folder}: {reason}", hint=COPY)
    return folder


def places_of(checkpoint: InFiles, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[StoredTensor]:
    """Where each weight lies, as the artifact's graphs name it; hashes are empty."""
    for name, shape in shapes.items():
        place = checkpoint.place(name)
        assert place is not None, name  # check_in_place has seen to it
        yield StoredTensor(name, place.path.relative_to(checkpoint.folder).as_posix(), place.dtype, shape, place.offset, place.length)


def hash_in_place(checkpoint: Checkpoint, planned: list[StoredTensor], dtype: Dtype, progress: Progress) -> Iterator[StoredTensor]:
    """Read every weight once: its hash, and that it holds no NaN or Inf.

    Raises:
        ExportError: it does; the tensor is named.
    """
    for done, tensor in enumerate(planned):
        progress(f"checking {tensor.file}", done, len(planned))
        digest = tensor_digest()
        for block in tensor_blocks(checkpoint, tensor, dtype):
            digest.update(block)
        yield replace(tensor, blake3=digest.hexdigest())


def _objection(checkpoint: InFiles, name: str, dtype: Dtype) -> str | None:
    place = checkpoint.place(name)
    if place is None:
        return f"{name} does not lie row by row in a file"
    if place.dtype != STORED_DTYPES[dtype]:
        return f"{name} is {place.dtype}, an artifact of {dtype} holds {STORED_DTYPES[dtype]}"
    inside = [path for path in (place.path, *place.path.parents) if path.is_relative_to(checkpoint.folder) and path != checkpoint.folder]
    if any(path.is_symlink() for path in inside):
        return f"{place.path.name} is a link (a hub cache is made of them), and ONNX external data must be real files"
    if place.path.stat().st_nlink > 1:
        return f"{place.path.name} has a second name (a hard link), which onnx refuses as external data"
    return None
