"""Prepare what every stage is compared with: texts and windows, the reference's runs, the floor, and what float16 costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

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
from validation.float16_costs import Float16Costs, score_run
from validation.floor import Floor, measure_floor, no_floor
from validation.laps import Laps
from validation.oracle import MAIN, PADDED, Oracle, scored_of
from validation.perplexity import Window
from validation.quality import Judge
from validation.reference import Reference, ReferenceRun, as_is
from validation.residency import Residency, choose_residency
from validation.rounded_alongside import RoundedAlongside
from validation.scenarios import make_scenarios, split_sequences, tokens_needed
from validation.spill import Spill
from validation.text import DEFAULT_TEXTS, Tokens, encode_prompts, load_texts

FLOAT32 = "an fp32 artifact is judged by the largest difference, not against float16's noise"
MeasureFloor = Callable[[StepContext, str, Reference, Sequence[NDArray[np.int64]], Sequence[ReferenceRun], Sequence[ReferenceRun]], Floor]


def prepare_oracle(
    step: StepContext,
    checkpoint: Checkpoint,
    dtype: Dtype,
    kv_cache: KvCache = "dynamic",
    *,
    text: Sequence[Path] | None,
    tokens: int | None,
    measure: MeasureFloor = measure_floor,
    streamed: bool | None = False,
) -> Oracle:
    """Run the reference and the floor.

    Args:
        step: the artifact.
        checkpoint: what the reference takes its weights from; never the artifact, or a damaged artifact would be compared with itself.
        dtype, kv_cache: of the artifact; an fp32 artifact needs no floor, and the reference has no cache.
        text: what to score; None are the texts that come with the package.
        tokens: how many tokens to score of all texts together; None is 1,024 of each, and at least 2,048.
        measure: what gives the floor; where there is no artifact, one that keeps it elsewhere.
        streamed: whether graphs are run one layer at a time, and what the reference computed for every layer lies on disk; None is by the memory.

    Raises:
        ValidationError: no usable text, or a model too short for the scenarios.
    """
    config, reference = checkpoint.config, Reference(checkpoint.config, checkpoint.read)
    texts, windows = read_texts(step.artifact, config, text, tokens)
    main, short = split_sequences(config, texts[0].ids, texts[0].bos)
    clock, residency = Laps(), choose_residency(config, streamed)
    sequences = [main, short, *(window.inputs for window in windows)]
    rounded = RoundedAlongside(reference, sequences) if dtype == "fp16" else None
    runs = _run_reference(step, reference, sequences, residency, rounded)
    clock.lap("reference")
    floor, float16 = _noise(rounded, windows, runs, lambda halves: measure(step, checkpoint.fingerprint, reference, sequences[:2], runs[:2], halves))
    clock.lap("float16's floor and quality")
    continued, no_continuations = _continue(step, reference, windows)
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
        window_runs=runs[2:],
        floor=floor,
        judge=_judge(texts, windows, runs[2:], float16),
        float16=float16,
        continuations=continued,
        no_continuations=no_continuations,
        logits=logits,
        largest_logit=float(np.abs(logits[MAIN]).max()),
        seconds=clock.seconds,
        kv_cache=kv_cache,
        residency=residency,
    )


def read_texts(artifact: Path, config: LlamaConfig, files: Sequence[Path] | None, tokens: int | None) -> tuple[list[Tokens], list[Window]]:
    """The texts, the first long enough for the scenarios too, and their windows; none where there is no text; ``artifact`` holds the tokenizer."""
    count = len(files or DEFAULT_TEXTS)
    of_each = perplexity.shares(tokens if tokens is not None else perplexity.default_tokens(count), count)
    if min(of_each) < 2:
        raise ValidationError(
            f"--tokens {tokens}: a standard error needs at least 2 scored tokens of a text", hint=f"--tokens {perplexity.DEFAULT_TOKENS}"
        )
    needed = [max(scored + 1, tokens_needed(config) if index == 0 else 0) for index, scored in enumerate(of_each)]
    texts = load_texts(artifact, config, files, needed)
    size = min(perplexity.WINDOW, config.max_position_embeddings)
    parts = [(index, text, scored) for index, (text, scored) in enumerate(zip(texts, of_each, strict=False)) if text.kind == "text"]
    return texts, [window for index, text, scored in parts for window in perplexity.make_windows(text.ids, scored, size, text.bos, index)]


def _noise(
    rounded: RoundedAlongside | None, windows: Sequence[Window], runs: Sequence[ReferenceRun], measure: Callable[[Sequence[ReferenceRun]], Floor]
) -> tuple[Floor, Float16Costs | None]:
    """What float16 does to the model's own arithmetic: the floor of the scenarios' sequences, and what it costs the texts."""
    if rounded is None:
        return no_floor(FLOAT32), None
    halves = rounded.runs()
    return measure(halves[:2]), rounded.costs(windows, halves[2:], runs[2:])


def _run_reference(
    step: StepContext, reference: Reference, sequences: Sequence[NDArray[np.int64]], residency: Residency, rounded: RoundedAlongside | None
) -> list[ReferenceRun]:
    """The reference on the scenarios' sequences and the windows; what it keeps of every layer lies on disk where graphs are streamed."""
    store = Spill(step.artifact).keep if residency.streamed else as_is
    if residency.streamed:
        reference.keep_head(store)
    after = rounded.after_layer if rounded else None
    return reference.run(sequences, keep_hidden={MAIN, PADDED}, keep_cache={MAIN, PADDED}, after_layer=after, store=store, progress=step.progress)


def _continue(step: StepContext, reference: Reference, windows: Sequence[Window]) -> tuple[list[Continuation], str | None]:
    """Continuations of the fixed prompts, or why there are none."""
    if not windows:
        return [], "there is no text, and no tokenizer for prompts"
    if not continuations.fits_in_memory(reference):
        return [], continuations.TOO_LARGE
    step.progress("greedy continuations by the reference", 0, 1)
    return continuations.continue_prompts(reference, encode_prompts(step.artifact, reference.config, continuations.PROMPTS)), None


def _judge(texts: Sequence[Tokens], windows: Sequence[Window], runs: Sequence[ReferenceRun], float16: Float16Costs | None) -> Judge | None:
    if not windows:
        return None
    names, resampling = [tokens.name for tokens in texts], Resampling(scored_of(texts, windows))
    return Judge(names, resampling, score_run(windows, runs), float16.scores if float16 else None)
