"""The rope scaling of GGUF files: what llama.cpp makes of the keys, and the factors of Llama 3.1 files."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.rope_scaling import RopeScaling
from exporter.checkpoints.gguf_rope import scaling_from_keys, with_frequency_factors
from exporter.rope import inverse_frequencies, rotary_tables

LLAMA3 = LlamaConfig(
    hidden_size=512,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=96,
    max_position_embeddings=16384,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)


def yarn(**fields: Any) -> RopeScaling:
    defaults = {"original_max_position_embeddings": 4096, "attention_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    return RopeScaling(rope_type="yarn", **defaults | fields)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear"}, None),
        ({"type": "linear", "factor": 0.0}, None),
        ({"type": "linear", "factor": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        ({"factor": 2.5}, RopeScaling(rope_type="linear", factor=2.5)),
        ({"type": "yarn", "factor": 1.0}, yarn(factor=1.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 1024},
            yarn(factor=4.0, original_max_position_embeddings=1024, attention_factor=1 + 0.1 * math.log(4)),
        ),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 0.5, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
            yarn(factor=4.0, attention_factor=0.5 * (1 + 0.1 * math.log(4)), beta_fast=16.0, beta_slow=2.0),
        ),
    ],
)
def test_keys_mean_what_llama_cpp_makes_of_them(keys: dict[str, Any], expected: RopeScaling | None) -> None:
    assert scaling_from_keys({f"rope.scaling.{key}": value for key, value in keys.items()}, 4096) == expected


def test_the_old_key_of_a_linear_factor_is_read() -> None:
    assert scaling_from_keys({"rope.scale_linear": 2.0}, 4096) == RopeScaling(rope_type="linear", factor=2.0)


def llama3_factors(factor: float, low: float, high: float, length: int) -> torch.Tensor:
    """As a converter writes them: one after the other, from float32 frequencies."""
    factors = []
    for frequency in 1.0 / (500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)):
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return torch.tensor(factors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_published_models_are_named(factor: float) -> None:
    config, notes = with_frequency_factors(LLAMA3, llama3_factors(factor, 1.0, 4.0, 8192))
    assert config.rope_scaling == RopeScaling(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert notes == [f"rope_freqs.weight holds the factors of rope_type 'llama3', factor {factor:g}"]


def test_other_factors_are_carried_as_they_are_and_mean_the_same_frequencies() -> None:
    """A llama3 of other parameters: what is listed agrees with what they would give, to float32."""
    named = replace(
        LLAMA3,
        rope_scaling=RopeScaling(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8191),
    )
    factors = llama3_factors(8.0, 1.0, 4.0, 8191)
    config, _ = with_frequency_factors(LLAMA3, factors)
    assert config.rope_scaling is not None
    assert config.rope_scaling.frequency_factors == tuple(factors.tolist())
    assert torch.allclose(inverse_frequencies(config), inverse_frequencies(named), rtol=1e-6, atol=0)
    half = [rotary_tables(each, torch.float16)[0] for each in (config, named)]
    assert (half[0] != half[1]).float().mean() < 0.01
    assert (half[0] - half[1]).abs().max() < 2**-8


@pytest.mark.parametrize("factors", [torch.ones(63), torch.zeros(64), torch.full((64,), float("nan"))])
def test_refuses_factors_that_are_none(factors: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight must hold 64 positive factors"):
        with_frequency_factors(LLAMA3, factors)


def test_refuses_factors_beside_a_scaling_of_another_kind() -> None:
    linear = replace(LLAMA3, rope_scaling=RopeScaling(rope_type="linear", factor=2.0))
    assert with_frequency_factors(linear, torch.ones(64)) == (linear, [])
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight and llama\.rope\.scaling\.type = 'linear' at once"):
        with_frequency_factors(linear, torch.full((64,), 2.0))
