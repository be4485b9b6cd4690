"""What the config.json files of Llama 1 and 2 hold, older revisions included: each is read, is of its size, and leaves no key unread."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifact.config import LlamaConfig, unknown_keys
from artifact.presets import preset
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.sizes import check_size

SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 40},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8},
    "33b": {"hidden_size": 6656, "intermediate_size": 17920, "num_attention_heads": 52, "num_hidden_layers": 60},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64, "num_hidden_layers": 80},
}
NOW = {"max_position_embeddings": 4096, "transformers_version": "4.32.0.dev0"}
FIRST = {"max_position_embeddings": 2048, "pad_token_id": 0, "transformers_version": "4.31.0.dev0"}
LLAMA_1 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-06, "pad_token_id": 0, "transformers_version": "4.28.0.dev0"}
NOT_THEN = {"pretraining_tp", "rope_scaling"}
"""Keys that the files of Llama 1 do not have."""

PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    ("7b", "now", SHARED | SHAPES["7b"] | NOW | {"_name_or_path": "meta-llama/Llama-2-7b-hf"}),
    ("13b", "now", SHARED | SHAPES["13b"] | NOW | {"_name_or_path": "meta-llama/Llama-2-13b-hf"}),
    ("70b", "now", SHARED | SHAPES["70b"] | NOW | {"_name_or_path": "meta-llama/Llama-2-70b-hf"}),
    ("7b-chat", "now", SHARED | SHAPES["7b"] | NOW | {"_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}),
    ("13b-chat", "now", SHARED | SHAPES["13b"] | NOW | {"_name_or_path": "meta-llama/Llama-2-13b-chat-hf"}),
    ("70b-chat", "now", SHARED | SHAPES["70b"] | NOW | {"_name_or_path": "meta-llama/Llama-2-70b-chat-hf"}),
    ("7b", "first", SHARED | SHAPES["7b"] | FIRST),
    ("7b-chat", "with Meta's first epsilon", SHARED | SHAPES["7b"] | FIRST | {"rms_norm_eps": 1e-06}),
    ("7b-chat", "with Meta's first epsilon, 4096", SHARED | SHAPES["7b"] | NOW | {"rms_norm_eps": 1e-06}),
    ("13b", "first", SHARED | SHAPES["13b"] | FIRST | {"pretraining_tp": 2}),
    ("13b", "saved again", SHARED | SHAPES["13b"] | NOW | {"max_length": 4096, "pad_token_id": 0, "torch_dtype": "float32"}),
    ("70b", "no rope_scaling", {key: value for key, value in (SHARED | SHAPES["70b"] | NOW).items() if key != "rope_scaling"}),
    (
        "7b-chat",
        "written by transformers 4.45",
        SHARED | SHAPES["7b"] | NOW | {"attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "mlp_bias": False, "rope_theta": 10000.0},
    ),
    (
        "7b-chat",
        "written by transformers 5",
        {key: value for key, value in (SHARED | SHAPES["7b"] | NOW).items() if key not in ("torch_dtype", "rope_scaling")}
        | {"dtype": "float16", "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "attention_bias": False, "mlp_bias": False},
    ),
    ("llama1-7b", "converted", {key: value for key, value in (SHARED | SHAPES["7b"] | LLAMA_1).items() if key not in NOT_THEN}),
    ("llama1-13b", "converted", {key: value for key, value in (SHARED | SHAPES["13b"] | LLAMA_1).items() if key not in NOT_THEN}),
    ("llama1-33b", "converted", {key: value for key, value in (SHARED | SHAPES["33b"] | LLAMA_1).items() if key not in NOT_THEN}),
    (
        "llama1-65b",
        "converted",
        {key: value for key, value in (SHARED | SHAPES["65b"] | LLAMA_1 | {"rms_norm_eps": 1e-5}).items() if key not in NOT_THEN},
    ),
]
GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "do_sample": True,
    "max_length": 4096,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.32.0.dev0",
}
"""generation_config.json of the chat models."""


@pytest.mark.parametrize(("size", "published"), [pytest.param(size, config, id=f"{size} {which}") for size, which, config in PUBLISHED])
def test_published_config_is_read_and_of_its_size(size: str, published: dict[str, Any]) -> None:
    config = LlamaConfig.from_hf(published)
    assert check_size(size, config, where=size) in ([], [f"another context length: 2048, published {size}: 4096"])
    assert unknown_keys(published) == []
    assert config.rms_norm_eps == published["rms_norm_eps"]
    assert config.head_dim == preset(size).head_dim == 128


def test_published_files_are_read_with_their_rotary_tables_and_sampling_defaults(
    write_folder: Callable[..., Path], config: LlamaConfig, weights: dict[str, Tensor]
) -> None:
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(config.head_dim // 2) for layer in range(2)}
    sampling = {key: GENERATION[key] for key in ("do_sample", "max_length", "temperature", "top_p")}
    folder = write_folder(
        config.to_hf() | {"pretraining_tp": 2, "rope_scaling": None, "torch_dtype": "float16"} | sampling, weights | tables, shards=2
    )
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.dropped == sorted(tables)
    assert not set(tables) & set(checkpoint.shapes)
    assert checkpoint.unknown_config_keys == []
