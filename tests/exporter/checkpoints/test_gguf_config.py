from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from artifact.errors import CheckpointError
from exporter.checkpoints.gguf_config import config_from_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": 49152,
}


def test_config_from_gguf_reads_the_shape_of_the_model() -> None:
    config, unknown = config_from_gguf(METADATA, {"output.weight": None})
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size) == (30, 576, 1536, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope_theta, config.max_position_embeddings, config.tie_word_embeddings) == (100000.0, 8192, False)
    assert unknown == []


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8, 3e-5])
def test_config_from_gguf_reads_epsilon_as_it_was_written(eps: float) -> None:
    stored = float(np.float32(eps))
    assert stored != eps
    assert config_from_gguf(METADATA | {"llama.attention.layer_norm_rms_epsilon": stored}, {})[0].rms_norm_eps == eps


def test_config_from_gguf_lists_keys_that_no_table_knows() -> None:
    assert config_from_gguf(METADATA | {"llama.surprise": 1, "llama.expert_count": 0}, {})[1] == ["llama.surprise"]


def test_config_from_gguf_refuses_a_file_without_an_epsilon() -> None:
    without = {key: value for key, value in METADATA.items() if not key.endswith("epsilon")}
    with pytest.raises(CheckpointError, match=r"^GGUF: llama\.attention\.layer_norm_rms_epsilon must be a positive number, got None$"):
        config_from_gguf(without, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "qwen2"}, r"general\.architecture is 'qwen2'; supported: 'llama'"),
        ({"llama.rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type = 'longrope' is not supported; supported: 'none', 'linear', 'yarn'"),
        ({"llama.rope.scaling.factor": -4.0}, r"llama\.rope\.scaling\.factor must be a positive number, got -4\.0"),
        ({"llama.rope.scaling.attn_factor": 1.5}, r"rope\.scaling\.attn_factor = 1\.5 is supported with type 'yarn' alone"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier = 0\.1 is not supported"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor = 0\.5 is not supported"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 0.5},
            r"original_context_length must be a positive integer",
        ),
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8 is not supported"),
        ({"llama.rope.dimension_count": 32}, r"llama\.rope\.dimension_count = 32 differs from the head's 64 dimensions"),
        ({"llama.attention.value_length": 32}, r"llama\.attention\.value_length = 32 differs"),
        ({"llama.attention.head_count_kv": [3, 3]}, r"llama\.attention\.head_count_kv must be an integer, got \[3, 3\]"),
        ({"llama.attention.head_count": 7}, r"embedding_length 576 is not a multiple of attention\.head_count 7"),
        *(
            ({"llama.attention.layer_norm_rms_epsilon": value}, rf"llama\.attention\.layer_norm_rms_epsilon must be a positive number, got {shown}")
            for value, shown in ((-1.0, "-1"), (float("nan"), "nan"), (0, "0"), ("small", "'small'"), (None, "None"))
        ),
        ({"llama.attention.layer_norm_rms_epsilon": 1e-60}, r"layer_norm_rms_epsilon must be a number that float32 holds, got 1e-60"),
        ({"llama.rope.freq_base": 0.0}, r"llama\.rope\.freq_base must be a positive number, got 0\.0"),
        ({"llama.rope.freq_base": [1e4]}, r"llama\.rope\.freq_base must be a positive number, got \[10000\.0\]"),
        ({"llama.rope.freq_base": 1e300}, r"llama\.rope\.freq_base must be a number that float32 holds, got 1e\+300"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.freq_base": 1.0}, r"'yarn' needs a rope_theta above 1, got 1\.0"),
        ({"llama.block_count": None}, r"llama\.block_count must be an integer, got None"),
    ],
)
def test_config_from_gguf_refuses_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_gguf(METADATA | change, {})
