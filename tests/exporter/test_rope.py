"""The rotary tables against transformers' own, bit for bit, for every kind of scaling and far beyond the original length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from artifact.config import LlamaConfig
from exporter.rope import deinterleave, rotary_tables

POSITIONS = 4096
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 512}
FACTORS = [1.0 + 0.1 * index for index in range(32)]
KINDS: dict[str, list[dict[str, Any]]] = {
    "default": [{"rope_type": "default"}],
    "linear": [{"rope_type": "linear", "factor": factor} for factor in (1.0, 2.0, 2.7)],
    "dynamic": [{"rope_type": "dynamic", "factor": factor} for factor in (1.0, 2.0, 2.7)],
    "llama3": [LLAMA3 | {"factor": factor} for factor in (8.0, 32.0)] + [LLAMA3 | {"factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0}],
    "yarn": [YARN | {"factor": factor} for factor in (1.0, 4.0, 8.0)],
    "yarn-attention-factor": [YARN | {"factor": 8.0, "attention_factor": 1.3}, YARN | {"factor": 8.0, "attention_factor": 1.0}],
    "yarn-mscale": [YARN | {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.5}, YARN | {"factor": 8.0, "mscale": 0.7}],
    "yarn-beta": [YARN | {"factor": 8.0, "beta_fast": fast, "beta_slow": slow} for fast, slow in ((16.0, 2.0), (1.0, 32.0), (4.0, 4.0))],
    "yarn-not-truncated": [YARN | {"factor": 8.0, "truncate": False}, YARN | {"factor": 8.0, "truncate": False, "beta_fast": 1.0}],
    "yarn-factor-from-lengths": [YARN | {"factor": None}],
    "longrope-of-one-list": [{"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "attention_factor": 1.1, "factor": 8.0}],
}
CASES = [pytest.param(rope, id=f"{kind}-{index}") for kind, ropes in KINDS.items() for index, rope in enumerate(ropes)]


def theirs(config: transformers.LlamaConfig, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), torch.arange(POSITIONS)[None])
    assert torch.equal(cos[..., :32], cos[..., 32:])
    return cos[0, :, :32], sin[0, :, :32]


def huggingface(**fields: Any) -> transformers.LlamaConfig:
    shape = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 32}
    return transformers.LlamaConfig(**shape, max_position_embeddings=POSITIONS, **fields)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("rope", CASES)
def test_rotary_tables_are_those_of_transformers(rope: dict[str, Any], theta: float) -> None:
    source = huggingface(rope_parameters=rope | {"rope_theta": theta})
    for dtype in (torch.float32, torch.float16):
        ours = rotary_tables(LlamaConfig.from_hf(source.to_dict()), dtype)
        assert all(torch.equal(table, expected) for table, expected in zip(ours, theirs(source, dtype), strict=True))


@pytest.mark.parametrize("rope", CASES)
def test_config_that_is_written_means_the_same_tables(rope: dict[str, Any]) -> None:
    """transformers reads our own config.json; `rope_scaling` and `rope_theta` apart, as files of Hugging Face have it."""
    source = huggingface(rope_scaling=dict(rope), rope_theta=20000.0)
    config = LlamaConfig.from_hf(source.to_dict())
    written = transformers.LlamaConfig(**config.to_hf())
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert all(torch.equal(ours, expected) for ours, expected in zip(theirs(written, torch.float32), theirs(source, torch.float32), strict=True))


def test_dynamic_scaling_begins_where_the_tables_end() -> None:
    """What transformers computes for one position more is another model; below it, no number differs from the unscaled one."""
    source = huggingface(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    rotary = LlamaRotaryEmbedding(source)
    cos, _ = rotary(torch.zeros(1), torch.arange(POSITIONS)[None])
    longer, _ = rotary(torch.zeros(1), torch.arange(POSITIONS + 1)[None])
    unscaled = rotary_tables(LlamaConfig.from_hf(huggingface(rope_theta=10000.0).to_dict()), torch.float32)[0]
    assert torch.equal(cos[0, :, :32], unscaled)
    assert not torch.equal(longer[0, :POSITIONS, :32], unscaled)
    assert len(unscaled) == POSITIONS


def test_deinterleave_moves_pairs_to_halves() -> None:
    # two heads of four rows: 0 and 1 rotate together in GGUF and Meta's files, 0 and 2 in Hugging Face
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    assert deinterleave(weight, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
