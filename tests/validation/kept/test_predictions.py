"""What is kept of logits against the logits themselves: a true lower bound, and an estimate without bias."""

from __future__ import annotations

import numpy as np
import pytest

from validation import metrics
from validation.kept.predictions import Predictions, diverge, index_dtype, join, keep

V, N = 500, 400
EXACT = 1e-6


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """(reference, other) [N, V] float32: peaked as a model's, the other with noise on every logit."""
    random = np.random.default_rng(1)
    reference = (random.standard_normal((N, V)) * 3).astype(np.float32)
    return reference, (reference + 0.3 * random.standard_normal((N, V))).astype(np.float32)


def kept(logits: np.ndarray, k: int, drawn: int = 16, seed: int = 0) -> Predictions:
    return keep(logits, k, drawn, np.random.default_rng(seed))


def test_all_tokens_kept_is_the_whole_divergence(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, other = pair
    found = diverge(kept(reference, V), other)
    assert np.allclose(found.kl, metrics.kl_divergence(other, reference), atol=EXACT)
    assert np.array_equal(found.kl, found.lower)


@pytest.mark.parametrize("k", [5, 16, 64, 256])
def test_lumping_is_a_lower_bound_at_every_position(pair: tuple[np.ndarray, np.ndarray], k: int) -> None:
    reference, other = pair
    whole = metrics.kl_divergence(other, reference)
    lower = diverge(kept(reference, k), other).lower
    assert (lower <= whole + EXACT).all()
    assert lower.mean() < whole.mean()


def test_the_bound_rises_with_k_and_the_estimate_stays(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, other = pair
    whole = metrics.kl_divergence(other, reference).mean()
    found = [diverge(kept(reference, k), other) for k in (8, 32, 128)]
    bounds = [one.lower.mean() / whole for one in found]
    assert bounds == sorted(bounds)
    assert bounds[0] < 0.8 < bounds[-1] < 1
    assert [one.kl.mean() / whole for one in found] == pytest.approx([1, 1, 1], abs=0.05)


def test_the_estimate_has_no_bias(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Over many draws its mean is the whole divergence, within three standard errors; the bound alone is far from it."""
    reference, other = (side[:20] for side in pair)
    whole = metrics.kl_divergence(other, reference).mean()
    found = [diverge(kept(reference, 8, seed=seed), other) for seed in range(100)]
    estimates = np.array([one.kl.mean() for one in found])
    error = estimates.std(ddof=1) / 10
    assert abs(estimates.mean() - whole) < 3 * error
    assert found[0].lower.mean() < whole - 30 * error


def test_the_same_logits_diverge_by_nothing(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = diverge(kept(pair[0], 16), pair[0])
    assert 0 <= found.kl.max() < EXACT
    assert (found.best == 1).all()
    assert (found.shared == 1).all()


def test_best_and_shared_are_those_of_whole_logits(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, other = pair
    targets = np.zeros(N, np.int64)
    _, _, best, shared = metrics.token_scores(other, reference, targets)
    found = diverge(kept(reference, 16), other)
    assert np.array_equal(found.best, best)
    assert np.array_equal(found.shared, shared)


def test_damage_in_the_rest_alone_is_seen_by_the_draw(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Two thirds of the rest swap their logits: no kept token and no bucket changes."""
    reference = pair[0]
    order = np.argsort(-reference, axis=-1)
    other = reference.copy()
    for row in range(N):
        rest = order[row, 16:]
        other[row, rest] = np.roll(reference[row, rest], 40)
    whole = metrics.kl_divergence(other, reference)
    found = diverge(kept(reference, 16), other)
    assert found.lower.max() < EXACT
    assert found.kl.mean() == pytest.approx(whole.mean(), rel=0.1)


def test_not_finite_logits_are_not_finite(pair: tuple[np.ndarray, np.ndarray]) -> None:
    other = pair[1].copy()
    other[3] = np.nan
    found = diverge(kept(pair[0], 16), other)
    assert np.isnan(found.kl[3])
    assert np.isfinite(np.delete(found.kl, 3)).all()


def test_a_vocabulary_smaller_than_k_is_kept_whole() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    small = kept(logits, 128)
    assert small.top_ids.shape == (3, 8)
    assert np.isneginf(small.log_rest).all()
    assert np.isfinite(diverge(small, logits[:, ::-1]).kl).all()


def test_ids_take_two_bytes_where_they_fit() -> None:
    assert index_dtype(65536) is np.uint16
    assert index_dtype(65537) is np.uint32


def test_pieces_joined_are_the_whole(pair: tuple[np.ndarray, np.ndarray]) -> None:
    whole = kept(pair[0], 8)
    again = join([whole[:100], whole[100:]])
    assert np.array_equal(again.top_logits, whole.top_logits)
    assert len(again) == N
