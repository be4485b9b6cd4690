"""What every stage is compared with, computed once: the reference's runs, the scenarios, the text's windows and the floor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.io_spec import Dtype, KvCache
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from validation import continuations, perplexity
from validation.bootstrap import Resampling
from validation.continuations import Continuation
from validation.float16_costs import Float16Costs, measure_float16, score_run
from validation.floor import Floor, measure_floor, no_floor
from validation.graph_runner import GraphRunner
from validation.local_ratio import float16_layer_errors
from validation.perplexity import TokenScores, Window
from validation.quality import Judge
from validation.reference import Reference, ReferenceRun
from validation.scenarios import Scenario, make_scenarios, split_sequences, tokens_needed
from validation.text import DEFAULT_TEXTS, Tokens, encode_prompts, load_texts

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
        judge: what scores of the windows are held against; None where there are no windows.
        float16: what float16 itself costs; None for an fp32 artifact.
        continuations: of fixed prompts by the reference; empty where there are none, ``no_continuations`` says why.
        largest_logit: largest |logit| of the main sequence.
        seconds: what took how long.
        kv_cache: the artifact's cache form.
    """

    artifact: Path
    config: LlamaConfig
    dtype: Dtype
    texts: list[Tokens]
    reference: Reference
    scenarios: tuple[Scenario, ...]
    runs: list[ReferenceRun]
    windows: list[Window]
    window_runs: list[ReferenceRun]
    floor: Floor
    judge: Judge | None
    float16: Float16Costs | None
    continuations: list[Continuation]
    no_continuations: str | None
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

    @property
    def tokens(self) -> Tokens:
        """The text that the scenarios are of: the first."""
        return self.texts[0]

    def window_logits(self, index: int) -> NDArray[np.float32]:
        """The reference's logits [m, V] of a window's scored tokens, made anew each time: all of them together would not fit."""
        window = self.windows[index]
        return self.window_runs[index].logits(slice(len(window.inputs) - len(window.targets), None))

    @cached_property
    def float16_errors(self) -> list[float]:
        """What float16 costs each layer of the reference: the measure of local ratios, made when the first stage needs it."""
        hidden = self.runs[MAIN].hidden
        assert hidden is not None
        return float16_layer_errors(self.reference, hidden)

    @property
    def scored_tokens(self) -> int:
        """Tokens that perplexity is measured on."""
        return sum(self.scored_of)

    @property
    def scored_of(self) -> list[int]:
        """The same of each text."""
        return _scored_of(self.texts, self.windows)

    def describe_float16(self) -> dict[str, Any] | None:
        """The report's ``float16``: what float16 itself costs, in the keys of a stage's; None where it was not run."""
        if self.float16 is None:
            return None
        scores = self.float16.scores
        return {"quality": self.judge.describe(scores) if self.judge and scores else None, "hidden_errors": self.float16.hidden_errors}

    def describe_texts(self) -> dict[str, Any]:
        """The report's ``text``, about all texts together (its hash is the first's), and ``texts``."""
        size = min(perplexity.WINDOW, self.config.max_position_embeddings)
        windows = {"window": size, "stride": perplexity.stride_of(size), "bos": self.tokens.bos} if self.windows else {}
        each = [tokens.as_report(scored) for tokens, scored in zip(self.texts, self.scored_of, strict=True)]
        names = ", ".join(tokens.name for tokens in self.texts)
        return {"text": self.tokens.as_report(self.scored_tokens) | {"name": names} | windows, "texts": each}


