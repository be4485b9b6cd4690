"""Which files of a model are needed: one form of its weights, its config and its tokenizer; twins in other forms are left alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from artifact.errors import CheckpointError
from exporter.checkpoints.huggingface import CONFIGS, SIDECARS
from exporter.checkpoints.shards import FORMS as SHARD_FORMS

FORMS = tuple((form.name, form.single, form.index) for form in SHARD_FORMS)
"""Form, its one file, and the index of its shards; the first form that a model has is read."""
META_CONFIG = "params.json"


@dataclass(frozen=True)
class Wanted:
    """Names of the files that are read, relative to the model's folder: the small ones, and those that hold weights."""

    small: tuple[str, ...]
    weights: tuple[str, ...]


def choose_files(names: Collection[str], read_index: Callable[[str], Path], where: str) -> Wanted:
    """Pick what is read of a model.

    Args:
        names: every file that the model has.
        read_index: gives a local path of a small file among ``names``; an index is needed to know its shards.
        where: the model, for messages.

    Raises:
        CheckpointError: no weights in a form that is read, or an index that names a file the model does not have.
    """
    small = tuple(name for name in (*CONFIGS, *SIDECARS) if name in names)
    for _, single, index in FORMS:
        if single in names:
            return Wanted(small, (single,))
        if index in names:
            return Wanted((*small, index), _shards(read_index(index), names, where))
    parts = tuple(sorted(name for name in names if PurePosixPath(name).match("consolidated.*.pth") and "/" not in name))
    if parts and META_CONFIG in names:
        return Wanted((META_CONFIG, *small), parts)
    raise CheckpointError(f"{where}: no weights that can be read: no {' or '.join(single for _, single, _ in FORMS)}", hint=_other_form(names, where))


def usual_files(names: Collection[str]) -> list[str]:
    """What ``choose_files`` would pick where no index can be read: shards by the names that they usually have."""
    for _, single, _ in FORMS:
        stem, _, suffix = single.rpartition(".")
        if weights := [name for name in names if re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.{suffix}(\.index\.json)?", name)]:
            return sorted([*weights, *(name for name in (*CONFIGS, *SIDECARS) if name in names)])
    return []


def shard_names(index: Path) -> tuple[str, ...]:
    """The files that an index names, sorted.

    Raises:
        CheckpointError: it is no index, or names something that is not a path inside the folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no weight_map can be read from it: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{index.name} names {name!r}, which is not a path inside the folder")
    return tuple(names)


def _shards(index: Path, names: Collection[str], where: str) -> tuple[str, ...]:
    shards = shard_names(index)
    if absent := [name for name in shards if name not in names]:
        raise CheckpointError(f"{where}: {index.name} names {absent[0]}, which the model does not have", hint="another --revision may be whole")
    return shards


def _other_form(names: Collection[str], where: str) -> str:
    if any(name.endswith(".gguf") for name in names):
        return f"it holds GGUF files: `hf download {where.partition('@')[0]} FILE.gguf`, then give the path it prints"
    if any(name.startswith("adapter_model.") for name in names):
        return "it holds a LoRA adapter: download it, and give its folder as --lora beside the model it was made for"
    return "give another model, or a folder with *.safetensors"
