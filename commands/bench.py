"""bench: tokens a second of one stage, its graph on the CPU or its plan on the GPU, beside what the GPU's memory allows at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from artifact.config import LlamaConfig
from artifact.errors import EngineError, ValidationError
from artifact.manifest import require_artifact
from artifact.steps import require
from engines.device import read_device
from engines.runner import Plan, PlanSession
from validation.engines import engine_entries
from validation.graph_runner import Array, GraphRunner
from validation.plan_runner import host_feeds
from validation.scenarios import Call

Report = dict[str, Any]
WARM_UP = 4
"""Decode steps before the clock starts: kernels are compiled and caches are filled then."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: ``batch`` rows, each a prompt of ``prompt_tokens``, then ``new_tokens`` steps; prefill is run ``repeats`` times."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    batch: int = 1
    repeats: int = 3


class Session(Protocol):
    """A batch on a graph or a plan."""

    def restart(self) -> None:
        """Empty the caches."""

    def call(self, call: Call) -> Array:
        """New tokens → logits."""


class GraphSession:
    """``Session`` of a graph: the caches go through the host, call by call."""

    def __init__(self, runner: GraphRunner) -> None:
        self._runner = runner
        self._cache: list[Array] | None = None

    def restart(self) -> None:
        """Empty the caches."""
        self._cache = None

    def call(self, call: Call) -> Array:
        """New tokens → logits."""
        logits, *self._cache = self._runner.call(call, self._cache)
        return logits


class GpuSession:
    """``Session`` of a plan."""

    def __init__(self, session: PlanSession) -> None:
        self._session = session
        self.restart = session.restart

    def call(self, call: Call) -> Array:
        """New tokens → logits."""
        return self._session.call(host_feeds(call))


def bench(artifact: Path, options: BenchOptions, *, stage: str = "fused", device: str = "cpu") -> Report:
    """Measure one stage.

    Args:
        artifact: the folder.
        options: sizes.
        stage: which graph; on the GPU, the plan that was built from it.
        device: ``cpu`` runs the graph in ONNX Runtime, ``cuda`` the plan.

    Returns:
        stage, backend, device, batch, prompt_tokens, new_tokens, prefill_tokens_per_s, decode_tokens_per_s, time_to_first_token_ms, peak_rss_mb.
        Token rates count all rows; each is the median of its repeats, logits on the host and the next token chosen.

    Raises:
        ArtifactError: no such stage.
        EngineError: no plan of this stage that runs here.
        ValidationError: prompt and new tokens are more than the model's positions.
    """
    model = require_artifact(artifact, "bench", weights=True)["model"]
    config = LlamaConfig(**model["config"])
    needed = options.prompt_tokens + WARM_UP + options.new_tokens
    if needed > config.max_position_embeddings:
        raise ValidationError(f"{needed} positions are needed, the model has {config.max_position_embeddings}", hint="--prompt-tokens, --new-tokens")
    session, backend, name = _session(artifact, stage, device, config, model["dtype"], options)
    prefill_s, step_s = [], list[float]()
    for _ in range(options.repeats + 1):
        session.restart()
        calls = _calls(config, options)
        seconds = _timed(session, next(calls))
        prefill_s.append(seconds)
    step_s = [_timed(session, call) for call in calls][WARM_UP:]
    first, step = statistics.median(prefill_s[1:]), statistics.median(step_s)
    return {
        "stage": stage,
        "backend": backend,
        "device": name,
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "prefill_tokens_per_s": round(options.batch * options.prompt_tokens / first, 1),
        "decode_tokens_per_s": round(options.batch / step, 1),
        "time_to_first_token_ms": round(1000 * first, 2),
        "decode_ms": round(1000 * step, 3),
        "peak_rss_mb": psutil.Process().memory_info().rss // 1_000_000,
    }


def _session(artifact: Path, stage: str, device: str, config: LlamaConfig, dtype: Any, options: BenchOptions) -> tuple[Session, str, str]:
    if device == "cpu":
        return GraphSession(GraphRunner(require(artifact, f"{stage}.onnx"), config, dtype)), "onnxruntime-cpu", "cpu"
    gpu = read_device()
    entries = [entry for entry in engine_entries(artifact) if entry["graph"] == f"{stage}-engine.onnx"]
    if not entries:
        raise EngineError(f"{artifact} has no plan of {stage}", hint=f"python cli.py build {artifact} --precision PRECISION --target GPU")
    plan = Plan(artifact, entries[0], gpu)
    needed = options.prompt_tokens + WARM_UP + options.new_tokens
    session = PlanSession(plan, config, dtype, batch=options.batch, length=needed)
    return GpuSession(session), f"{entries[0]['backend']} {entries[0]['tensorrt_version']}", gpu.name


def _calls(config: LlamaConfig, options: BenchOptions) -> Iterator[Call]:
    """The prompt, then one token at a time; ids are spread over the vocabulary."""
    ids = (np.arange(options.batch * options.prompt_tokens, dtype=np.int64) * 7919 % config.vocab_size).reshape(options.batch, -1)
    end = 0
    for size in (options.prompt_tokens, *[1] * (WARM_UP + options.new_tokens)):
        start, end = end, end + size
        positions = np.broadcast_to(np.arange(start, end, dtype=np.int64), (options.batch, size))
        yield Call(start, end, ids[:, :size], np.ones((options.batch, end), np.int64), positions)


def _timed(session: Session, call: Call) -> float:
    start = time.perf_counter()
    session.call(call)[:, -1].argmax(axis=-1)
    return time.perf_counter() - start
