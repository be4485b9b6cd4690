"""artifact/config.py and artifact/layout.py: biases, explicit head sizes, and values that make no model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.layout import PACKED, layer_shapes, parameter_count, tensor_shapes
from artifact.tensor_file import plan_tensors

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
CONFIG = LlamaConfig.from_hf(SHAPE)


@pytest.mark.parametrize("value", [None, False])
def test_no_bias_unless_the_config_says_so(value: object) -> None:
    config = LlamaConfig.from_hf(SHAPE | {"attention_bias": value, "mlp_bias": value})
    assert (config.attention_bias, config.mlp_bias) == (False, False)
    assert not any(name.endswith(".bias") for name in tensor_shapes(config))


def test_biases_have_the_rows_of_their_weights() -> None:
    config = LlamaConfig.from_hf(SHAPE | {"attention_bias": True, "mlp_bias": True})
    shapes = layer_shapes(config, 1)
    biases = {name: shape for name, shape in shapes.items() if name.endswith(".bias")}
    assert [name.split(".")[-2] for name in biases] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert all(shape == shapes[name.replace(".bias", ".weight")][:1] for name, shape in biases.items())
    assert parameter_count(config) - parameter_count(CONFIG) == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


def test_one_kind_of_bias_comes_without_the_other() -> None:
    attention, mlp = (layer_shapes(replace(CONFIG, **{flag: True}), 0) for flag in ("attention_bias", "mlp_bias"))
    assert sum(name.endswith(".bias") for name in attention) == 4
    assert all("self_attn" in name for name in attention if name.endswith(".bias"))
    assert sum(name.endswith(".bias") for name in mlp) == 3
    assert all("mlp" in name for name in mlp if name.endswith(".bias"))


def test_biases_of_a_packed_projection_lie_side_by_side() -> None:
    shapes = layer_shapes(replace(CONFIG, attention_bias=True, mlp_bias=True), 0)
    _, planned = plan_tensors("x", {name: ("F16", shape) for name, shape in shapes.items()})
    by_name = {tensor.name: tensor for tensor in planned}
    for members in PACKED.values():
        for suffix in ("weight", "bias"):
            parts = [by_name[f"model.layers.0.{member}.{suffix}"] for member in members]
            assert all(left.offset + left.length == right.offset for left, right in pairwise(parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": "yes"}, r"attention_bias = 'yes' is not supported; supported: False, True, None"),
        ({"mlp_bias": 2}, r"mlp_bias = 2 is not supported"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings = 'false' is not supported"),
        ({"head_dim": 8.0}, r"head_dim must be an integer, got 8\.0"),
        ({"head_dim": 7}, r"head_dim 7 is odd"),
        ({"num_key_value_heads": "2"}, r"num_key_value_heads must be an integer, got '2'"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads must be positive, got 0"),
        ({"rms_norm_eps": None}, r"rms_norm_eps must be a positive number, got None"),
        ({"rms_norm_eps": "1e-5"}, r"rms_norm_eps must be a positive number, got '1e-5'"),
        ({"max_position_embeddings": "2048"}, r"max_position_embeddings must be an integer, got '2048'"),
        ({"num_attention_heads": 0, "num_key_value_heads": None}, r"num_attention_heads must be positive, got 0"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps must be a positive number, got 1000"),
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}}, r"rope_type 'yarn' needs a rope_theta above 1, got 1\.0"),
        ({"bos_token_id": [1, 2]}, r"bos_token_id must be a token id, an integer from 0 on, got \[1, 2\]"),
        ({"bos_token_id": -1}, r"bos_token_id must be a token id, an integer from 0 on, got -1"),
        ({"bos_token_id": True}, r"bos_token_id must be a token id, an integer from 0 on, got True"),
        ({"eos_token_id": "a"}, r"eos_token_id must be a token id, an integer from 0 on, got 'a'"),
        ({"eos_token_id": {}}, r"eos_token_id must be a token id, an integer from 0 on, got \{\}"),
        ({"eos_token_id": [1, 2.0]}, r"eos_token_id must be a token id, an integer from 0 on, got 2\.0"),
        ({"hidden_size": 34, "head_dim": 8}, r"hidden_size 34 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 34}, r"hidden_size 34 is not a multiple of num_attention_heads 4"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_hf(SHAPE | change)


@pytest.mark.parametrize(
    ("name", "value"), [("rms_norm_eps", float("nan")), ("rms_norm_eps", -1.0), ("rope_theta", 0.0), ("rope_theta", float("inf"))]
)
def test_no_reader_can_make_a_config_of_numbers_that_are_none(name: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=rf"^config: {name} must be a positive number, got {value}$"):
        replace(CONFIG, **{name: value})


@pytest.mark.parametrize("value", [None, 0, 2, (1, 2)])
def test_token_ids_are_kept_as_they_are(value: Any) -> None:
    assert replace(CONFIG, eos_token_id=value).eos_token_id == value
