"""artifact/rope_scaling.py: both spellings, what a kind takes when a key is absent, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from artifact.config import LlamaConfig, unknown_keys
from artifact.errors import CheckpointError
from artifact.rope_scaling import RopeScaling, rope_from_hf

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize("absent", [{}, {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_parameters": {"rope_type": "default"}}])
def test_no_scaling_is_none(absent: dict[str, Any]) -> None:
    assert rope_from_hf(SHAPE | absent) == (10000.0, None)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000}},
        {"rope_parameters": {"rope_type": "linear", "type": "linear", "factor": 4.0, "rope_theta": 5e5}, "rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "linear", "factor": 4}},
    ],
)
def test_every_spelling_means_the_same(config: dict[str, Any]) -> None:
    assert rope_from_hf(SHAPE | config) == (5e5, RopeScaling(rope_type="linear", factor=4.0))


def test_absent_numbers_are_those_that_transformers_takes() -> None:
    _, yarn = rope_from_hf(SHAPE | {"rope_scaling": {"type": "yarn", "factor": 1.0}})
    assert yarn == RopeScaling(
        rope_type="yarn",
        factor=1.0,
        original_max_position_embeddings=1024,
        attention_factor=1.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
    )
    beside = SHAPE | {"original_max_position_embeddings": 128, "rope_scaling": LLAMA3}
    assert rope_from_hf(beside)[1] == RopeScaling(**LLAMA3 | {"original_max_position_embeddings": 128})
    assert unknown_keys(beside) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"type": "su"}},
            r"rope_scaling\.rope_type = 'su' is not supported; supported: 'default', 'linear', 'dynamic', 'llama3', 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, r"rope_parameters\.rope_type = 'proportional' is not supported"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "'longrope' is not supported where short_factor and",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [2.0] * 4, "long_factor": [2.0] * 4}}, "attention_factor is not given"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type = \['linear'\] is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor must be a positive number, got None"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, r"rope_scaling\.factor must be a positive number, got '4'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor must be a positive number, got 0"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, r"factor must be a positive number, got True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0.0}}, r"attention_factor must be a positive number, got 0\.0"),
        ({"rope_scaling": {"type": "yarn"}}, r"factor must be a positive number, got None"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, r"high_freq_factor 4\.0 must be above low_freq_factor 4\.0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": None}}, r"high_freq_factor must be a positive number, got None"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0.5}},
            r"original_max_position_embeddings must be a positive integer, got 0\.5",
        ),
        ({"rope_scaling": "linear"}, r"rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, r"differs by kind of layer \(full_attention\)"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            r"rope_scaling\.partial_rotary_factor = 0\.5 is not supported",
        ),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2, 1]}}, r"rope_scaling\.mrope_section = \[1, 2, 1\] is not supported"),
        ({"partial_rotary_factor": 0.25}, r"config\.json: partial_rotary_factor = 0\.25 is not supported"),
        ({"rope_theta": 0}, r"rope_theta must be a positive number, got 0"),
        ({"rope_theta": [1e4]}, r"rope_theta must be a positive number, got \[10000\.0\]"),
    ],
)
def test_refuses_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_hf(SHAPE | config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta = 10000, rope_parameters\.rope_theta = 500000: they must be equal",
        ),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, r"has rope_type 'linear' and type 'dynamic'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            r"rope_scaling \(linear\) and rope_parameters \(default\) contradict each other",
        ),
    ],
)
def test_refuses_what_contradicts_itself(config: dict[str, Any], message: str) -> None:
    """transformers takes one of the two and drops the other's rope_theta."""
    with pytest.raises(CheckpointError, match=message):
        rope_from_hf(SHAPE | config)


def test_keys_that_a_kind_does_not_use_are_reported() -> None:
    scaling = {"type": "linear", "factor": 2.0, "beta_fast": 32, "finetuned": True, "surprise": 1}
    assert unknown_keys(SHAPE | {"rope_scaling": scaling}) == ["rope_scaling.beta_fast", "rope_scaling.surprise"]


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "dynamic", "factor": 4.0},
        LLAMA3,
        {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False},
        {"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [1.0, 2.0, 3.0, 4.0], "attention_factor": 1.0},
    ],
)
def test_manifest_and_config_json_give_the_same_config_again(scaling: dict[str, Any]) -> None:
    config = LlamaConfig.from_hf(SHAPE | {"rope_scaling": scaling, "eos_token_id": [1, 2]})
    assert LlamaConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert unknown_keys(config.to_hf()) == []
    assert hash(config) == hash(LlamaConfig(**json.loads(json.dumps(asdict(config)))))


def test_factors_must_be_one_for_each_pair() -> None:
    factors = [1.0, 2.0, 3.0]
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    with pytest.raises(CheckpointError, match="3 rotary frequency factors for head_dim 8; expected 4"):
        LlamaConfig.from_hf(SHAPE | {"rope_scaling": scaling})
