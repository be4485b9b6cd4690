"""Where a stage's greedy continuation parts from the reference's: told by one call a prompt, and the same as decoding tells."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from artifact.config import LlamaConfig
from exporter.checkpoints import Checkpoint
from validation.continuations import Continuation, continue_prompts, fits_in_memory
from validation.floor import STREAMED_ABOVE
from validation.graph_runner import GraphRunner
from validation.greedy import greedy
from validation.reference import Reference

PROMPTS = [("first", np.array([1, 5, 9, 2])), ("second", np.array([7, 7, 3, 30, 31, 32]))]


@pytest.fixture(scope="module")
def continued(checkpoint: Checkpoint) -> list[Continuation]:
    return continue_prompts(Reference(checkpoint.config, checkpoint.read), PROMPTS, 24)


def test_the_reference_says_what_its_whole_forward_finds_likeliest(checkpoint: Checkpoint, continued: list[Continuation]) -> None:
    runs = Reference(checkpoint.config, checkpoint.read).run([continuation.ids for continuation in continued])
    for continuation, run in zip(continued, runs, strict=True):
        logits = run.logits()[len(continuation.prompt) - 1 :]
        assert logits.argmax(axis=-1).tolist() == continuation.tokens.tolist()
        best_two = np.sort(logits, axis=-1)[:, -2:]
        np.testing.assert_allclose(continuation.margins, best_two[:, 1] - best_two[:, 0], atol=1e-4)
    assert [len(continuation.prompt) for continuation in continued] == [4, 4]  # a batch without padding
    assert [continuation.text for continuation in continued] == ["first", "second"]


def test_continuations_end_where_the_model_does(checkpoint: Checkpoint) -> None:
    (continuation,) = continue_prompts(Reference(checkpoint.config, checkpoint.read), PROMPTS[:1], 10_000)
    assert len(continuation.prompt) + len(continuation.tokens) == checkpoint.config.max_position_embeddings


class Muddled:
    """A sound graph that likes another token once the context is long: logits of it are moved."""

    def __init__(self, runner: GraphRunner, after: int) -> None:
        self.runner, self.after = runner, after
        self.kv_cache, self.capacity, self.name, self.new_cache = runner.kv_cache, None, "muddled", runner.new_cache

    def call(self, call: Any, cache: Any) -> Any:
        logits, *cache = self.runner.call(call, cache)
        return [self._moved(logits.astype(np.float32), call.position_ids), *cache]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self._moved(self.runner.logits(ids).astype(np.float32), np.arange(len(ids)))

    def _moved(self, logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
        logits[positions >= self.after, 11] += 100
        return logits


@pytest.mark.parity
@pytest.mark.parametrize("after", [3, 4, 9, 1000])
def test_one_call_tells_what_decoding_would(after: int, sound_artifact: Path, config: LlamaConfig, continued: list[Continuation]) -> None:
    runner = Muddled(GraphRunner(sound_artifact / "traced.onnx", config, "fp16"), after)
    for continuation in continued:
        told = continuation.compare(runner.logits)
        decoded = [int(tokens[0]) for tokens, _ in zip(greedy(runner, [continuation.prompt.tolist()]), continuation.tokens, strict=False)]
        differing = [index for index, (ours, theirs) in enumerate(zip(decoded, continuation.tokens, strict=True)) if ours != theirs]
        assert told["diverges_at"] == (differing[0] if differing else None)
        assert (told["diverges_at"] is None) == (after == 1000)
        assert told["tokens"] == 24
        if differing:
            assert told["reference_margin"] == pytest.approx(continuation.margins[differing[0]])


def test_a_large_model_is_not_held_in_memory(config: LlamaConfig) -> None:
    assert fits_in_memory(SimpleNamespace(config=config))  # type: ignore[arg-type]
    large = LlamaConfig(**{**config.__dict__, "vocab_size": STREAMED_ABOVE // config.hidden_size + 1})
    assert not fits_in_memory(SimpleNamespace(config=large))  # type: ignore[arg-type]
