"""Read a Hugging Face folder: config.json, and model.safetensors or shards with an index."""

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
from exporter.checkpoints.fingerprint import fingerprint_files, state_of
from exporter.checkpoints.protocol import Place, Write, folder_name
from exporter.checkpoints.safetensors_file import SUPPORTED, SafetensorsFile
from exporter.checkpoints.shards import inside, open_shards
from exporter.checkpoints.vocabulary import model_notes, tokenizer_size

CONFIG = "config.json"
SIDECARS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "generation_config.json"),
)
"""Data that comes along; never code."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
NO_TOKENIZER = "the checkpoint has no tokenizer files: text needs them, the weights don't"


@dataclass(kw_only=True)
class HuggingFaceCheckpoint:
    """A checked folder; attributes as in ``Checkpoint``."""

    folder: Path
    files: dict[str, SafetensorsFile] = field(repr=False)
    source: str
    name: str
    config: LlamaConfig
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)
    dropped: list[str]
    unknown_config_keys: list[str]
    notes: list[str]
    fingerprint: str
    state: str
    format: str = "safetensors"

    def read(self, name: str) -> Tensor:
        """One weight as stored, mapped; KeyError for a name the model does not have."""
        return self.files[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one weight as stored; KeyError for a name the model does not have."""
        return self.files[name].read_rows(name, start, stop)

    def place(self, name: str) -> Place:
        """Where one weight lies; KeyError for a name the model does not have."""
        dtype, _, offset, length = self.files[name].tensors[name]
        return Place(self.files[name].path, dtype, offset, length)

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
        CheckpointError: no or an unsupported config.json, no safetensors, a broken file, or tensors that disagree with the config.
    """
    folder = folder.resolve()
    raw = read_config(folder)
    config = LlamaConfig.from_hf(raw)
    for name in SIDECARS:
        inside(folder, name)
    files = open_shards(folder)
    _check_dtypes(files)
    found = {name: file.tensors[name][1] for name, file in files.items()}
    shapes, dropped = check_tensors(config, found, equal=lambda ours, theirs: torch.equal(files[ours].read(ours), files[theirs].read(theirs)))
    return HuggingFaceCheckpoint(
        folder=folder,
        files=files,
        source=str(folder),
        name=folder_name(_model_name(folder)),
        config=config,
        shapes=shapes,
        dtypes={name: files[name].tensors[name][0] for name in shapes},
        dropped=dropped,
        unknown_config_keys=unknown_keys(raw),
        notes=[*model_notes(config, tokenizer_size(folder)), *_tokenizer_notes(folder)],
        fingerprint=_fingerprint(raw, files),
        state=state_of([*(file.path for file in files.values()), *(folder / name for name in (CONFIG, *SIDECARS) if (folder / name).is_file())]),
    )


def _tokenizer_notes(folder: Path) -> list[str]:
    return [] if any((folder / name).is_file() for name in TOKENIZERS) else [NO_TOKENIZER]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; refuses quantised checkpoints by the name of their method.

    Raises:
        CheckpointError: no config.json, not a JSON object, or a ``quantization_config``.
    """
    try:
        config = json.loads(inside(folder, CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {CONFIG}", hint=f"give a Hugging Face model folder: {CONFIG} and *.safetensors in it") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG}: expected a JSON object, got {type(config).__name__}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        hint = "give the float16 or bfloat16 original; `quantize` makes the int8 graph"
        raise CheckpointError(f"{folder}: the checkpoint is quantised ({method!r}); supported: not quantised", hint=hint)
    return config


def _check_dtypes(files: dict[str, SafetensorsFile]) -> None:
    for name, file in files.items():
        dtype = file.tensors[name][0]
        if dtype not in SUPPORTED:
            raise CheckpointError(f"{file.path.name}: tensor {name} has dtype {dtype}; supported: {', '.join(SUPPORTED)}")


def _model_name(folder: Path) -> str:
    if folder.parent.name == "snapshots":  # hub cache: models--meta-llama--Llama-2-7b-hf/snapshots/<revision>
        return folder.parent.parent.name.rsplit("--", 1)[-1]
    return folder.name


def _fingerprint(config: dict[str, Any], files: dict[str, SafetensorsFile]) -> str:
    unique = sorted({file.path: file for file in files.values()}.items())
    spans = ((file.path, file.header_bytes, sorted((entry[2], entry[3]) for entry in file.tensors.values())) for _, file in unique)
    return fingerprint_files(json.dumps(config, sort_keys=True).encode(), spans)
