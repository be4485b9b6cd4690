"""The reference model against Hugging Face transformers' Llama, same weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from artifact.config import LlamaConfig
from artifact.layout import parameter_count, tensor_shapes
from exporter.model import LlamaModel, attention_allowed
from exporter.rope import rotary_tables

FLOAT32_ROUNDING = 1e-5
"""Relative to the largest logit: two orders of summation in float32."""

VARIANTS = [
    pytest.param({"num_key_value_heads": 4, "tie_word_embeddings": False}, id="multi-head-untied"),
    pytest.param({"num_key_value_heads": 2, "tie_word_embeddings": True}, id="grouped-tied"),
    pytest.param({"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}, id="one-kv-head-explicit-head-dim"),
    pytest.param({"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 500000.0, "rms_norm_eps": 1e-6}, id="theta-and-eps"),
    pytest.param({"attention_bias": True, "num_key_value_heads": 2}, id="attention-bias"),
    pytest.param({"mlp_bias": True, "num_key_value_heads": 4}, id="mlp-bias"),
    pytest.param({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16}, id="all-biases-tied-head-dim"),
    pytest.param({"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}, id="linear"),
    pytest.param({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, id="dynamic"),
    pytest.param(
        {
            "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8},
        },
        id="llama3",
    ),
    pytest.param({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}, id="yarn"),
]


def models(variant: dict[str, object]) -> tuple[LlamaModel, transformers.LlamaForCausalLM]:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "max_position_embeddings": 64,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, initializer_range=0.3, **variant)).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias"):  # transformers begins with zeros
            torch.nn.init.normal_(parameter, std=0.3)
    config = LlamaConfig.from_hf(theirs.config.to_dict())
    ours = LlamaModel(config).eval()
    cos, sin = rotary_tables(config, torch.float32)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name in tensor_shapes(config)}
    ours.load_state_dict(state | {"model.rotary_emb.cos": cos, "model.rotary_emb.sin": sin})
    return ours, theirs


def empty_cache(config: LlamaConfig, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shape = (batch, config.num_key_value_heads, 0, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]


def assert_same_logits(ours_y: torch.Tensor, theirs_y: torch.Tensor) -> None:
    assert (ours_y - theirs_y).abs().max() <= FLOAT32_ROUNDING * theirs_y.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_model_matches_transformers_in_prefill(variant: dict[str, object]) -> None:
    ours, theirs = models(variant)
    ids = torch.randint(0, 97, (2, 11))
    ours_y, _ = ours(ids, torch.ones_like(ids), torch.arange(11).expand(2, 11), empty_cache(ours.config, 2))
    assert_same_logits(ours_y, theirs(ids).logits)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_model_matches_transformers_in_cached_decode(variant: dict[str, object]) -> None:
    ours, theirs = models(variant)
    ids = torch.randint(0, 97, (2, 11))
    expected = theirs(ids).logits
    cache, start = empty_cache(ours.config, 2), 0
    for end in (6, 7, 8, 11):  # prefill, two single steps, one chunk with a past
        positions = torch.arange(start, end).expand(2, end - start)
        ours_y, cache = ours(ids[:, start:end], torch.ones(2, end, dtype=torch.int64), positions, cache)
        assert_same_logits(ours_y, expected[:, start:end])
        start = end


@torch.no_grad()
def test_model_matches_transformers_on_a_left_padded_batch() -> None:
    ours, theirs = models({"num_key_value_heads": 2, "tie_word_embeddings": True})
    ids = torch.randint(0, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours_y, _ = ours(ids, mask, positions, empty_cache(ours.config, 2))
    alone = theirs(ids[1:, 4:]).logits
    assert_same_logits(ours_y[1:, 4:], alone)
    assert torch.isfinite(ours_y).all()


def test_attention_allowed_always_lets_a_row_attend_to_itself() -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    allowed = attention_allowed(mask, 4)[0, 0]
    assert allowed.tolist() == [[True, False, False, False], [False, True, False, False], [False, False, True, False], [False, False, True, True]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_matches_transformers(variant: dict[str, object]) -> None:
    ours, theirs = models(variant)
    assert parameter_count(ours.config) == sum(parameter.numel() for parameter in theirs.parameters())
