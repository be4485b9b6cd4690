"""Greedy decoding: a static cache says what a dynamic one says, token by token, for rows of any lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from artifact.errors import ValidationError
from artifact.io_spec import KvCache
from artifact.steps import run_step
from benchmarks.static_equals_dynamic import NoSpareSlots, side_by_side
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from validation.graph_runner import GraphRunner
from validation.greedy import greedy

pytestmark = pytest.mark.parity
STEPS = 128
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 35], [8, 9, 7], [9]]
SHAPE = {"seed": 2, "vocab_size": 256, "hidden_size": 64, "num_attention_heads": 8, "max_position_embeddings": 160}
"""Random weights that keep saying something new for 128 tokens; most fall into a loop."""
Runners = dict[tuple[str, KvCache], GraphRunner]


@pytest.fixture(scope="module")
def runners(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Runners:
    """(stage, cache form) → graph; float32, room for prompt and steps."""
    root = tmp_path_factory.mktemp("greedy")
    checkpoint = open_checkpoint(str(make_checkpoint(root / "checkpoint", **SHAPE)))
    made: Runners = {}
    for kv_cache in ("dynamic", "static"):
        artifact = root / kv_cache
        run_step(artifact, "export", {}, lambda step, form=kv_cache: export_checkpoint(step, checkpoint, dtype="fp32", kv_cache=form))
        run_step(artifact, "fuse", {}, fuse_artifact)
        for stage in ("traced", "fused"):
            made[stage, kv_cache] = GraphRunner(artifact / f"{stage}.onnx", checkpoint.config, "fp32", kv_cache)
    return made


def decode(runner: GraphRunner, prompts: list[list[int]], steps: int = STEPS) -> np.ndarray:
    """[steps, B]."""
    return np.stack(list(islice(greedy(runner, prompts, max(map(len, prompts)) + steps), steps)))


def without_cache(runner: GraphRunner, ids: list[int]) -> Iterator[int]:
    """The same from a whole forward a token."""
    while True:
        ids = [*ids, int(runner.logits(np.array(ids))[-1].argmax())]
        yield ids[-1]


@pytest.mark.parametrize("stage", ["traced", "fused"])
def test_static_and_dynamic_caches_give_the_same_128_tokens_to_a_ragged_batch(stage: str, runners: Runners) -> None:
    static, dynamic = (decode(runners[stage, form], PROMPTS) for form in ("static", "dynamic"))
    assert static.shape == (STEPS, len(PROMPTS))
    assert static.tolist() == dynamic.tolist()
    assert min(len(set(column)) for column in static.T) > 32  # no row has fallen into a loop, where tokens tell nothing


def test_each_row_of_a_batch_is_what_it_is_alone_and_without_a_cache(runners: Runners) -> None:
    batch = decode(runners["fused", "static"], PROMPTS, 32)
    for column, prompt in zip(batch.T, PROMPTS, strict=True):
        assert column.tolist() == decode(runners["fused", "static"], [prompt], 32)[:, 0].tolist()
        assert column.tolist() == list(islice(without_cache(runners["traced", "dynamic"], prompt), 32))


@pytest.mark.parametrize("stage", ["traced", "fused"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_a_static_cache_without_spare_slots_gives_the_bits_of_a_dynamic_one(stage: str, prompt: list[int], runners: Runners) -> None:
    for dynamic, static in side_by_side(runners[stage, "dynamic"], NoSpareSlots(runners[stage, "static"]), [prompt], 32):
        np.testing.assert_array_equal(static, dynamic)


def test_a_full_cache_is_an_error_and_not_another_token(runners: Runners) -> None:
    tokens = greedy(runners["fused", "static"], [[1, 2, 3]], 5)
    assert len(list(islice(tokens, 3))) == 3  # slots 0 to 4
    with pytest.raises(ValidationError, match="would write slots 5 to 5 of a cache with 5"):
        next(tokens)
