"""bench: tokens a second of one stage, its graph on the CPU or its plan on the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.manifest import require_artifact
from artifact.memory import peak_rss_mb
from commands.sessions import check_stage, open_session
from validation.calls import FORMS, AnyCall, Turn
from validation.greedy import Decoder
from validation.row_result import Array

Report = dict[str, Any]
WARM_UP = 4
"""Decode steps before the clock starts: kernels are compiled and caches are filled then."""
STRIDE = 7919
"""A prime: the prompt's ids are spread over the vocabulary."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: ``batch`` rows, each a prompt of ``prompt_tokens``, then ``new_tokens`` steps; prefill is run ``repeats`` times."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    batch: int = 1
    repeats: int = 3

    @property
    def positions(self) -> int:
        """All that a row uses."""
        return self.prompt_tokens + WARM_UP + self.new_tokens


def bench(artifact: Path, options: BenchOptions, *, stage: str = "fused", device: str = "cpu") -> Report:
    """Measure one stage.

    Args:
        artifact: the folder.
        options: sizes.
        stage: which graph; on the GPU, the plan that was built from it.
        device: ``cpu`` runs the graph in ONNX Runtime, ``cuda`` the plan.

    Returns:
        stage, backend, device, file, kv_cache, capacity (of a static cache that the plan or graph fixes), batch, prompt_tokens, new_tokens,
        prefill_tokens_per_s, decode_tokens_per_s,
        time_to_first_token_ms, decode_ms, peak_rss_mb (of the host). Token rates count all rows; each is the median of its repeats, logits on the
        host and the next token chosen.

    Raises:
        UsageError: no stage has this name.
        ArtifactError: the stage is not there yet.
        EngineError: no GPU, or no plan of this stage that runs here.
        ValidationError: prompt and new tokens are more than the model's positions.
    """
    config = LlamaConfig(**require_artifact(artifact, "bench", weights=True)["model"]["config"])
    check_stage(artifact, stage)
    if options.positions > config.max_position_embeddings:
        raise ValidationError(
            f"{options.positions} positions are needed ({WARM_UP} of them to warm up), the model has {config.max_position_embeddings}",
            hint="fewer --prompt-tokens or --new-tokens",
        )
    with open_session(artifact, stage, device, batch=options.batch, length=options.positions) as opened:
        first_s, step_s = _measure(opened.decoder, config, options)
    return {
        "stage": stage,
        "backend": opened.backend,
        "device": opened.device,
        "file": opened.file,
        "kv_cache": opened.decoder.kv_cache,
        "capacity": opened.decoder.capacity,
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "prefill_tokens_per_s": round(options.batch * options.prompt_tokens / first_s, 1),
        "decode_tokens_per_s": round(options.batch / step_s, 1),
        "time_to_first_token_ms": round(1000 * first_s, 2),
        "decode_ms": round(1000 * step_s, 3),
        "peak_rss_mb": peak_rss_mb(),
    }


def _measure(decoder: Decoder, config: LlamaConfig, options: BenchOptions) -> tuple[float, float]:
    """Seconds of a prefill and of a decode step: medians, the first prefill and the first steps left out."""
    first_s, step_s = list[float](), list[float]()
    for repeat in range(options.repeats + 1):
        cache = decoder.new_cache(options.batch, options.positions)
        prompt, *steps = FORMS[decoder.kv_cache].calls(_turns(config, options))
        seconds, cache = _timed(decoder, prompt, cache)
        first_s.append(seconds)
        for call in steps if repeat == options.repeats else ():
            seconds, cache = _timed(decoder, call, cache)
            step_s.append(seconds)
    return statistics.median(first_s[1:]), statistics.median(step_s[WARM_UP:])


def _turns(config: LlamaConfig, options: BenchOptions) -> Iterator[Turn]:
    """The prompt, then one token at a time."""
    ids = (np.arange(options.batch * options.prompt_tokens, dtype=np.int64) * STRIDE % config.vocab_size).reshape(options.batch, -1)
    past = 0
    for size in (options.prompt_tokens, *[1] * (WARM_UP + options.new_tokens)):
        yield Turn(tuple(ids[:, :size]), (past,) * options.batch)
        past += size


def _timed(decoder: Decoder, call: AnyCall, cache: list[Array]) -> tuple[float, list[Array]]:
    start = time.perf_counter()
    logits, *cache = decoder.call(call, cache)
    logits[:, -1].argmax(axis=-1)
    return time.perf_counter() - start, cache
