"""The published Llama sizes as one table: what ``--size`` means, and where the weights are.

Shapes and epsilons are those of Meta's params.json and of the config.json in the Hugging Face repositories. Meta's files give no ffn width:
it is two thirds of 4 × hidden_size (× 1.3 for 70B), rounded up to ``multiple_of``; the table holds the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError, UsageError

VOCABULARY = 32000


@dataclass(frozen=True)
class Preset:
    """One row of the table.

    Attributes:
        repository: of the published Hugging Face model; None where there is none.
        layers, hidden, ffn, heads, kv_heads: the shape.
        context: positions it was trained on. The first files of Llama 2 said 2048; the model is the same.
        epsilon: ``rms_norm_eps`` of today's files. A checkpoint's own value is always the one used: the first 7b-chat files said 1e-6.
    """

    repository: str | None
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    context: int
    epsilon: float


PRESETS: Mapping[str, Preset] = {
    "7b": Preset("meta-llama/Llama-2-7b-hf", 32, 4096, 11008, 32, 32, 4096, 1e-5),
    "13b": Preset("meta-llama/Llama-2-13b-hf", 40, 5120, 13824, 40, 40, 4096, 1e-5),
    "70b": Preset("meta-llama/Llama-2-70b-hf", 80, 8192, 28672, 64, 8, 4096, 1e-5),
    "7b-chat": Preset("meta-llama/Llama-2-7b-chat-hf", 32, 4096, 11008, 32, 32, 4096, 1e-5),
    "13b-chat": Preset("meta-llama/Llama-2-13b-chat-hf", 40, 5120, 13824, 40, 40, 4096, 1e-5),
    "70b-chat": Preset("meta-llama/Llama-2-70b-chat-hf", 80, 8192, 28672, 64, 8, 4096, 1e-5),
    "llama1-7b": Preset(None, 32, 4096, 11008, 32, 32, 2048, 1e-6),
    "llama1-13b": Preset(None, 40, 5120, 13824, 40, 40, 2048, 1e-6),
    "llama1-33b": Preset(None, 60, 6656, 17920, 52, 52, 2048, 1e-6),
    "llama1-65b": Preset(None, 80, 8192, 22016, 64, 64, 2048, 1e-5),
}


def preset(size: str) -> LlamaConfig:
    """The shape of a published size.

    Raises:
        UsageError: no such size.
    """
    row = _row(size)
    return LlamaConfig(
        hidden_size=row.hidden,
        intermediate_size=row.ffn,
        num_hidden_layers=row.layers,
        num_attention_heads=row.heads,
        num_key_value_heads=row.kv_heads,
        head_dim=row.hidden // row.heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=row.context,
        rms_norm_eps=row.epsilon,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def repository(size: str) -> str:
    """The Hugging Face repository of a published size.

    Raises:
        UsageError: no such size.
        CheckpointError: one that was never published there.
    """
    row = _row(size)
    if row.repository is None:
        raise CheckpointError(
            f"--size {size}: Llama 1 was handed out on request and has no published repository",
            hint=f"--size {size} --checkpoint FOLDER says where its weights are",
        )
    return row.repository


def _row(size: str) -> Preset:
    if size not in PRESETS:
        raise UsageError(f"--size {size!r} is not a published size", hint=f"one of: {' '.join(PRESETS)}")
    return PRESETS[size]
