"""What every checkpoint reader offers: names, shapes, dtypes, one tensor at a time, and the files that come along."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from artifact.config import LlamaConfig

Write = Callable[[str], AbstractContextManager[Path]]
"""``write(relative_path)``: a temporary path to fill, moved into place when the block ends well (``StepContext.write``)."""


class Checkpoint(Protocol):
    """An opened and checked checkpoint: whoever holds one may rely on every weight being there with the right shape.

    Attributes:
        source: absolute path, ``demo`` or ``random:SEED``.
        name: short model name, safe as a folder name.
        format: ``safetensors``, ``bin``, ``meta``, ``gguf`` or ``random``; with ``+lora`` where an adapter is merged.
        shapes: Hugging Face name → shape; the weights of the model and nothing else.
        dtypes: Hugging Face name → stored type in the format's own word (``BF16``, ``Q4_1``).
        dropped: tensors of the file that are not weights of the model.
        unknown_config_keys: config keys that no table knows.
        notes: what a user should know, one line each (no tokenizer, …).
        fingerprint: sha256 over config, headers, sizes and a sample of every tensor; says which checkpoint this is, not that its bytes are whole.
        state: sha256 over name, size and time of every file that is read, tokenizer included; another state is exported anew.
    """

    source: str
    name: str
    format: str
    config: LlamaConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    dropped: list[str]
    unknown_config_keys: list[str]
    notes: list[str]
    fingerprint: str
    state: str

    def read(self, name: str) -> Tensor:
        """One weight: float16, bfloat16 or float32 as stored; float32 for quantised blocks and where an adapter is merged.

        Raises:
            KeyError: the model has no weight of this name.
        """
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one weight, equal to ``read(name)[start:stop]``, in the memory of those rows.

        A tensor of one axis has its elements as rows. No page of the checkpoint stays mapped once the tensor is gone.

        Raises:
            KeyError: the model has no weight of this name.
        """
        ...

    def write_sidecars(self, write: Write) -> list[str]:
        """Write config.json and the tokenizer files as real files; returns their relative paths."""
        ...


@dataclass(kw_only=True)
class CheckpointFacts:
    """What every reader says about a checkpoint; attributes as in ``Checkpoint``."""

    source: str
    name: str
    format: str
    config: LlamaConfig
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)
    dropped: list[str]
    unknown_config_keys: list[str]
    notes: list[str]
    fingerprint: str
    state: str


@dataclass(frozen=True)
class Place:
    """Where a weight's bytes lie as they are: row by row, little-endian, in ``dtype`` (safetensors' word), from ``offset`` of the file."""

    path: Path
    dtype: str
    offset: int
    length: int


@runtime_checkable
class InFiles(Protocol):
    """A checkpoint whose weights may be copied or used where they lie, without being read as tensors; ``folder`` holds its files."""

    folder: Path
    format: str

    def place(self, name: str) -> Place | None:
        """Where one weight lies, row by row; None where it lies otherwise. KeyError for a name the model does not have."""
        ...


def folder_name(text: str) -> str:
    """A model name as a folder name: lower case, nothing but letters, digits, ``.``, ``_`` and ``-``."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip(".-") or "model"
