"""What every linear of an artifact costs alone under a scheme, measured and written: `scores-<scheme>.json`, the input of placement."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from artifact.config import LlamaConfig
from artifact.layout import layer_of, linear_shapes, members
from artifact.steps import StepContext
from graphs.quantize.linears import site_of
from graphs.quantize.sensitivities import LinearScore, scores_file, write_scores
from graphs.quantize.statistics import Statistics
from validation.calibration_text import CalibrationText, Ids
from validation.fake_quant import within_layer
from validation.reference import Reference
from validation.sensitivity import Forms, Score, cost_of, score_linears

TOKENS, LENGTH = 512, 64
"""That each linear is scored on, context included, and of a sequence: many short ones are of many documents, and half of each is scored."""


def score_artifact(
    step: StepContext, scheme: str, reference: Reference, forms: Forms, text: CalibrationText, statistics: Statistics, *, tokens: int | None = None
) -> dict[str, Any]:
    """Score every linear that has a form, and write the scores.

    Args:
        step: the artifact.
        scheme: whose forms they are.
        reference: on the artifact's weights.
        forms: how each linear is rounded.
        text: what was calibrated on; scores are taken on what of it was not, as far as that goes.
        statistics: for the peaks of activations.
        tokens: to score; None is 512.

    Returns:
        file, scheme, linears, tokens, held_out, text, layer_runs, teraflops, worst {name, mean_kl}; shortfall, why there are fewer tokens than were
        asked for, where there are.
    """
    asked = tokens or TOKENS
    ids, held_out = choose_sequences(text, asked)
    scores = score_linears(reference, ids, forms, step.progress)
    linears = [_linear(reference.config, name, score, forms, statistics) for name, score in scores.items()]
    cost = cost_of(reference.config, list(forms), ids.size)
    about = {"text": text.name, "sha256": text.sha256, "tokens": int(ids.size), "held_out": held_out} | _shortfall(text, asked, ids.size)
    write_scores(step, scheme, linears, about)
    worst = max(linears, key=lambda linear: linear.mean_kl)
    return {
        "file": scores_file(scheme),
        "scheme": scheme,
        "linears": len(linears),
        **about,
        "layer_runs": cost.layer_runs,
        "teraflops": round(cost.teraflops, 3),
        "worst": {"name": worst.name, "mean_kl": worst.mean_kl},
    }


def choose_sequences(text: CalibrationText, tokens: int) -> tuple[Ids, bool]:
    """Beginnings of pieces [S, L] that have at least ``tokens`` tokens where there are so many; and whether none of them was calibrated on."""
    length = length_of(text)
    fresh = [ids[:length] for ids in text.rest if len(ids) >= length]
    used = [ids[:length] for ids in text.sequences if len(ids) >= length]
    chosen = [*fresh, *used][: pieces_of(text, tokens)]
    return np.stack(chosen), len(fresh) >= len(chosen)


def length_of(text: CalibrationText) -> int:
    """Tokens of a scored sequence."""
    return min(LENGTH, max(map(len, text.sequences)))


def pieces_of(text: CalibrationText, tokens: int) -> int:
    """How many pieces so many tokens are of."""
    return max(1, -(-tokens // length_of(text)))


def _shortfall(text: CalibrationText, asked: int, found: int) -> dict[str, str]:
    """What is to be said where fewer tokens are scored than were asked for."""
    length = length_of(text)
    short = f"{asked:,} tokens were asked for, {text.name} has {found:,} in whole sequences of {length}"
    return {"shortfall": short} if found < asked else {}


def _linear(config: LlamaConfig, name: str, score: Score, forms: Forms, statistics: Statistics) -> LinearScore:
    shapes = [linear_shapes(config)[within_layer(member)] for member in members(name)]
    item = np.dtype(forms[name].scale_dtype).itemsize
    weights, rows = sum(map(prod, shapes)), sum(shape[0] for shape in shapes)
    absmax = statistics.of(site_of(name)).absmax
    median = float(np.median(absmax))
    return LinearScore(
        name=name,
        layer=layer_of(name) or 0,
        kind=name.rsplit(".", maxsplit=1)[-1],
        mean_kl=score.kl,
        kl_se=score.kl_se,
        bytes_saved=weights - rows * item,
        weight_error=score.weight_error,
        activation_peak=float(absmax.max()) / median if median else None,
    )
