"""Structure: the whole graph in ONNX Runtime over the four scenarios and the text.

Letters: L tokens, N layers, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from artifact.progress import Progress
from validation import metrics, perplexity, tolerances
from validation.measurement import StageMeasurement, against_floor, record_join, run_scenario
from validation.oracle import MAIN, PADDED, Oracle
from validation.row_result import RowResult
from validation.scenario_errors import Alone, alone, cache_errors, compare_scenario
from validation.scenarios import Scenario

PART_CHECKS = {"part_noise_ratio": "noise_ratio", "self_consistency": "self_consistency", "scenario_spread": "spread"}
"""Number of the stage → key of a part whose worst it is."""
SELF_CHECKS = ("self_consistency", "scenario_spread")
TEXT_NUMBERS = ("mean_kl", "perplexity", "perplexity_increase_pct", "perplexity_se_pct", "p99_kl", "top5_agreement")
"""Numbers of the stage that are those of all texts together."""
ONE_POSITION = "the graph gives the logits of one position a call"


class Runner(Protocol):
    """A loaded graph or plan; what its methods give is said at ``GraphRunner``."""

    one_position: bool

    def run(self, scenario: Scenario) -> list[RowResult]: ...  # noqa: D102

    def logits(self, ids: NDArray[np.int64]) -> NDArray[Any]: ...  # noqa: D102


def measure_structure(oracle: Oracle, graph: Path, measured: StageMeasurement, progress: Progress) -> None:
    """The four scenarios and the perplexity, the graph in ONNX Runtime, whole or streamed."""
    runner = oracle.runner(graph, progress=progress)
    record_join(measured, runner)
    alone = oracle.runs[MAIN].hidden if oracle.dtype == "fp16" else None
    runner.expect(oracle.scenarios, sequences_of(oracle), oracle.capacity, alone=alone or ())
    measured.layer_errors = runner.layer_errors
    measure_scenarios(oracle, runner, oracle.scenarios, measured, lambda scenario: run_scenario(oracle, measured, runner, scenario))


def sequences_of(oracle: Oracle) -> list[NDArray[np.int64]]:
    """All token ids that a runner is asked for the logits of: the padded row alone, the windows, the continuations."""
    texts = [*(window.inputs for window in oracle.windows), *(continuation.ids for continuation in oracle.continuations)]
    return [_unpadded(oracle), *texts]


def measure_scenarios(
    oracle: Oracle,
    runner: Runner,
    scenarios: Sequence[Scenario],
    measured: StageMeasurement,
    run: Callable[[Scenario], list[RowResult]] | None = None,
) -> None:
    """Some scenarios and the perplexity; where a graph gives one position a call, it is not compared with itself."""
    caches = []
    own: tuple[Alone, ...] = ()
    for scenario in scenarios:
        rows = (run or runner.run)(scenario)
        own = own or (() if runner.one_position else _run_alone(oracle, runner, rows[0]))
        measured.scenarios.append(compare_scenario(oracle, scenario, rows, own))
        caches += [cache_errors(oracle, scenario, rows)] if rows[0].keys else []
        measured.last_rows[scenario.name] = last_rows(scenario, rows)
        if scenario.name == "decode":
            errors, _ = metrics.absolute_errors(rows[0].logits, oracle.logits[MAIN][rows[0].positions])
            measured.decode_errors = errors[rows[0].positions >= scenario.chunks[0]].tolist()
    summarise(oracle, measured)
    worst_cache(measured, caches)
    summarise_parts(oracle, measured)
    if runner.one_position:
        measured.missing |= dict.fromkeys(("perplexity_increase_pct", *SELF_CHECKS), ONE_POSITION)
    else:
        score_text(oracle, runner, measured)


def _run_alone(oracle: Oracle, runner: Runner, prefill: RowResult) -> tuple[Alone, ...]:
    """Both sequences alone: the main one is what prefill gave, the padded row's is run without its padding."""
    return alone(oracle, MAIN, prefill.logits), alone(oracle, PADDED, runner.logits(_unpadded(oracle)))