def prepare_oracle(
    step: StepContext,
    checkpoint: Checkpoint,
    dtype: Dtype,
    kv_cache: KvCache = "dynamic",
    *,
    text: Sequence[Path] | None,
    tokens: int | None,
    measure: MeasureFloor = measure_floor,
) -> Oracle:
    """Run the reference and the floor.

    Args:
        step: the artifact.
        checkpoint: what the reference takes its weights from; never the artifact, or a damaged artifact would be compared with itself.
        dtype: of the artifact; an fp32 artifact needs no floor.
        kv_cache: of the artifact; the reference has none.
        text: what to score; None are the texts that come with the package.
        tokens: how many tokens to score of all texts together; None is 1,024 of each, and at least 2,048.
        measure: what gives the floor; where there is no artifact, one that keeps it elsewhere.

    Raises:
        ValidationError: no usable text, or a model too short for the scenarios.
    """
    config, reference = checkpoint.config, Reference(checkpoint.config, checkpoint.read)
    texts, windows = _read_texts(step, config, text, tokens)
    main, short = split_sequences(config, texts[0].ids, texts[0].bos)
    clock = _Clock()
    runs = reference.run([main, short, *(window.inputs for window in windows)], keep_hidden={MAIN}, keep_cache={MAIN, PADDED}, progress=step.progress)
    window_runs = runs[2:]
    scores = score_run(windows, window_runs) if windows else None
    clock.lap("reference")
    floor = measure(step, checkpoint.fingerprint, reference, [main, short], runs[:2]) if dtype == "fp16" else no_floor(FLOAT32)
    clock.lap("floor")
    float16 = measure_float16(reference, (main, runs[MAIN]), windows, window_runs, step.progress) if dtype == "fp16" else None
    clock.lap("float16's own quality")
    continued, not_continued = _continue(step, reference, windows)
    clock.lap("greedy continuations")
    logits = [run.logits() for run in runs[:2]]
    return Oracle(
        artifact=step.artifact,
        config=config,
        dtype=dtype,
        texts=texts,
        reference=reference,
        scenarios=make_scenarios(config, main, short),
        runs=runs[:2],
        windows=windows,
        window_runs=window_runs,
        floor=floor,
        judge=_judge(texts, windows, scores, float16),
        float16=float16,
        continuations=continued,
        no_continuations=not_continued,
        logits=logits,
        largest_logit=float(np.abs(logits[MAIN]).max()),
        seconds=clock.seconds,
        kv_cache=kv_cache,
    )


def _read_texts(step: StepContext, config: LlamaConfig, files: Sequence[Path] | None, tokens: int | None) -> tuple[list[Tokens], list[Window]]:
    """The texts, the first long enough for the scenarios too, and their windows; none where there is no text."""
    count = len(files or DEFAULT_TEXTS)
    of_each = perplexity.shares(tokens if tokens is not None else perplexity.default_tokens(count), count)
    if min(of_each) < 2:
        raise ValidationError(
            f"--tokens {tokens}: a standard error needs at least 2 scored tokens of a text", hint=f"--tokens {perplexity.DEFAULT_TOKENS}"
        )
    needed = [max(scored + 1, tokens_needed(config) if index == 0 else 0) for index, scored in enumerate(of_each)]
    texts = load_texts(step.artifact, config, files, needed)
    size = min(perplexity.WINDOW, config.max_position_embeddings)
    parts = [(index, text, scored) for index, (text, scored) in enumerate(zip(texts, of_each, strict=False)) if text.kind == "text"]
    return texts, [window for index, text, scored in parts for window in perplexity.make_windows(text.ids, scored, size, text.bos, index)]


def _continue(step: StepContext, reference: Reference, windows: Sequence[Window]) -> tuple[list[Continuation], str | None]:
    """Continuations of the fixed prompts, or why there are none."""
    if not windows:
        return [], "there is no text, and no tokenizer for prompts"
    if not continuations.fits_in_memory(reference):
        return [], continuations.TOO_LARGE
    step.progress("greedy continuations by the reference", 0, 1)
    return continuations.continue_prompts(reference, encode_prompts(step.artifact, reference.config, continuations.PROMPTS)), None


def _judge(texts: Sequence[Tokens], windows: Sequence[Window], scores: TokenScores | None, float16: Float16Costs | None) -> Judge | None:
    if scores is None:
        return None
    return Judge([tokens.name for tokens in texts], Resampling(_scored_of(texts, windows)), scores, float16.scores if float16 else None)


def _scored_of(texts: Sequence[Tokens], windows: Sequence[Window]) -> list[int]:
    return [sum(len(window.targets) for window in windows if window.text == index) for index in range(len(texts))]


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
