"""A checkpoint with a LoRA adapter merged into it as it is read: W + scaling·B·A."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from artifact.errors import CheckpointError
from exporter.checkpoints.fingerprint import fingerprint_files, state_of
from exporter.checkpoints.lora_config import CONFIG, LoraConfig, read_lora_config
from exporter.checkpoints.lora_tensors import Adapter, Factors, open_adapter
from exporter.checkpoints.protocol import Checkpoint, CheckpointFacts, Write, folder_name
from exporter.checkpoints.quantised_model import QuantisedCheckpoint
from exporter.checkpoints.request import local_path

ROWS = 128
"""Rows multiplied at once, counted from the first row of the weight: a row comes out the same whichever rows are asked for."""


@dataclass(kw_only=True)
class LoraCheckpoint(CheckpointFacts):
    """A checkpoint and an adapter; attributes as in ``Checkpoint``."""

    base: Checkpoint
    adapter: Adapter = field(repr=False)

    def read(self, name: str) -> Tensor:
        """One merged weight, float32 where the adapter adds to it; KeyError for a name the model does not have."""
        if name not in self.adapter.added and name not in self.adapter.replaced:
            return self.base.read(name)
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one merged weight; summed in float64 and rounded to float32 once."""
        replacement, factors = self.adapter.replaced.get(name), self.adapter.added.get(name)
        rows = self.base.read_rows(name, start, stop) if replacement is None else replacement.read_rows(start, stop)
        if factors is None:
            return rows
        merged = rows.float()
        first = start // ROWS * ROWS
        left, right = _both(factors, first, min(-(-stop // ROWS) * ROWS, self.shapes[name][0]))
        for block in range(first, stop, ROWS):
            low, high = max(block, start), min(block + ROWS, stop)
            factor = left[block - first : block - first + ROWS]
            total = torch.zeros(len(factor), right.shape[1], dtype=torch.float64)  # always a whole block: its size picks the order of the sums
            total[low - block : high - block] = merged[low - start : high - start]
            merged[low - start : high - start] = total.addmm_(factor, right, alpha=factors.scaling)[low - block : high - block]
        return merged

    def write_sidecars(self, write: Write) -> list[str]:
        """Those of the base model: an adapter changes weights alone."""
        return self.base.write_sidecars(write)


def with_adapter(base: Checkpoint, folder: Path) -> LoraCheckpoint:
    """Merge a PEFT adapter into a checkpoint.

    Args:
        base: in any format.
        folder: adapter_config.json with adapter_model.safetensors or .bin.

    Raises:
        CheckpointError: no such folder, another kind of adapter, or one that does not fit the model.
    """
    folder = local_path(str(folder)).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"--lora {folder}: no such folder", hint="--lora FOLDER takes what PEFT's save_pretrained writes")
    if isinstance(base, QuantisedCheckpoint):
        hint = "merge it into the float16 or bfloat16 original, and quantise that"
        raise CheckpointError(f"--lora {folder}: an adapter can't be merged into a quantised checkpoint: its integers would not hold", hint=hint)
    config = read_lora_config(folder)
    adapter = open_adapter(folder, config, base.shapes)
    return LoraCheckpoint(
        base=base,
        adapter=adapter,
        source=base.source,
        name=folder_name(f"{base.name}-{folder.name}"),
        config=base.config,
        shapes=base.shapes,
        dtypes={name: adapter.replaced[name].dtype if name in adapter.replaced else word for name, word in base.dtypes.items()},
        dropped=base.dropped,
        unknown_config_keys=[*base.unknown_config_keys, *(f"{CONFIG}: {key}" for key in config.unknown)],
        notes=[*base.notes, *_notes(folder, config, adapter)],
        fingerprint=_joined(base.fingerprint, _fingerprint(folder, adapter)),
        state=_joined(base.state, state_of([adapter.file.path, folder / CONFIG])),
        format=f"{base.format}+lora",
    )


def _both(factors: Factors, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows [start, stop) of the left factor and the whole right one, float64: [rows, r] and [r, in]."""
    if factors.embedding:  # A is [r, V] and B [E, r]: what is added to the embedding [V, E] is (B·A) turned round
        return factors.a.read()[:, start:stop].t().contiguous().double(), factors.b.read().t().contiguous().double()
    return factors.b.read_rows(start, stop).double(), factors.a.read().double()


def _notes(folder: Path, config: LoraConfig, adapter: Adapter) -> list[str]:
    notes = [f"adapter {folder.name}: added to {len(adapter.added)} weights, replaces {len(adapter.replaced)}"]
    if config.fan_in_fan_out:
        notes.append(f"adapter {folder.name}: fan_in_fan_out is for transposed layers, which a Llama has none of; ignored, as PEFT does")
    return notes


def _fingerprint(folder: Path, adapter: Adapter) -> str:
    spans = sorted({(tensor.offset, tensor.length) for tensor in adapter.file.tensors.values()})
    return fingerprint_files((folder / CONFIG).read_bytes(), [(adapter.file.path, adapter.file.header_bytes, spans)])


def _joined(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
