"""Judge a graph by the reference's kept predictions: divergence in the four scenarios and on the texts, and perplexity.

Letters: n positions, V vocab.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from artifact.errors import ValidationError
from artifact.progress import Progress
from validation import metrics, tolerances
from validation.bootstrap import Resampling
from validation.kept.file import Kept
from validation.kept.limits import kept_limits
from validation.kept.predictions import Divergence, diverge
from validation.measurement import StageMeasurement
from validation.part_kl import PART, Parts, parts_kl, record_worst_part
from validation.perplexity import TokenScores, scored_of
from validation.quality import Judge
from validation.row_result import RowResult
from validation.scenarios import Scenario, make_scenarios, scenario_lengths
from validation.side import Side
from validation.stage import judged, run_parts, stage_entry
from validation.structure import ONE_POSITION, TEXT_NUMBERS
from validation.watched import NONFINITE, Watched, record_faults

NO_TEXT = "perplexity is not applicable: no text was kept"
Floats = NDArray[np.float64]


class Runner(Protocol):
    """A loaded graph or plan; what its methods give is said at ``GraphRunner``."""

    def run(self, scenario: Scenario) -> list[RowResult]: ...  # noqa: D102

    def logits(self, ids: NDArray[np.int64]) -> NDArray[Any]: ...  # noqa: D102


@dataclass(frozen=True)
class KeptOracle:
    """What graphs are held against.

    Attributes:
        scenarios: the four, over the kept sequences.
        judge: of scores on the windows; None where no text was kept.
    """

    kept: Kept
    scenarios: tuple[Scenario, ...]
    judge: Judge | None

    @property
    def sequences(self) -> list[NDArray[np.int64]]:
        """Token ids that a runner is asked for the logits of."""
        return [window.inputs for window in self.kept.windows]


def make_oracle(kept: Kept) -> KeptOracle:
    """The scenarios and the judge of a file.

    Raises:
        ValidationError: it was saved by a release whose scenarios have other lengths.
    """
    main, short = kept.sequences
    lengths = scenario_lengths(kept.config)
    wanted = [lengths["main"], lengths["short"] + lengths["padded_decode"]]
    if [len(main), len(short)] != wanted:
        raise ValidationError(
            f"the kept sequences have {len(main)} and {len(short)} tokens, this release's scenarios {wanted[0]} and {wanted[1]}",
            hint="save the reference again",
        )
    return KeptOracle(kept, make_scenarios(kept.config, main, short), _judge(kept) if kept.windows else None)


def measure_side(oracle: KeptOracle, side: Side, *, streamed: bool, progress: Progress) -> dict[str, Any]:
    """Run one graph.

    Returns:
        The stage's entry of the report; a graph that can't be run is an entry that failed and says why.
    """
    start, measured = time.perf_counter(), StageMeasurement()
    measured.numbers |= dict.fromkeys((PART, NONFINITE))  # where the graph can't be run
    scenarios = side.plan(oracle.scenarios).scenarios

    def run() -> None:
        loaded = side.open(oracle.scenarios, streamed=streamed, progress=progress)
        loaded.expect(scenarios, [] if side.one_position else oracle.sequences)
        runner = Watched(loaded, side)
        measure_scenarios(oracle, runner, scenarios, measured)
        if side.one_position:
            measured.missing |= dict.fromkeys(tolerances.TEXT_CHECKS, ONE_POSITION)
            measured.numbers |= dict.fromkeys(TEXT_NUMBERS)
        else:
            measure_text(oracle, runner, measured)
        record_faults(measured, runner)

    failed = run_parts(side.name, {"scenarios and perplexity": run}, measured, progress)
    checks = [*map(tolerances.failed_to_run, failed), *judged(measured, kept_limits(side, streamed=streamed))]
    return stage_entry(side.name, side.kind, measured, checks, time.perf_counter() - start)


def measure_scenarios(oracle: KeptOracle, runner: Runner, scenarios: Sequence[Scenario], measured: StageMeasurement) -> None:
    """Divergence at every real position of some scenarios; the worst part of all is named."""
    parts: Parts = []
    for scenario in scenarios:
        rows = runner.run(scenario)
        found = [_of_row(oracle.kept, row, sequence) for row, sequence in zip(rows, scenario.sequences, strict=True)]
        new = np.concatenate([scenario.is_new(row.positions) for row in rows])
        kl, best = (np.concatenate([getattr(one, name) for one in found]) for name in ("kl", "best"))
        measured.scenarios.append(_entry(scenario, new, kl, best))
        parts += parts_kl(scenario, rows, [one.kl for one in found])
    record_worst_part(measured, parts)
    measured.numbers["mean_kl"] = float(np.max([one["mean_kl"] for one in measured.scenarios]))
    measured.numbers["top1_agreement"] = min(one["top1_agreement"] for one in measured.scenarios)


def measure_text(oracle: KeptOracle, runner: Runner, measured: StageMeasurement) -> None:
    """Perplexity and divergence on the kept windows."""
    if oracle.judge is None:
        measured.missing["perplexity_increase_pct"] = NO_TEXT
        return
    nll, found = list[Floats](), list[Divergence]()
    for window, kept in zip(oracle.kept.windows, oracle.kept.of_windows, strict=True):
        logits = runner.logits(window.inputs)[-len(window.targets) :]
        nll.append(metrics.negative_log_likelihoods(logits, window.targets))
        found.append(diverge(kept, logits))
    kl, lower, best, shared = (np.concatenate([getattr(one, name) for one in found]) for name in ("kl", "lower", "best", "shared"))
    if reason := tolerances.too_few_tokens(scored_of(oracle.kept.windows)):
        measured.missing["perplexity_increase_pct"] = reason
    quality = oracle.judge.describe(TokenScores(np.concatenate(nll), kl, best, shared))
    measured.numbers |= {key: quality["all"][key] for key in TEXT_NUMBERS} | {"kl_lower_bound": float(lower.mean())}
    measured.quality = quality | {"greedy": None, "greedy_missing": "continuations of prompts are not kept"}


def _of_row(kept: Kept, row: RowResult, sequence: int) -> Divergence:
    return diverge(kept.of_sequences[sequence][row.positions], row.logits)


def _entry(scenario: Scenario, new: NDArray[np.bool_], kl: Floats, best: Floats) -> dict[str, Any]:
    unknown = dict.fromkeys(("max_abs", "mean_abs", "cache_max_abs", "decisive_disagreements", "decisive_positions"))
    counted = {"scenario": scenario.name, "positions": len(kl), "judged": int(new.sum()), "calls": len(scenario.chunks)}
    return counted | unknown | {"mean_kl": float(kl[new].mean()), "top1_agreement": float(best[new].mean()), "parts": []}


def _judge(kept: Kept) -> Judge:
    log_sum_exp = np.concatenate([part.log_sum_exp for part in kept.of_windows]).astype(np.float64)
    nll = log_sum_exp - kept.target_logits.astype(np.float64)
    ones = np.ones_like(nll)
    return Judge([str(text["name"]) for text in kept.texts], Resampling(scored_of(kept.windows)), TokenScores(nll, np.zeros_like(nll), ones, ones))
