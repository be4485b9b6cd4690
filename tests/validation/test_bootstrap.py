"""Resampling against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from validation.bootstrap import BLOCK, LEAST_BLOCKS, MOST_BLOCKS, Resampling, _block, interval

DRAWS = 20_000


def correlated(count: int, rho: float, seed: int = 0) -> np.ndarray:
    """A first-order autoregression of variance 1."""
    random = np.random.default_rng(seed)
    values = np.empty(count)
    values[0] = random.normal()
    for index, step in enumerate(random.normal(0, np.sqrt(1 - rho**2), count - 1)):
        values[index + 1] = rho * values[index] + step
    return values


def test_single_tokens_give_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(1).exponential(2, 500)
    draws = Resampling([500], block=1, draws=DRAWS).means(values)
    assert draws.std() == pytest.approx(values.std() / np.sqrt(500), rel=0.02)  # σ / √n; 20,000 draws know it to 0.5 %
    assert draws.mean() == pytest.approx(values.mean(), rel=0.002)


def test_blocks_give_the_standard_error_of_the_mean_of_their_means() -> None:
    values = correlated(512, 0.9)
    draws = Resampling([512], block=16, draws=DRAWS).means(values)
    assert draws.std() == pytest.approx(values.reshape(32, 16).mean(axis=1).std() / np.sqrt(32), rel=0.02)


def test_blocks_see_that_neighbours_are_alike_and_single_tokens_do_not() -> None:
    rho, count = 0.8, 20_000
    values = correlated(count, rho)
    exact = np.sqrt((1 + rho) / (1 - rho) / count)  # of the mean of a long autoregression
    blocks, single = (Resampling([count], block=block).means(values).std() for block in (100, 1))
    assert blocks == pytest.approx(exact, rel=0.15)
    assert single == pytest.approx(exact / 3, rel=0.15)  # √((1 + ρ) / (1 − ρ)) = 3


def test_an_interval_holds_the_middle_of_the_draws() -> None:
    values = np.random.default_rng(2).normal(0, 1, 1000)
    draws = Resampling([1000], block=1, draws=DRAWS).means(values)
    low, high = interval(draws)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * draws.std(), values.mean() + 1.96 * draws.std()), abs=0.002)
    assert ((draws >= low) & (draws <= high)).mean() == pytest.approx(0.95, abs=1e-3)


def test_each_text_is_drawn_by_itself() -> None:
    values = np.concatenate((np.zeros(160), np.ones(480)))  # five and fifteen blocks
    resampling = Resampling([160, 480])
    assert resampling.means(values) == pytest.approx(np.full(2000, 0.75))  # how much there is of each text is no chance
    assert resampling.means(values, 0) == pytest.approx(np.zeros(2000))
    assert resampling.means(values, 1) == pytest.approx(np.ones(2000))
    assert [resampling.slice(text) for text in (None, 0, 1)] == [slice(None), slice(0, 160), slice(160, 640)]


def test_a_last_block_of_fewer_tokens_counts_for_what_it_holds() -> None:
    values = np.concatenate((np.zeros(20), np.full(5, 10.0)))
    draws = Resampling([25], block=10).means(values)
    assert set(np.round(draws, 6)) <= {0.0, 2.0, 5.0, 10.0}  # none, one, two or three of three blocks: 50/25, 100/20, 150/15
    assert draws.max() == 10


def test_the_same_draws_serve_every_form_of_a_model() -> None:
    values = np.random.default_rng(3).normal(3, 2, 640)
    first, second = Resampling([640]), Resampling([640])
    assert (first.means(values + 0.01) - second.means(values)) == pytest.approx(np.full(2000, 0.01))


def test_what_is_not_finite_stays() -> None:
    values = np.ones(64)
    values[3] = np.nan
    assert np.isnan(interval(Resampling([64]).means(values))).all()


@pytest.mark.parametrize(("length", "block"), [(2, 1), (64, 8), (256, BLOCK), (2048, BLOCK), (100_000, 196)])
def test_blocks_are_neither_too_few_nor_too_many(length: int, block: int) -> None:
    assert _block(length) == block
    assert -(-length // block) <= MOST_BLOCKS
    assert length < LEAST_BLOCKS or length // block >= LEAST_BLOCKS
