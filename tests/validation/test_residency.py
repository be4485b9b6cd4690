from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from artifact.config import LlamaConfig
from validation.residency import choose_residency


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    memory = SimpleNamespace(available=20e9)
    monkeypatch.setattr("validation.residency.free_memory", lambda: memory.available)
    return memory


def test_a_graph_is_streamed_where_it_would_take_a_quarter_of_the_free_memory(free: SimpleNamespace, config: LlamaConfig) -> None:
    assert not choose_residency(config).streamed
    free.available = 1e5
    assert choose_residency(config).streamed


def test_the_reason_says_how_much_and_of_what(free: SimpleNamespace, config: LlamaConfig) -> None:
    large = replace(config, vocab_size=100_000_000)
    assert choose_residency(large).as_report() == {
        "mode": "streamed",
        "reason": "25.6 GB of weights in float32, more than a quarter of the 20.0 GB that are free, 2 GB aside",
    }


@pytest.mark.parametrize("streamed", [True, False])
def test_what_was_asked_for_is_done(streamed: bool, config: LlamaConfig) -> None:
    assert choose_residency(config, streamed).as_report() == {"mode": "streamed" if streamed else "whole", "reason": "asked for"}
