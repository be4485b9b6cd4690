"""engines/profiles.py: ranges of every input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import graph_inputs
from engines.profiles import default_length, make_profiles

CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
)


def test_every_input_has_a_range_in_graph_order() -> None:
    for profile in make_profiles(CONFIG, "fp16", max_batch=4, max_length=1024):
        assert list(profile.shapes) == [value.name for value in graph_inputs(CONFIG, "fp16")]


def test_prefill_spans_first_and_chunked_prompts() -> None:
    prefill, _ = make_profiles(CONFIG, "fp16", max_batch=4, max_length=1024)
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 512), (4, 1024))
    assert prefill.shapes["attention_mask"] == ((1, 1), (1, 512), (4, 1024))
    assert prefill.shapes["past_key_values.1.value"] == ((1, 2, 0, 64), (1, 2, 0, 64), (4, 2, 1023, 64))


def test_decode_fixes_one_new_token() -> None:
    _, decode = make_profiles(CONFIG, "fp16", max_batch=4, max_length=1024)
    assert decode.axes["sequence_length"] == (1, 1, 1)
    assert decode.shapes["position_ids"] == ((1, 1), (1, 1), (4, 1))
    assert decode.shapes["past_key_values.0.key"] == ((1, 2, 0, 64), (1, 2, 512, 64), (4, 2, 1023, 64))


@pytest.mark.parametrize("max_length", [2, 3, 512, 513, 1024])
def test_optimum_is_a_shape_that_can_occur(max_length: int) -> None:
    for profile in make_profiles(CONFIG, "fp16", max_batch=1, max_length=max_length):
        sizes = {axis: profile.axes[axis][1] for axis in profile.axes}
        assert sizes["total_sequence_length"] == sizes["past_sequence_length"] + sizes["sequence_length"]
        assert all(low <= best <= high for low, best, high in profile.axes.values())
        assert profile.axes["total_sequence_length"][2] == max_length


def test_a_prefill_that_begins_at_two_tokens_has_more_than_one_length() -> None:
    with pytest.raises(EngineError, match="--max-length must be between 3 and"):
        make_profiles(CONFIG, "fp16", max_batch=4, max_length=2, gemv=True)


@pytest.mark.parametrize(("kv_cache", "masks"), [("dynamic", ("total_sequence_length",)), ("static", ())])
def test_prefill_may_begin_at_two_tokens_and_decode_has_one(kv_cache: Any, masks: tuple[str, ...]) -> None:
    usual = make_profiles(CONFIG, "fp16", kv_cache, max_batch=4, max_length=64)
    prefill, decode = make_profiles(CONFIG, "fp16", kv_cache, max_batch=4, max_length=64, gemv=True)
    assert decode == usual[1]
    assert dict(prefill.axes) == dict(usual[0].axes) | {axis: (2, 64, 64) for axis in ("sequence_length", *masks)}
    assert prefill.shapes["input_ids"] == ((1, 2), (1, 64), (4, 64))


@pytest.mark.parametrize(("options", "words"), [((0, 16), "--max-batch"), ((1, 1), "between 2 and"), ((1, 1025), "1024 positions, got 1025")])
def test_refuses_what_the_model_cannot_serve(options: tuple[int, int], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        make_profiles(CONFIG, "fp16", max_batch=options[0], max_length=options[1])


@pytest.mark.parametrize(("positions", "expected"), [(1024, 1024), (8192, 4096)])
def test_default_length_is_the_models_up_to_4096(positions: int, expected: int) -> None:
    assert default_length(replace(CONFIG, max_position_embeddings=positions)) == expected


def test_a_static_cache_has_one_size_and_every_input_of_its_engine_graph() -> None:
    prefill, decode = make_profiles(CONFIG, "fp16", "static", max_batch=4, max_length=768)
    for profile in (prefill, decode):
        assert list(profile.shapes) == [value.name for value in graph_inputs(CONFIG, "fp16", "static", one_position=True)]
        assert profile.shapes["past_key_values.1.value"] == ((1, 2, 768, 64), (1, 2, 768, 64), (4, 2, 768, 64))
        assert profile.shapes["last_token_indices"] == profile.shapes["key_value_lengths"] == ((1,), (1,), (4,))
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 512), (4, 768))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))


@pytest.mark.parametrize("capacity", [1, 1025])
def test_refuses_a_capacity_that_the_model_cannot_serve(capacity: int) -> None:
    with pytest.raises(EngineError, match=f"--capacity must be between 2 and the model's 1024 positions, got {capacity}") as error:
        make_profiles(CONFIG, "fp16", "static", max_batch=1, max_length=capacity)
    assert error.value.hint == "--capacity 1024"
