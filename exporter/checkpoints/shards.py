"""Which files make up the weights of a Hugging Face folder, and which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from artifact.errors import CheckpointError
from exporter.checkpoints.file_tensor import TensorFile
from exporter.checkpoints.safetensors_file import open_safetensors
from exporter.checkpoints.torch_file import open_torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardForm:
    """One way to store the weights: its name, the file where there is one, the index where there are several, and what opens a file."""

    name: str
    single: str
    index: str
    open: Callable[[Path], TensorFile]


FORMS = (
    ShardForm("safetensors", SINGLE, INDEX, open_safetensors),
    ShardForm("bin", "pytorch_model.bin", "pytorch_model.bin.index.json", open_torch),
)
"""In the order of preference: a folder that has both has the same weights twice."""


def has_weights(folder: Path) -> bool:
    """Whether the folder stores weights in one of Hugging Face's forms."""
    return any((folder / name).is_file() for form in FORMS for name in (form.single, form.index))


def form_of(folder: Path) -> ShardForm:
    """How the folder stores its weights.

    Raises:
        CheckpointError: in none of the forms.
    """
    for form in FORMS:
        if (folder / form.single).is_file() or (folder / form.index).is_file():
            return form
    raise CheckpointError(f"{folder}: none of {', '.join(name for form in FORMS for name in (form.single, form.index))}", hint=_leftover(folder))


def open_shards(folder: Path) -> dict[str, TensorFile]:
    """Tensor name → the checked file it is in.

    Raises:
        CheckpointError: no weights, one file and an index at once, or an index that disagrees with the files or names one outside the folder.
    """
    form = form_of(folder)
    single, index = inside(folder, form.single), inside(folder, form.index)
    if single.is_file() and index.is_file():
        raise CheckpointError(f"{folder}: has both {form.single} and {form.index}", hint="remove the one that is not meant")
    if single.is_file():
        file = form.open(single)
        return dict.fromkeys(file.tensors, file)
    return _open_indexed(folder, form, _weight_map(index))


def inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder, however strangers named it; it need not exist.

    Raises:
        CheckpointError: absolute, above the folder, or a link that leaves it (links into the ``blobs`` of a hub cache are fine).
    """
    path = folder / name
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise CheckpointError(f"{folder}: the checkpoint names {name!r}, which is not a path inside the folder")
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent.resolve() / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{folder}: {name} is a link to {target}, outside the folder", hint="put the real file in its place")
    return path


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) for file in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no weight_map can be read from it: {error!r}") from error
    raise CheckpointError(f"{index}: weight_map must map tensor names to file names")


def _open_indexed(folder: Path, form: ShardForm, weight_map: dict[str, str]) -> dict[str, TensorFile]:
    files = {name: _open_named(folder, form, name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise CheckpointError(f"{form.index}: tensor {tensor} should be in {name}, but is not there")
    return _by_tensor(files.values())


def _open_named(folder: Path, form: ShardForm, name: str) -> TensorFile:
    path = inside(folder, name)
    if not path.is_file():
        raise CheckpointError(f"{folder}: {form.index} names {name}, which is not there", hint="download the missing file")
    return form.open(path)


def _by_tensor(files: Iterable[TensorFile]) -> dict[str, TensorFile]:
    owner: dict[str, TensorFile] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor in owner:
                raise CheckpointError(f"tensor {tensor} is in two files: {owner[tensor].path.name} and {file.path.name}")
            owner[tensor] = file
    return owner


def _leftover(folder: Path) -> str:
    """What to do in a folder whose shards have no index."""
    shards = sorted(path.name for pattern in ("model-*.safetensors", "pytorch_model-*.bin") for path in folder.glob(pattern))
    if shards:
        return f"the folder holds {shards[0]} without its index: download that too"
    return "give a folder with *.safetensors or pytorch_model*.bin, Meta's consolidated.*.pth with params.json, a .gguf file, or 'demo'"