def _unpadded(oracle: Oracle) -> NDArray[np.int64]:
    """The padded row without its padding."""
    return next(row for each in oracle.scenarios for row, sequence in zip(each.rows, each.sequences, strict=True) if sequence == PADDED)


def last_rows(scenario: Scenario, rows: list[RowResult]) -> list[RowResult]:
    """What an engine graph gives of a scenario: the last position of each call."""
    return [row.gathered(scenario.last_positions(index)) for index, row in enumerate(rows)]


def summarise(oracle: Oracle, measured: StageMeasurement) -> None:
    """Numbers of the stage from those of its scenarios."""
    columns = {key: np.asarray([entry[key] for entry in measured.scenarios], float) for key in ("max_abs", "mean_abs", "mean_kl", "top1_agreement")}
    worst = int(np.argmax(columns["mean_abs"]))  # of NaN and numbers, NaN
    numbers = {
        "max_abs": float(columns["max_abs"].max()),
        "mean_abs": float(columns["mean_abs"][worst]),
        "max_abs_relative": float(columns["max_abs"].max()) / oracle.largest_logit,
        "mean_kl": float(columns["mean_kl"].max()),
        "top1_agreement": float(columns["top1_agreement"].min()),
    }
    measured.numbers |= numbers
    against_floor(oracle, measured, "noise_ratio", numbers["mean_abs"])
    measured.where["noise_ratio"] = measured.scenarios[worst]["scenario"]
    measured.where["max_abs_relative"] = measured.scenarios[int(np.argmax(columns["max_abs"]))]["scenario"]
    _decisive(measured)


def worst_cache(measured: StageMeasurement, errors: list[NDArray[np.float64]]) -> None:
    """The largest error of a cache; ``errors`` is [N, 2] of each scenario."""
    if not errors:
        measured.missing["cache_error"] = "the graph gives no cache"
        return
    caches = np.stack(errors)
    scenario, layer, kind = np.unravel_index(int(np.argmax(caches)), caches.shape)
    measured.numbers["cache_error"] = float(caches[scenario, layer, kind])
    measured.where["cache_error"] = f"layer {layer} {('keys', 'values')[kind]}, {measured.scenarios[scenario]['scenario']}"


def summarise_parts(oracle: Oracle, measured: StageMeasurement) -> None:
    """The worst part of all scenarios in each measure, and which it is."""
    parts = [part for entry in measured.scenarios for part in entry["parts"]]
    for check, key in PART_CHECKS.items():
        values = [part[key] for part in parts]
        if None in values:
            measured.missing.setdefault(check, oracle.floor.missing)
            continue
        worst = int(np.argmax(values))  # of NaN and numbers, NaN
        measured.numbers[check] = float(values[worst])
        measured.where[check] = parts[worst]["where"]


def _decisive(measured: StageMeasurement) -> None:
    counts = {entry["scenario"]: entry["decisive_disagreements"] for entry in measured.scenarios}
    if None in counts.values():
        measured.missing["decisive_disagreements"] = "there is no floor to say which positions are decisive"
        return
    measured.numbers["decisive_disagreements"] = sum(counts.values())
    if any(counts.values()):
        measured.where["decisive_disagreements"] = ", ".join(name for name, count in counts.items() if count)


def score_text(oracle: Oracle, runner: Runner, measured: StageMeasurement) -> None:
    """Perplexity and KL on the texts' windows, and where greedy continuations part from the reference's."""
    if oracle.judge is None:
        measured.missing["perplexity_increase_pct"] = f"perplexity is not applicable: {oracle.tokens.kind}"
        return
    scores = perplexity.score(oracle.windows, lambda index: runner.logits(oracle.windows[index].inputs), oracle.window_logits)
    if reason := tolerances.too_few_tokens(oracle.scored_of):
        measured.missing["perplexity_increase_pct"] = reason
    quality = oracle.judge.describe(scores)
    measured.numbers |= {key: quality["all"][key] for key in TEXT_NUMBERS}
    greedy = [continuation.compare(runner.logits) for continuation in oracle.continuations]
    measured.quality = quality | {"greedy": greedy or None, "greedy_missing": oracle.no_continuations}
