"""Which safetensors files make up a Hugging Face folder, and which tensor is in which."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from artifact.errors import CheckpointError
from exporter.checkpoints.safetensors_file import SafetensorsFile, open_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name → the checked file it is in.

    Raises:
        CheckpointError: no safetensors, both forms at once, or an index that disagrees with the files or names one outside the folder.
    """
    single, index = inside(folder, SINGLE), inside(folder, INDEX)
    if single.is_file() and index.is_file():
        raise CheckpointError(f"{folder}: has both {SINGLE} and {INDEX}", hint="remove the one that is not meant")
    if single.is_file():
        file = open_safetensors(single)
        return dict.fromkeys(file.tensors, file)
    if not index.is_file():
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}", hint=_other_format(folder))
    return _open_indexed(folder, _weight_map(index))


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


def _open_indexed(folder: Path, weight_map: dict[str, str]) -> dict[str, SafetensorsFile]:
    files = {name: _open_named(folder, name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise CheckpointError(f"{INDEX}: tensor {tensor} should be in {name}, but is not there")
    return _by_tensor(files.values())


def _open_named(folder: Path, name: str) -> SafetensorsFile:
    path = inside(folder, name)
    if not path.is_file():
        raise CheckpointError(f"{folder}: {INDEX} names {name}, which is not there", hint="download the missing file")
    return open_safetensors(path)


def _by_tensor(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    owner: dict[str, SafetensorsFile] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor in owner:
                raise CheckpointError(f"tensor {tensor} is in two files: {owner[tensor].path.name} and {file.path.name}")
            owner[tensor] = file
    return owner


def _other_format(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return "the folder holds pytorch_model*.bin: load it in transformers and save_pretrained(..., safe_serialization=True)"
    if any(folder.glob("consolidated.*.pth")):
        return "the folder holds Meta's consolidated.*.pth: convert it to the Hugging Face form first"
    return "give a folder with *.safetensors, a .gguf file, or 'demo'"
