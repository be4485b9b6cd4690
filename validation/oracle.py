"""What every stage is compared with, computed once: the reference's runs, the scenarios, the text's windows and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.io_spec import Dtype, KvCache
from artifact.progress import Progress, silent
from validation import perplexity
from validation.continuations import Continuation
from validation.float16_costs import Float16Costs
from validation.floor import Floor
from validation.local_ratio import float16_layer_errors
from validation.open_runner import ArtifactGraph, open_runner
from validation.perplexity import Window
from validation.quality import Judge
from validation.reference import Reference, ReferenceRun
from validation.residency import WHOLE, Residency
from validation.scenarios import Scenario
from validation.streamed_runner import Finished
from validation.text import Tokens

MAIN, PADDED = 0, 1
"""Indices of the main sequence and of the padded row's."""
SPARE_SLOTS = 8
"""Slots of a static cache that no scenario writes: whoever reads or writes one too many meets them."""


@dataclass
class Oracle:
    """What every stage is compared with.

    Attributes:
        scenarios: the four, over the two sequences.
        runs: of the reference on the two sequences, with caches and hidden states.
        windows, window_runs: what perplexity is measured on; empty where it is not applicable.
        judge: what scores of the windows are held against; None where there are no windows.
        float16: what float16 itself costs; None for an fp32 artifact.
        continuations: of fixed prompts by the reference; empty where there are none, ``no_continuations`` says why.
        largest_logit: largest |logit| of the main sequence.
        seconds: what took how long.
        kv_cache: the artifact's cache form.
        residency: whether graphs are loaded whole, and why.
        finished: what the layers of the last graph that was streamed have computed.
        resumed: stages that an interrupted run had measured.
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
    residency: Residency = WHOLE
    finished: Finished = field(default_factory=Finished, repr=False)
    resumed: list[str] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Slots of a static cache in the scenarios."""
        return slots_of(self.scenarios)

    def runner(self, graph: Path, *, one_position: bool = False, progress: Progress = silent) -> ArtifactGraph:
        """A graph of the artifact, loaded, or ready to be loaded layer by layer."""
        asked: dict[str, Any] = {"streamed": self.residency.streamed, "finished": self.finished}
        return open_runner(graph, self.config, self.dtype, self.kv_cache, one_position=one_position, progress=progress, **asked)

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
        """What float16 costs each layer of the reference: the measure of local ratios."""
        if self.float16 is not None:
            return self.float16.layer_errors
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
        return scored_of(self.texts, self.windows)

    def describe_float16(self) -> dict[str, Any] | None:
        """The report's ``float16``: what float16 itself costs, in the keys of a stage's; None where it was not run."""
        if self.float16 is None:
            return None
        scores = self.float16.scores
        return {"quality": self.judge.describe(scores) if self.judge and scores else None, "hidden_errors": self.float16.hidden_errors}

    def describe_execution(self) -> dict[str, Any]:
        """The report's ``cache`` and ``execution``: form and slots; mode, reason and stages that an interrupted run had measured."""
        capacity = self.capacity if self.kv_cache == "static" else None
        return {"cache": {"form": self.kv_cache, "capacity": capacity}, "execution": self.residency.as_report() | {"resumed": self.resumed}}

    def describe_texts(self) -> dict[str, Any]:
        """The report's ``text``, about all texts together (its hash is the first's), and ``texts``."""
        size = min(perplexity.WINDOW, self.config.max_position_embeddings)
        windows = {"window": size, "stride": perplexity.stride_of(size), "bos": self.tokens.bos} if self.windows else {}
        each = [tokens.as_report(scored) for tokens, scored in zip(self.texts, self.scored_of, strict=True)]
        names = ", ".join(tokens.name for tokens in self.texts)
        return {"text": self.tokens.as_report(self.scored_tokens) | {"name": names} | windows, "texts": each}


def slots_of(scenarios: Sequence[Scenario]) -> int:
    """Slots of a static cache for some scenarios."""
    return max(scenario.width for scenario in scenarios) + SPARE_SLOTS


def scored_of(texts: Sequence[Tokens], windows: Sequence[Window]) -> list[int]:
    """Tokens that the windows of each text score."""
    return [sum(len(window.targets) for window in windows if window.text == index) for index in range(len(texts))]
