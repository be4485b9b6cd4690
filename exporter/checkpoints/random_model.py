"""A checkpoint of made-up weights: any shape, no file, and the same bytes for a seed on every machine."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from artifact.config import LlamaConfig, unknown_keys
from artifact.errors import CheckpointError
from artifact.layout import EMBEDDING, tensor_shapes
from artifact.presets import preset
from exporter.checkpoints.huggingface import read_config_file
from exporter.checkpoints.protocol import CheckpointFacts, Write, folder_name
from exporter.checkpoints.random_values import fill, normal_table, stream

RECIPE = "random-1"
"""Changes with the numbers: an artifact of other numbers is another model."""
SOURCE = re.compile(r"random(?::(\d{1,18}))?")
NORM_STD, BIAS_STD = 0.05, 0.02
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
NOT_A_MODEL = "random weights: the structure can be proven on them, the quality of a model can't"


@dataclass(kw_only=True)
class RandomCheckpoint(CheckpointFacts):
    """Made-up float16 weights; attributes as in ``Checkpoint``."""

    seed: int
    format: str = "random"

    def read(self, name: str) -> Tensor:
        """One weight, float16; KeyError for a name the model does not have."""
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one weight, float16; element i does not depend on which rows are asked for."""
        shape = self.shapes[name]
        width = prod(shape[1:])
        output = np.empty((stop - start) * width, dtype=np.float16)
        fill(output, stream(self.seed, name), start * width, normal_table(*weight_scale(name, shape, self.config)))
        return torch.from_numpy(output).reshape(stop - start, *shape[1:])

    def write_sidecars(self, write: Write) -> list[str]:
        """Write config.json; there is no tokenizer."""
        with write("config.json") as target:
            target.write_text(json.dumps(self.config.to_hf(), indent=2) + "\n", encoding="utf-8")
        return ["config.json"]


def is_random(source: str) -> bool:
    """Whether a source asks for made-up weights: ``random`` or ``random:SEED``."""
    return source.split(":", maxsplit=1)[0] == "random"


def open_random(source: str, *, size: str | None = None, config: Path | None = None) -> RandomCheckpoint:
    """Make up a checkpoint.

    Args:
        source: ``random`` or ``random:SEED``; no seed is seed 0.
        size: a published size.
        config: a config.json of another shape.

    Raises:
        CheckpointError: the seed is no whole number, or there is no shape, or two.
        UsageError: no such size.
    """
    match = SOURCE.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source}: the seed must be a whole number", hint="random:7")
    if (size is None) == (config is None):
        raise CheckpointError(f"{source}: random weights need one shape", hint="--size 7b, or --config FILE with a config.json")
    if config is not None and not config.is_file():
        raise CheckpointError(f"--config {config}: no such file", hint="--config FILE takes a config.json as Hugging Face's models have it")
    seed = int(match[1] or 0)
    raw = read_config_file(config) if config is not None else {}
    shape = preset(size) if size is not None else LlamaConfig.from_hf(raw)
    shapes = tensor_shapes(shape)
    identity = hashlib.sha256(json.dumps([RECIPE, seed, asdict(shape)], sort_keys=True).encode()).hexdigest()
    return RandomCheckpoint(
        seed=seed,
        source=f"random:{seed}",
        name=folder_name(f"random-{size or (config.resolve().parent.name if config else '')}"),
        config=shape,
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, "F16"),
        dropped=[],
        unknown_config_keys=unknown_keys(raw) if raw else [],
        notes=[NOT_A_MODEL],
        fingerprint=identity,
        state=identity,
    )


def weight_scale(name: str, shape: tuple[int, ...], config: LlamaConfig) -> tuple[float, float]:
    """Standard deviation and mean of a weight, so that hidden states keep the size of one embedding at any depth.

    A linear keeps the variance of a normalised input (1/√in); the two outputs of a layer that are added to the residual stream share it among all
    layers (1/√(2·layers)). A tied embedding is a linear too, and the first norm makes up for its size; at twice a linear's scale, tokens stay apart
    in the hidden state, and the model does not just repeat its input.
    """
    if len(shape) == 1:
        return (NORM_STD, 1.0) if name.endswith("norm.weight") else (BIAS_STD, 0.0)
    if name == EMBEDDING:
        return (2 / sqrt(shape[1]) if config.tie_word_embeddings else 1.0), 0.0
    shared = sqrt(2 * config.num_hidden_layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    return 1 / (sqrt(shape[1]) * shared), 0.0
