"""graphs/quantize/gptq.py against GPTQ as its paper writes it, and against every combination of levels where there are few."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from graphs.quantize import gptq
from graphs.quantize.gptq import Feedback, condense, make_feedback, round_in_order

LOW, HIGH = -8, 7


def problem(rows: int, columns: int, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights and scales [in, rows], inputs [n, in] that are correlated and of different sizes, damping [in]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, columns)) @ rng.standard_normal((columns, columns)) * 2 ** rng.uniform(-3, 3, columns)
    weight = rng.standard_normal((columns, rows))
    scale = np.broadcast_to(np.abs(weight).max(axis=0) / HIGH, weight.shape)
    damping = 0.05 * np.square(x).sum(axis=0)
    return tuple(np.ascontiguousarray(one, np.float32) for one in (weight, scale, x, damping))


def of_the_paper(weight: np.ndarray, scale: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Algorithm 1 of arXiv:2210.17323 with columns by falling diagonal: the inverse's Cholesky factor, errors spread over the columns to come."""
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T
    left, levels = weight[order].astype(np.float64), np.empty(weight.shape)
    for j, column in enumerate(order):
        levels[column] = np.clip(np.rint(left[j] / scale[column]), LOW, HIGH)
        error = (left[j] - levels[column] * scale[column]) / factor[j, j]
        left[j + 1 :] -= np.outer(factor[j, j + 1 :], error)
    return levels


def objective(weight: np.ndarray, levels: np.ndarray, scale: np.ndarray, x: np.ndarray, damping: np.ndarray) -> np.ndarray:
    error = weight.astype(np.float64) - levels * scale
    return np.square(x @ error).sum(axis=0) + (damping[:, None] * np.square(error)).sum(axis=0)


@pytest.fixture
def without_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any level may be taken, as in the paper."""
    monkeypatch.setattr(gptq, "REACH", 99)


@pytest.mark.parametrize("samples", [12, 40, 200], ids=["fewer samples than columns", "as many", "more"])
@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.usefixtures("without_reach")
def test_levels_are_those_of_the_paper(samples: int, block: int) -> None:
    weight, scale, x, damping = problem(24, 40, samples)
    levels, _ = round_in_order(weight, scale, LOW, HIGH, make_feedback(x, damping, block))
    expected = of_the_paper(weight, scale, x.T.astype(np.float64) @ x + np.diag(damping))
    assert (levels == expected).mean() > 0.99  # a value between two levels may fall to either side
    ours, papers = (objective(weight, found, scale, x, damping).sum() for found in (levels, expected))
    assert ours == pytest.approx(papers, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_is_near_the_best_of_all_levels_of_a_tiny_row(seed: int) -> None:
    weight, scale, x, damping = problem(1, 4, 6, seed)
    nearest = np.rint(weight / scale)[:, 0]
    choices = [np.clip(nearest + np.array(steps), LOW, HIGH)[:, None] for steps in product((-1, 0, 1), repeat=4)]
    best = min(objective(weight, levels, scale, x, damping)[0] for levels in choices)
    levels, _ = round_in_order(weight, scale, LOW, HIGH, make_feedback(x, damping))
    found, plain = (objective(weight, one, scale, x, damping)[0] for one in (levels, nearest[:, None]))
    assert found <= 1.6 * best
    assert found <= plain * (1 + 1e-6)


def test_without_correlation_every_weight_is_rounded_to_the_nearest_level() -> None:
    weight, scale, _, _ = problem(8, 16, 4)
    levels, residual = round_in_order(weight, scale, LOW, HIGH, make_feedback(np.eye(16, dtype=np.float32), np.ones(16, np.float32)))
    np.testing.assert_array_equal(levels, np.clip(np.rint(weight / scale), LOW, HIGH))
    np.testing.assert_allclose(residual, (weight - levels * scale)[_order(16)], atol=1e-6)


def _order(columns: int) -> np.ndarray:
    return np.arange(columns)


def test_no_weight_is_moved_further_than_the_next_level() -> None:
    weight, scale, x, damping = problem(32, 40, 8, seed=3)
    levels, _ = round_in_order(weight, scale, LOW, HIGH, make_feedback(x, 1e-3 * damping))
    moved = np.abs(levels - np.rint(weight / scale))
    assert moved.max() == gptq.REACH
    assert (LOW, HIGH) <= (levels.min(), levels.max()) <= (HIGH, HIGH)


def test_residual_and_objective_are_those_of_the_errors() -> None:
    weight, scale, x, damping = problem(8, 40, 12)
    feedback: Feedback = make_feedback(x, damping, 16)
    levels, residual = round_in_order(weight, scale, LOW, HIGH, feedback)
    error = weight - levels * scale
    np.testing.assert_allclose(residual, x @ error, rtol=1e-3, atol=1e-4 * np.abs(x @ error).max())
    expected = objective(weight, levels, scale, x, damping)
    np.testing.assert_allclose(feedback.objective(error), expected, rtol=1e-4)
    np.testing.assert_allclose(feedback.objective(error, residual), expected, rtol=1e-3)


def test_condensed_samples_have_the_same_products() -> None:
    _, _, x, _ = problem(1, 6, 50)
    x[:, 2] = 0  # a channel that is never used
    triangle = condense(x)
    assert triangle.shape == (6, 6)
    gram = x.T.astype(np.float64) @ x
    np.testing.assert_allclose(triangle.T @ triangle, gram, rtol=1e-6, atol=1e-6 * gram.max())


def test_channels_without_samples_are_rounded_plainly() -> None:
    weight, scale, x, damping = problem(8, 16, 6)
    x[:, 5] = 0
    levels, _ = round_in_order(weight, scale, LOW, HIGH, make_feedback(x, damping + 1e-3))
    np.testing.assert_array_equal(levels[5], np.clip(np.rint(weight[5] / scale[5]), LOW, HIGH))
