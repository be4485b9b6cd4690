from __future__ import annotations

import numpy as np
import pytest

from validation.perplexity import TokenScores, Window, increase_pct, make_windows, score

TEXT = np.arange(100, 111)  # 11 tokens


def pairs(windows: list[Window]) -> list[tuple[list[int], list[int]]]:
    return [(window.inputs.tolist(), window.targets.tolist()) for window in windows]


def test_windows_without_bos_score_every_token_but_the_first_once() -> None:
    assert pairs(make_windows(TEXT, 10, 4, None)) == [
        ([100, 101, 102, 103], [101, 102, 103, 104]),
        ([104, 105, 106, 107], [105, 106, 107, 108]),
        ([108, 109], [109, 110]),
    ]


def test_windows_with_bos_start_with_it_and_score_every_token_once() -> None:
    windows = make_windows(TEXT, 11, 4, 1)
    assert pairs(windows)[:2] == [([1, 100, 101, 102], [100, 101, 102, 103]), ([1, 104, 105, 106], [104, 105, 106, 107])]
    assert np.concatenate([window.targets for window in windows]).tolist() == TEXT.tolist()


def test_make_windows_leaves_the_text_alone() -> None:
    make_windows(TEXT, 10, 4, 1)
    assert TEXT.tolist() == list(range(100, 111))


def test_score_takes_windows_in_order_and_compares_with_the_reference() -> None:
    windows = [Window(np.array([0]), np.array([1])), Window(np.array([0, 0]), np.array([0, 1]))]
    even = [np.zeros((1, 2)), np.zeros((2, 2))]
    skewed = [np.array([[0.0, np.log(3)]]), np.zeros((2, 2))]
    scores = score(windows, skewed.__getitem__, even.__getitem__)
    assert scores.nll == pytest.approx([-np.log(0.75), np.log(2), np.log(2)])
    assert scores.kl is not None
    assert scores.kl[0] > 0.1
    assert scores.kl[1:] == pytest.approx([0, 0])
    assert score(windows, even.__getitem__).kl is None


def test_perplexity_of_even_odds_is_the_number_of_choices() -> None:
    assert score([Window(np.array([0]), np.array([3]))], lambda _: np.zeros((1, 8))).perplexity == pytest.approx(8)


def test_increase_is_paired() -> None:
    nll = np.random.default_rng(0).normal(3, 2, 1000)
    increase, standard_error = increase_pct(TokenScores(nll + 0.01), TokenScores(nll))
    assert increase == pytest.approx((np.exp(0.01) - 1) * 100)
    assert standard_error == pytest.approx(0, abs=1e-9)  # unpaired it would be 9 %


def test_standard_error_is_that_of_the_differences() -> None:
    increase, standard_error = increase_pct(TokenScores(np.array([1.0, 1.2, 1.0, 1.2])), TokenScores(np.ones(4)))
    assert increase == pytest.approx((np.exp(0.1) - 1) * 100)
    assert standard_error == pytest.approx(np.exp(0.1) * np.std([0, 0.2, 0, 0.2], ddof=1) / 2 * 100)
