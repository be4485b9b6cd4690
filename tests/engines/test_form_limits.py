"""Which limits a plan is held to: those of its graph's form, and no looser ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from artifact.config import LlamaConfig
from engines.form_limits import GEMV_LAYER_TEXT, LAYER_TEXT, STATIC_LAYER_TEXT, form_limits
from engines.layer_checks import ATTENTION_KERNELS, GEMV_LIMITS, GEMV_STATIC_LIMITS, LIMITS, STATIC_LIMITS, UNPACKED_LIMITS

GROUPED = LlamaConfig(
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)
MULTI_HEAD = replace(GROUPED, num_key_value_heads=4)


@pytest.mark.parametrize("config", [GROUPED, MULTI_HEAD], ids=["grouped", "multi-head"])
@pytest.mark.parametrize(
    ("form", "layer", "text"),
    [
        ({"static": False, "packed": True}, LIMITS, LAYER_TEXT),
        ({"static": False, "packed": False}, UNPACKED_LIMITS, LAYER_TEXT),
        ({"static": True, "packed": True}, STATIC_LIMITS, STATIC_LAYER_TEXT),
        ({"static": False, "packed": True, "gemv": True}, GEMV_LIMITS, LAYER_TEXT + GEMV_LAYER_TEXT),
        ({"static": True, "packed": True, "gemv": True}, GEMV_STATIC_LIMITS, STATIC_LAYER_TEXT + GEMV_LAYER_TEXT),
    ],
    ids=["packed", "unpacked", "static", "gemv", "static gemv"],
)
def test_attention_of_one_node_is_held_to_its_cache_and_packing(config, form, layer, text) -> None:
    for quantized in (False, True):
        limits = form_limits(config, **form, lowered=False, precision="int8" if quantized else "fp16")
        assert (limits.layer, limits.attention, limits.layer_text, limits.written_out) == (layer, ATTENTION_KERNELS, text, 0)


@pytest.mark.parametrize(
    ("config", "quantized", "more", "attention", "written_out"),
    [
        (GROUPED, False, {"kernels_per_layer": 1, "copies_per_layer": 1, "copied_caches_per_layer": 2}, "_gemm_mha_v2", 0),
        (GROUPED, True, {"kernels_per_layer": 2, "copies_per_layer": 1, "copied_caches_per_layer": 2}, "_gemm_mha_v2", 1),
        (MULTI_HEAD, False, {"copied_caches_per_layer": 2}, "_gemv_mha_v1", 0),
        (MULTI_HEAD, True, {"copied_caches_per_layer": 2}, "_gemv_mha_v1", 0),
    ],
    ids=["grouped", "grouped-int8", "multi-head", "multi-head-int8"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_lowered_attention_may_hold_more_in_decode_alone_and_says_why(config, quantized, more, attention, written_out, packed) -> None:
    usual, limits = (
        form_limits(config, static=False, packed=packed, lowered=lowered, precision="int8" if quantized else "fp16") for lowered in (False, True)
    )
    assert [limit.check for limit in limits.layer] == [limit.check for limit in usual.layer]
    for limit, before in zip(limits.layer, usual.layer, strict=True):
        assert limit.limits == before.limits | {"decode": before.limits["decode"] + more.get(limit.check, 0)}
        assert (limit.reason != before.reason) == (limit.check in more)
        assert limit.reason.startswith(before.reason)
    assert limits.written_out == written_out
    assert limits.attention == {"prefill": "_gemm_mha_v2", "decode": attention}
    assert limits.layer_text > usual.layer_text
