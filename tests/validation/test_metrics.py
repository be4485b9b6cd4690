"""Every metric against values worked out by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest

from validation import metrics

REFERENCE = np.array([[0.0, 0.0], [log(3), 0.0]], np.float32)  # probabilities ½ ½ and ¾ ¼
LOGITS = np.array([[log(3), 0.0], [log(3), 0.0]], np.float32)  # ¾ ¼ twice


def test_absolute_errors_are_per_position() -> None:
    mean, largest = metrics.absolute_errors(np.array([[1.0, 5.0], [2.0, 2.0]]), np.array([[0.0, 2.0], [2.0, 2.5]]))
    assert mean.tolist() == [2.0, 0.25]
    assert largest.tolist() == [3.0, 0.5]


def test_absolute_errors_cover_more_positions_than_a_block() -> None:
    logits = np.ones((2 * metrics.BLOCK + 1, 3), np.float16)
    mean, largest = metrics.absolute_errors(logits, np.zeros_like(logits))
    assert mean.tolist() == largest.tolist() == [1.0] * len(logits)


def test_absolute_errors_keep_nan_and_inf() -> None:
    mean, largest = metrics.absolute_errors(np.array([[np.nan, 1], [np.inf, 1], [1, 1]], np.float16), np.ones((3, 2), np.float32))
    assert np.isnan(mean[0])
    assert np.isnan(largest[0])
    assert np.isinf(largest[1])
    assert largest[2] == 0


def test_log_softmax_is_stable_for_large_float16_logits() -> None:
    assert metrics.log_softmax(np.array([[60000.0, 60000.0]], np.float16)) == pytest.approx(np.log([[0.5, 0.5]]))


def test_kl_divergence_is_of_the_reference_from_the_logits() -> None:
    expected = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    assert metrics.kl_divergence(LOGITS, REFERENCE) == pytest.approx([expected, 0], rel=1e-6)


def test_kl_divergence_ignores_a_shift_of_all_logits() -> None:
    assert metrics.kl_divergence(REFERENCE + 7, REFERENCE) == pytest.approx([0, 0], abs=1e-12)


def test_kl_divergence_of_rounding_is_small_and_never_negative() -> None:
    reference = np.random.default_rng(0).normal(0, 5, (50, 5000)).astype(np.float32)
    shift = np.random.default_rng(1).normal(0, 1e-5, reference.shape)
    kl = metrics.kl_divergence(reference + shift, reference)
    assert (kl >= 0).all()
    assert kl.mean() == pytest.approx(1e-10 / 2, rel=0.5)  # σ² / 2


def test_kl_divergence_of_opposite_certainties_is_finite_and_large() -> None:
    assert metrics.kl_divergence(np.array([[0.0, 1000.0]]), np.array([[1000.0, 0.0]]))[0] == pytest.approx(1000, rel=0.01)


def test_negative_log_likelihood_is_of_the_target() -> None:
    assert metrics.negative_log_likelihoods(LOGITS, np.array([0, 1])) == pytest.approx([-log(0.75), -log(0.25)])


def test_token_scores_are_all_in_one_pass() -> None:
    rng = np.random.default_rng(0)
    logits, reference, targets = rng.normal(size=(100, 7)), rng.normal(size=(100, 7)), rng.integers(0, 7, 100)
    nll, kl, best, shared = metrics.token_scores(logits, reference, targets)
    assert np.array_equal(nll, metrics.negative_log_likelihoods(logits, targets))
    assert np.array_equal(kl, metrics.kl_divergence(logits, reference))
    assert best.mean() == metrics.top1_agreement(logits, reference)
    ours, theirs = (np.argsort(side, axis=1)[:, -metrics.TOP :] for side in (logits, reference))
    assert shared.tolist() == pytest.approx([len(set(first) & set(second)) / 5 for first, second in zip(ours, theirs, strict=True)])


def test_of_equal_logits_the_first_is_the_best() -> None:
    logits = np.full((1, 50), -1, np.float16)
    logits[0, [7, 20, 40]] = 2
    for best, agrees in ((7, 1.0), (20, 0.0)):
        reference = np.zeros((1, 50), np.float32)
        reference[0, best] = 1
        assert metrics.token_scores(logits, reference, np.array([0]))[2].tolist() == [agrees]


def test_top1_agreement_counts_positions() -> None:
    assert metrics.top1_agreement(np.array([[1, 0], [0, 1], [1, 0], [1, 0]]), np.array([[1, 0], [1, 0], [3, 2], [9, 0]])) == 0.75


def test_decisive_disagreements_need_a_margin_of_twice_the_noise() -> None:
    reference = np.array([[1.0, 0.0, -5.0], [1.0, 0.0, -5.0], [1.0, 0.0, -5.0]])
    logits = np.array([[0.0, 1.0, -5.0], [0.0, 1.0, -5.0], [2.0, 0.0, -5.0]])
    assert metrics.decisive_disagreements(logits, reference, np.array([0.4, 0.5, 0.4])) == (1, 2)


def test_relative_error_is_root_mean_square_over_root_mean_square() -> None:
    assert metrics.relative_error(np.array([3.0, 0.0]), np.array([0.0, 4.0])) == pytest.approx(5 / 4)
    assert metrics.relative_error(np.zeros(2), np.zeros(2)) == 0
    assert metrics.relative_error(np.ones(2), np.zeros(2)) == float("inf")


def test_relative_error_of_unrelated_values_is_near_the_root_of_two() -> None:
    rng = np.random.default_rng(0)
    assert metrics.relative_error(rng.normal(size=9999), rng.normal(size=9999)) == pytest.approx(2**0.5, rel=0.05)


def test_probabilities_of_log_softmax_add_up_to_one() -> None:
    assert sum(exp(value) for value in metrics.log_softmax(np.arange(9.0)[None])[0]) == pytest.approx(1)
