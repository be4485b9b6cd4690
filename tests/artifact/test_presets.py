from __future__ import annotations

import pytest

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError, UsageError
from artifact.layout import parameter_count
from artifact.presets import PRESETS, preset, repository

PARAMETERS = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "70b": 68_976_648_192,
    "llama1-7b": 6_738_415_616,
    "llama1-13b": 13_015_864_320,
    "llama1-33b": 32_528_943_616,
    "llama1-65b": 65_285_660_672,
}
"""As counted in the published files; a chat model has the shape of its base."""

META = {  # params.json: dim, n_layers, n_heads, norm_eps, multiple_of, ffn_dim_multiplier, n_kv_heads
    "llama1-7b": (4096, 32, 32, 1e-6, 256, None, None),
    "llama1-13b": (5120, 40, 40, 1e-6, 256, None, None),
    "llama1-33b": (6656, 60, 52, 1e-6, 256, None, None),
    "llama1-65b": (8192, 80, 64, 1e-5, 256, None, None),
    "7b": (4096, 32, 32, 1e-5, 256, None, None),
    "13b": (5120, 40, 40, 1e-5, 256, None, None),
    "70b": (8192, 80, 64, 1e-5, 4096, 1.3, 8),
}
FFN = {"7b": 11008, "13b": 13824, "70b": 28672, "llama1-7b": 11008, "llama1-13b": 13824, "llama1-33b": 17920, "llama1-65b": 22016}


@pytest.mark.parametrize(("size", "parameters"), PARAMETERS.items())
def test_preset_has_the_published_number_of_parameters(size: str, parameters: int) -> None:
    assert parameter_count(preset(size)) == parameters


@pytest.mark.parametrize("size", META)
def test_preset_is_the_shape_of_metas_params_json(size: str) -> None:
    dim, layers, heads, eps, multiple, multiplier, kv_heads = META[size]
    ffn = int(2 * (4 * dim) / 3)
    ffn = int(multiplier * ffn) if multiplier else ffn
    config = preset(size)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.rms_norm_eps) == (dim, layers, heads, eps)
    assert config.num_key_value_heads == (kv_heads or heads)
    assert config.intermediate_size == multiple * ((ffn + multiple - 1) // multiple) == FFN[size]
    assert (config.vocab_size, config.head_dim, config.rope_theta, config.tie_word_embeddings) == (32000, 128, 10000.0, False)
    assert config.max_position_embeddings == (2048 if size.startswith("llama1") else 4096)


@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_chat_model_has_the_shape_of_its_base(size: str) -> None:
    assert preset(f"{size}-chat") == preset(size)
    assert repository(f"{size}-chat") == repository(size).replace("-hf", "-chat-hf")


def test_every_size_of_the_contract_is_there() -> None:
    assert list(PRESETS) == "7b 13b 70b 7b-chat 13b-chat 70b-chat llama1-7b llama1-13b llama1-33b llama1-65b".split()
    assert [repository(size) for size in ("7b", "13b", "70b")] == [f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")]


def test_preset_reads_as_the_same_model_in_config_json() -> None:
    assert all(LlamaConfig.from_hf(preset(size).to_hf()) == preset(size) for size in PRESETS)


def test_unknown_size_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'14b' is not a published size") as caught:
        preset("14b")
    assert "13b-chat" in (caught.value.hint or "")


def test_llama_1_says_that_it_has_no_repository() -> None:
    with pytest.raises(CheckpointError, match="Llama 1 was handed out on request"):
        repository("llama1-65b")
