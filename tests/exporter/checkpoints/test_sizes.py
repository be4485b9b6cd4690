from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from artifact import presets
from artifact.errors import CheckpointError
from artifact.presets import PRESETS, Preset, preset
from exporter.checkpoints import CheckpointRequest, open_request
from exporter.checkpoints.sizes import check_size

Writer = Callable[..., Path]
TINY = Preset("org/tiny-hf", 2, 32, 64, 4, 2, 128, 1e-5)


@pytest.mark.parametrize("size", PRESETS)
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_check_size_takes_a_published_model_with_either_epsilon(size: str, epsilon: float) -> None:
    assert check_size(size, replace(preset(size), rms_norm_eps=epsilon), where="x") == []


def test_check_size_notes_an_extended_vocabulary_and_another_context() -> None:
    tuned = replace(preset("7b"), vocab_size=32016, max_position_embeddings=16384)
    assert check_size("7b", tuned, where="x") == [
        "extended vocabulary: 32016, published 7b: 32000",
        "another context length: 16384, published 7b: 4096",
    ]


@pytest.mark.parametrize(
    ("size", "given", "differences"),
    [
        (
            "7b",
            "13b",
            "num_hidden_layers: expected 32, got 40; hidden_size: expected 4096, got 5120; intermediate_size: expected 11008, got 13824; "
            "num_attention_heads: expected 32, got 40; num_key_value_heads: expected 32, got 40",
        ),
        ("70b", "llama1-65b", "intermediate_size: expected 28672, got 22016; num_key_value_heads: expected 8, got 64"),
    ],
)
def test_check_size_lists_what_differs(size: str, given: str, differences: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_size(size, preset(given), where="/models/x")
    assert str(caught.value) == f"/models/x is not of size {size}: {differences}"


def test_check_size_refuses_a_smaller_vocabulary() -> None:
    with pytest.raises(CheckpointError, match=r"vocab_size: expected at least 32000, got 31999$"):
        check_size("7b", replace(preset("7b"), vocab_size=31999), where="x")


def test_open_request_checks_the_size_of_a_folder(write_folder: Writer) -> None:
    with pytest.raises(CheckpointError, match="is not of size 7b-chat: num_hidden_layers: expected 32, got 2"):
        open_request(CheckpointRequest(str(write_folder()), size="7b-chat"))


def test_open_request_notes_what_may_differ_from_the_size(write_folder: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", {**PRESETS, "7b": TINY})  # a published size cannot be written to disk here
    monkeypatch.setattr(presets, "VOCABULARY", 95)
    assert "extended vocabulary: 96, published 7b: 95" in open_request(CheckpointRequest(str(write_folder()), size="7b")).notes
