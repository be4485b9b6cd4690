"""A graph in the place of the reference: what another graph is held against.

Letters: L tokens, m scored tokens of a window, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from validation import perplexity
from validation.bootstrap import Resampling
from validation.floor import no_floor
from validation.oracle import Oracle, scored_of
from validation.perplexity import Window
from validation.quality import Judge
from validation.reference import Reference, ReferenceRun
from validation.residency import Residency
from validation.row_result import Array, RowResult
from validation.scenarios import Scenario
from validation.side import Side
from validation.text import Tokens
from validation.watched import Watched

NO_FLOOR = "not measured: two graphs are compared, and neither is the float32 reference"
NO_CONTINUATIONS = "a graph is compared on given tokens"


@dataclass
class GraphOracle(Oracle):
    """An oracle whose reference is a graph; what only a checkpoint has is missing.

    Attributes:
        truth: the graph, loaded.
    """

    truth: Watched = field(kw_only=True, repr=False)

    def window_logits(self, index: int) -> NDArray[np.float32]:
        """The graph's logits [m, V] of a window's scored tokens."""
        window = self.windows[index]
        return self.truth.logits(window.inputs)[-len(window.targets) :]

    def seen_in(self, scenario: Scenario, rows: Sequence[RowResult]) -> Oracle:
        """The oracle of one scenario: what the graph itself gave there, call by call; NaN where it gave no logits."""
        logits, runs = list(self.logits), list(self.runs)
        for row, sequence in zip(rows, scenario.sequences, strict=True):
            whole = np.full((len(scenario.rows[scenario.sequences.index(sequence)]), row.logits.shape[1]), np.nan, np.float32)
            whole[row.positions] = row.logits
            logits[sequence], runs[sequence] = whole, _run(row)
        return replace(self, logits=logits, runs=runs)


def make_oracle(
    theirs: Side, truth: Watched, folder: Path, scenarios: tuple[Scenario, ...], texts: tuple[list[Tokens], list[Window]], residency: Residency
) -> GraphOracle:
    """The oracle of a graph; its scores of the windows are made now.

    Args:
        theirs: the graph.
        truth: the same, loaded, and told what it will be asked for.
        folder: on the disk that has room.
        scenarios: that both graphs take.
        texts: with their windows; none where a graph gives one position a call.
        residency: how the other graph is run.
    """
    tokens, windows = texts
    prefill = truth.run(scenarios[0])
    empty = ReferenceRun(torch.empty(0), torch.empty(0))
    oracle = GraphOracle(
        artifact=folder,
        config=theirs.config,
        dtype=theirs.dtype,
        texts=tokens,
        reference=Reference(theirs.config, _no_weights),
        scenarios=scenarios,
        runs=[empty, empty],
        windows=windows,
        window_runs=[],
        floor=no_floor(NO_FLOOR),
        judge=None,
        float16=None,
        continuations=[],
        no_continuations=NO_CONTINUATIONS,
        logits=[np.empty(0, np.float32)] * 2,
        largest_logit=_largest(prefill[0].logits),
        seconds={},
        residency=residency,
        truth=truth,
    )
    if windows:
        lengths = scored_of(tokens, windows)
        oracle.judge = Judge([text.name for text in tokens], Resampling(lengths), perplexity.score(windows, oracle.window_logits))
    return oracle


def _run(row: RowResult) -> ReferenceRun:
    keys, values = ([array.astype(np.float32) for array in kind] for kind in (row.keys, row.values))
    return ReferenceRun(torch.empty(0), torch.empty(0), keys, values)


def _largest(logits: Array) -> float:
    """Of those that are finite, NaN where there is none but 0."""
    return float(np.max(np.abs(logits.astype(np.float32)), where=np.isfinite(logits), initial=0)) or float("nan")


def _no_weights(name: str) -> torch.Tensor:
    raise AssertionError(f"a graph in the place of the reference has no weight {name} to read")
