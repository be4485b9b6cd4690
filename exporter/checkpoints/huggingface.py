"""Read a Hugging Face folder: config.json, and the weights as safetensors or ``.bin``, one file or shards with an index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifact.config import LlamaConfig, unknown_keys
from artifact.errors import CheckpointError
from exporter.checkpoints.census import check_tensors
from exporter.checkpoints.file_tensor import TORCH_DTYPES, TensorFile
from exporter.checkpoints.fingerprint import fingerprint_files, state_of
from exporter.checkpoints.json_file import CONFIG, read_object
from exporter.checkpoints.protocol import CheckpointFacts, Place, Write, folder_name
from exporter.checkpoints.quantised import CONFIG_KEYS, MODELOPT_FILE, read_quantised_config, refuse_quantised_tensors
from exporter.checkpoints.shards import form_of, inside, open_shards
from exporter.checkpoints.vocabulary import model_notes, tokenizer_size

CONFIGS = (CONFIG, MODELOPT_FILE)
"""What says which model it is."""
SIDECARS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "generation_config.json"),
)
"""Data that comes along; never code."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
ROWS = 1024
"""Rows compared at once."""
NO_TOKENIZER = "the checkpoint has no tokenizer files: text needs them, the weights don't"


@dataclass(kw_only=True)
class HuggingFaceCheckpoint(CheckpointFacts):
    """A checked folder; attributes as in ``Checkpoint``."""

    folder: Path
    files: dict[str, TensorFile] = field(repr=False)

    def read(self, name: str) -> Tensor:
        """One weight as stored; KeyError for a name the model does not have."""
        return self.files[name].tensors[name].read()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one weight as stored; KeyError for a name the model does not have."""
        return self.files[name].tensors[name].read_rows(start, stop)

    def place(self, name: str) -> Place | None:
        """Where one weight lies, None where its rows do not follow each other; KeyError for a name the model does not have."""
        tensor = self.files[name].tensors[name]
        return Place(tensor.path, tensor.dtype, tensor.offset, tensor.length) if tensor.in_order else None

    def write_sidecars(self, write: Write) -> list[str]:
        """Copy config.json and the tokenizer files, byte for byte and as real files."""
        names = [name for name in (CONFIG, *SIDECARS) if (self.folder / name).is_file()]
        for name in names:
            with write(name) as target:
                shutil.copyfile(self.folder / name, target)
        return names


def open_huggingface(folder: Path) -> HuggingFaceCheckpoint:
    """Open a folder and check all of it but the values.

    Raises:
        CheckpointError: no or an unsupported config.json, no weights, a broken file, or tensors that disagree with the config.
    """
    folder = folder.resolve()
    raw = read_config(folder)
    files = open_shards(folder)
    refuse_quantised_tensors(folder, files)
    _check_dtypes(files)
    return HuggingFaceCheckpoint(**facts_of(folder, raw, files, {name: file.tensors[name].shape for name, file in files.items()}))


def facts_of(folder: Path, raw: dict[str, Any], files: dict[str, TensorFile], found: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a checkpoint says of itself, checked against its config.

    Args:
        folder: resolved.
        raw: its config.json.
        files: tensor name → file, of all that is stored.
        found: name → shape of what the reader gives as weights.

    Raises:
        CheckpointError: tensors that disagree with the config, or a sidecar that is a link out of the folder.
    """
    config = LlamaConfig.from_hf(raw)
    for name in SIDECARS:
        inside(folder, name)
    shapes, dropped = check_tensors(config, found, equal=lambda ours, theirs: _equal(files, ours, theirs))
    return {
        "folder": folder,
        "files": files,
        "source": str(folder),
        "name": folder_name(_model_name(folder)),
        "config": config,
        "shapes": shapes,
        "dtypes": {name: files[name].tensors[name].dtype for name in shapes if name in files},
        "dropped": dropped,
        "unknown_config_keys": unknown_keys(raw),
        "notes": [*model_notes(config, tokenizer_size(folder)), *_tokenizer_notes(folder)],
        "fingerprint": _fingerprint(read_config_file(folder / CONFIG), files),
        "state": state_of([*(file.path for file in files.values()), *(path for name in (*CONFIGS, *SIDECARS) if (path := folder / name).is_file())]),
        "format": form_of(folder).name,
    }


def _tokenizer_notes(folder: Path) -> list[str]:
    return [] if any((folder / name).is_file() for name in TOKENIZERS) else [NO_TOKENIZER]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json without what it says of a quantisation.

    Raises:
        CheckpointError: no config.json, not a JSON object, or weights that are quantised in a way that is not read.
    """
    config = read_config_file(inside(folder, CONFIG))
    read_quantised_config(folder)
    return {key: value for key, value in config.items() if key not in CONFIG_KEYS}


def read_config_file(path: Path) -> dict[str, Any]:
    """A config.json as it is.

    Raises:
        CheckpointError: no such file, or not a JSON object.
    """
    return read_object(path, hint=f"a Hugging Face model folder has {CONFIG} and *.safetensors or *.bin")


def _equal(files: dict[str, TensorFile], ours: str, theirs: str) -> bool:
    """Whether two tensors hold the same values, compared a few rows at a time."""
    left, right = files[ours].tensors[ours], files[theirs].tensors[theirs]
    blocks = range(0, left.shape[0], ROWS)
    return all(torch.equal(left.read_rows(at, min(at + ROWS, left.shape[0])), right.read_rows(at, min(at + ROWS, left.shape[0]))) for at in blocks)


def _check_dtypes(files: dict[str, TensorFile]) -> None:
    for name, file in files.items():
        dtype = file.tensors[name].dtype
        if dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{file.path.name}: tensor {name} has dtype {dtype}; supported: {', '.join(TORCH_DTYPES)}")


def _model_name(folder: Path) -> str:
    if folder.parent.name == "snapshots":  # hub cache: models--meta-llama--Llama-2-7b-hf/snapshots/<revision>
        return folder.parent.parent.name.rsplit("--", 1)[-1]
    return folder.name


def _fingerprint(config: dict[str, Any], files: dict[str, TensorFile]) -> str:
    unique = sorted({file.path: file for file in files.values()}.items())
    spans = ((file.path, file.header_bytes, sorted({(tensor.offset, tensor.length) for tensor in file.tensors.values()})) for _, file in unique)
    return fingerprint_files(json.dumps(config, sort_keys=True).encode(), spans)
