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
from artifact.engine_names import stage_of
from artifact.errors import ValidationError
from artifact.manifest import require_artifact
from artifact.memory import peak_rss_mb
from artifact.steps import require
from commands.sessions import Opened, check_stage, open_session
from commands.token_check import check_tokens, not_checked, why_no_room
from engines.roofline import roofline
from validation.calls import FORMS, AnyCall, Turn
from validation.greedy import Decoder
from validation.row_result import Array

Report = dict[str, Any]
WARM_UP = 4
"""Decode steps before the clock starts: kernels are compiled and caches are filled then."""
CHECKED_PROMPT = 32
"""Tokens of a prompt whose continuation is checked on the CPU: enough to use the prefill profile."""
STRIDE = 7919
"""A prime: the prompt's ids are spread over the vocabulary."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: ``batch`` rows, each a prompt of ``prompt_tokens``, then ``new_tokens`` steps; prefill is run ``repeats`` times.

    Attributes:
        check_tokens: of each row, that a plan chooses and its graph on the CPU judges; 0 checks none.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    batch: int = 1
    repeats: int = 3
    check_tokens: int = 16

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
        host and the next token chosen. On a GPU also roofline (this card's bounds and the share reached; None, and roofline_reason, where it is not
        known), tokens (of ``check_tokens``; with a reason where memory has no room for the graph), passed (None where nothing was judged), and
        skipped: plans that would have come first and are for another machine, with the reason.

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
    judged = device == "cuda" and options.check_tokens > 0
    if judged:
        require(artifact, f"{stage_of(stage)}.onnx")  # asked before the clock starts, so that no figures are lost
    with open_session(artifact, stage, device, batch=options.batch, length=options.positions) as opened:
        first_s, step_s = _measure(opened.decoder, config, options)
        checked = _check(artifact, stage, opened.decoder, config, options) if judged else None
    measured = {
        "stage": stage,
        **opened.as_report(),
        "capacity": opened.decoder.capacity,
        **_rates(options, first_s, step_s),
        "peak_rss_mb": peak_rss_mb(),
    }
    if device == "cpu":
        return measured
    passed = {} if checked is None else {"passed": checked["passed"]}
    beside = beside_roofline(opened, config, options, first_s, step_s)
    return {**measured, **beside, "tokens": checked, **passed, "skipped": list(opened.skipped)}


def _rates(options: BenchOptions, first_s: float, step_s: float) -> Report:
    """What was asked for, and the token rates of all rows."""
    return {
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "prefill_tokens_per_s": round(options.batch * options.prompt_tokens / first_s, 1),
        "decode_tokens_per_s": round(options.batch / step_s, 1),
        "time_to_first_token_ms": round(1000 * first_s, 2),
        "decode_ms": round(1000 * step_s, 3),
    }


def beside_roofline(opened: Opened, config: LlamaConfig, options: BenchOptions, first_s: float, step_s: float) -> Report:
    """The bounds of this very card at the sizes that were measured, and how much of each was reached."""
    if opened.card is None or opened.precision is None:
        return {"roofline": None, "roofline_reason": f"no data sheet of {opened.device}: its bandwidth and peak are not known here"}
    cached = opened.decoder.capacity or options.prompt_tokens + WARM_UP + options.new_tokens // 2
    bounds = roofline(config, opened.precision, opened.card, batch=options.batch, prompt=options.prompt_tokens, cached=cached)
    first_ms = bounds.time_to_first_token_ms
    reached = {
        "decode_share": round(bounds.decode_step_ms / (1000 * step_s), 4),
        "prefill_share": None if first_ms is None else round(first_ms / (1000 * first_s), 4),
    }
    return {"roofline": {"card": opened.card.name, **bounds.as_json(), **reached}, "roofline_reason": None}


def _check(artifact: Path, stage: str, plan: Decoder, config: LlamaConfig, options: BenchOptions) -> Report:
    """The plan's tokens behind short prompts, judged by the stage's graph on the CPU."""
    if reason := why_no_room(config):
        return not_checked(reason)
    count = min(options.check_tokens, options.positions - 1)
    prompts = _ids(config, options)[:, : min(CHECKED_PROMPT, options.positions - count)]
    with open_session(artifact, stage_of(stage), "cpu", batch=options.batch, length=options.positions) as graph:
        return check_tokens(plan, graph.decoder, prompts.tolist(), count)


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
    ids, past = _ids(config, options), 0
    for size in (options.prompt_tokens, *[1] * (WARM_UP + options.new_tokens)):
        yield Turn(tuple(ids[:, :size]), (past,) * options.batch)
        past += size


def _ids(config: LlamaConfig, options: BenchOptions) -> Array:
    """The prompts, [B, prompt_tokens] int64."""
    ids: Array = np.arange(options.batch * options.prompt_tokens, dtype=np.int64) * STRIDE % config.vocab_size
    return ids.reshape(options.batch, -1)


def _timed(decoder: Decoder, call: AnyCall, cache: list[Array]) -> tuple[float, list[Array]]:
    start = time.perf_counter()
    logits, *cache = decoder.call(call, cache)
    logits[:, -1].argmax(axis=-1)
    return time.perf_counter() - start, cache
