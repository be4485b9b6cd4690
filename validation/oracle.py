"""What every stage is compared with, computed once: the reference's runs, the scenarios, the text's windows and the floor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.io_spec import Dtype, KvCache
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from validation import perplexity
from validation.floor import Floor, measure_floor, no_floor
from validation.graph_runner import GraphRunner
from validation.local_ratio import float16_layer_errors
from validation.perplexity import TokenScores, Window
from validation.reference import Reference, ReferenceRun
from validation.scenarios import Scenario, make_scenarios, split_sequences, tokens_needed
from validation.text import Tokens, load_tokens

logger = logging.getLogger(__name__)
FLOAT32 = "an fp32 artifact is judged by the largest difference, not against float16's noise"
MeasureFloor = Callable[[StepContext, str, Reference, Sequence[NDArray[np.int64]], Sequence[ReferenceRun]], Floor]
MAIN, PADDED = 0, 1
"""Indices of the main sequence and of the padded row's."""
SPARE_SLOTS = 8
"""Slots of a static cache that no scenario writes: whoever reads or writes one too many meets them."""


@dataclass
class Oracle:
    """What every stage is compared with.

    Attributes:
        scenarios: the four, over the two sequences.
        runs: of the reference on the two sequences, with caches; hidden states of the main one.
        windows, window_runs: what perplexity is measured on; empty where it is not applicable.
        reference_scores: the reference's own; None where there are no windows.
        largest_logit: largest |logit| of the main sequence.
        seconds: what took how long.
        kv_cache: the artifact's cache form.
    """

    artifact: Path
    config: LlamaConfig
    dtype: Dtype
    tokens: Tokens
    reference: Reference
    scenarios: tuple[Scenario, ...]
    runs: list[ReferenceRun]
    windows: list[Window]
    window_runs: list[ReferenceRun]
    floor: Floor
    reference_scores: TokenScores | None
    logits: list[NDArray[np.float32]] = field(repr=False)
    largest_logit: float
    seconds: dict[str, float]
    kv_cache: KvCache = "dynamic"

    @property
    def capacity(self) -> int:
        """Slots of a static cache in the scenarios."""
        return max(scenario.width for scenario in self.scenarios) + SPARE_SLOTS

    def runner(self, graph: Path, *, one_position: bool = False) -> GraphRunner:
        """A graph of the artifact, loaded."""
        return GraphRunner(graph, self.config, self.dtype, self.kv_cache, one_position=one_position)

    def window_logits(self, index: int) -> NDArray[np.float32]:
        """The reference's logits [n, V] of a window, made anew each time: all of them together would not fit."""
        return self.window_runs[index].logits()

    @cached_property
    def float16_errors(self) -> list[float]:
        """What float16 costs each layer of the reference: the measure of local ratios, made when the first stage needs it."""
        hidden = self.runs[MAIN].hidden
        assert hidden is not None
        return float16_layer_errors(self.reference, hidden)

    @property
    def scored_tokens(self) -> int:
        """Tokens that perplexity is measured on."""
        return sum(len(window.targets) for window in self.windows)


def prepare_oracle(
    step: StepContext,
    checkpoint: Checkpoint,
    dtype: Dtype,
    kv_cache: KvCache = "dynamic",
    *,
    text: Path | None,
    tokens: int | None,
    measure: MeasureFloor = measure_floor,
) -> Oracle:
    """Run the reference and the floor.

    Args:
        step: the artifact.
        checkpoint: what the reference takes its weights from; never the artifact, or a damaged artifact would be compared with itself.
        dtype: of the artifact; an fp32 artifact needs no floor.
        kv_cache: of the artifact; the reference has none.
        text: what to score; None is the default text.
        tokens: how many tokens to score; None is 2,048.
        measure: what gives the floor; where there is no artifact, one that keeps it elsewhere.

    Raises:
        ValidationError: no usable text, or a model too short for the scenarios.
    """
    config, scored = checkpoint.config, tokens if tokens is not None else perplexity.DEFAULT_TOKENS
    if scored < 2:
        raise ValidationError(f"--tokens {scored}: a standard error needs at least 2 scored tokens", hint=f"--tokens {perplexity.DEFAULT_TOKENS}")
    loaded = load_tokens(step.artifact, config, text, max(scored + 1, tokens_needed(config)))
    main, short = split_sequences(config, loaded.ids, loaded.bos)
    size = min(perplexity.WINDOW, config.max_position_embeddings)
    windows = perplexity.make_windows(loaded.ids, scored, size, loaded.bos) if loaded.kind == "text" else []
    reference = Reference(config, checkpoint.read)
    clock = _Clock()
    runs = reference.run([main, short, *(window.inputs for window in windows)], keep_hidden={MAIN}, keep_cache={MAIN, PADDED}, progress=step.progress)
    window_runs = runs[2:]
    scores = perplexity.score(windows, lambda index: window_runs[index].logits()) if windows else None
    clock.lap("reference")
    floor = measure(step, checkpoint.fingerprint, reference, [main, short], runs[:2]) if dtype == "fp16" else no_floor(FLOAT32)
    clock.lap("floor")
    logits = [run.logits() for run in runs[:2]]
    return Oracle(
        artifact=step.artifact,
        config=config,
        dtype=dtype,
        tokens=loaded,
        reference=reference,
        scenarios=make_scenarios(config, main, short),
        runs=runs[:2],
        windows=windows,
        window_runs=window_runs,
        floor=floor,
        reference_scores=scores,
        logits=logits,
        largest_logit=float(np.abs(logits[MAIN]).max()),
        seconds=clock.seconds,
        kv_cache=kv_cache,
    )


class _Clock:
    """Seconds of one thing after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, what: str) -> None:
        """What ran since the last lap."""
        now = time.perf_counter()
        self.seconds[what] = round(now - self._start, 2)
        logger.info("%s: %.1f s", what, now - self._start)
        self._start = now
