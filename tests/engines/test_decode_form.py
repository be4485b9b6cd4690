"""engines/decode_form.py: decode multiplies by a vector where a GPU was faster so, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from artifact.config import LlamaConfig
from engines.decode_form import MOST_ROWS, WIDEST, suits
from engines.device_fit import Load
from engines.profiles import SHORTEST_PREFILL
from engines.targets import find_target

CONFIG = LlamaConfig(
    hidden_size=WIDEST,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=64,
    vocab_size=32000,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
LOAD = Load("fp16", MOST_ROWS, 2048)


def test_it_suits_up_to_what_was_measured() -> None:
    for target in ("a100-40gb", "a100-80gb-pcie"):
        assert suits(CONFIG, LOAD, find_target(target), packed=True)
    assert suits(CONFIG, replace(LOAD, batch=1, length=SHORTEST_PREFILL + 1), find_target("a100"), packed=True)


@pytest.mark.parametrize(
    ("config", "load", "form"),
    [
        ({"hidden_size": WIDEST + 64}, {}, {}),
        ({}, {"batch": MOST_ROWS + 1}, {}),
        ({}, {"precision": "int8"}, {}),
        ({}, {"precision": "fp32"}, {}),
        ({}, {"kv_cache": "static"}, {}),
        ({}, {"length": SHORTEST_PREFILL}, {}),
        ({}, {}, {"packed": False}),
        ({}, {}, {"lowered": True}),
    ],
)
def test_and_not_where_it_was_not_faster_or_can_not_be(config: dict[str, Any], load: dict[str, Any], form: dict[str, Any]) -> None:
    assert not suits(replace(CONFIG, **config), replace(LOAD, **load), find_target("a100"), **{"packed": True, **form})


@pytest.mark.parametrize("target", ["a10", "a30", "l4", "rtx-5090"])
def test_nor_for_a_card_with_another_cache(target: str) -> None:
    assert not suits(CONFIG, LOAD, find_target(target), packed=True)
