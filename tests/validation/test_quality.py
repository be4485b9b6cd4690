"""What is said of scores: of each text, beside float16's own, with noise called noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from validation.bootstrap import BEYOND, INSIDE, Resampling
from validation.perplexity import TokenScores
from validation.quality import Judge
from validation.tolerances import gated_value, limits_of

COUNT = 1024
INT8 = {row.check: row.limit for row in limits_of("int8")}


def scores(nll: np.ndarray, kl: float | np.ndarray = 0.0, wrong: int = 0) -> TokenScores:
    best = np.ones(len(nll))
    best[:: len(nll) // wrong if wrong else len(nll) + 1] = 0 if wrong else 1
    return TokenScores(nll, np.full(len(nll), kl), best, np.ones(len(nll)))


@pytest.fixture(scope="module")
def reference() -> TokenScores:
    return scores(np.random.default_rng(0).gamma(1.2, 2.5, 2 * COUNT))


@pytest.fixture(scope="module")
def float16(reference: TokenScores) -> TokenScores:
    return scores(reference.nll + np.random.default_rng(1).normal(0, 0.003, 2 * COUNT), 1e-5, wrong=10)


@pytest.fixture(scope="module")
def judge(reference: TokenScores, float16: TokenScores) -> Judge:
    return Judge(["prose", "code"], Resampling([COUNT, COUNT]), reference, float16)


def of(quality: dict[str, Any], text: str) -> dict[str, Any]:
    return next(scope for scope in quality["texts"] if scope["text"] == text)


def test_numbers_are_those_of_their_tokens(judge: Judge, reference: TokenScores) -> None:
    kl = np.concatenate((np.full(COUNT, 0.001), np.full(COUNT, 0.003)))
    quality = judge.describe(scores(reference.nll + 0.01, kl, wrong=20))
    assert quality["all"]["tokens"] == 2 * COUNT
    assert quality["all"]["perplexity"] == pytest.approx(np.exp(reference.nll.mean() + 0.01))
    assert quality["all"]["reference_perplexity"] == pytest.approx(np.exp(reference.nll.mean()))
    assert quality["all"]["perplexity_increase_pct"] == pytest.approx((np.exp(0.01) - 1) * 100)
    assert quality["all"]["perplexity_se_pct"] == pytest.approx(0, abs=1e-9)  # paired: unpaired it would be 5 %
    assert [scope["mean_kl"] for scope in (quality["all"], *quality["texts"])] == pytest.approx([0.002, 0.001, 0.003])
    assert quality["all"]["top1_agreement"] == pytest.approx(1 - 21 / (2 * COUNT))
    assert [scope["text"] for scope in quality["texts"]] == ["prose", "code"]


def test_an_increase_whose_interval_holds_zero_is_inside_noise(judge: Judge, reference: TokenScores) -> None:
    spread = np.random.default_rng(2).normal(0, 0.2, 2 * COUNT)
    spread -= spread.mean()
    small, large = (judge.describe(scores(reference.nll + spread + shift))["all"] for shift in (0.001, 0.1))
    assert small["perplexity_noise"] == INSIDE
    assert small["perplexity_interval_pct"][0] < 0 < small["perplexity_increase_pct"] < small["perplexity_interval_pct"][1]
    assert large["perplexity_noise"] == BEYOND
    assert large["perplexity_interval_pct"][0] > 0
    width = large["perplexity_interval_pct"][1] - large["perplexity_interval_pct"][0]
    assert width == pytest.approx(3.92 * large["perplexity_se_pct"], rel=0.1)


def test_a_form_is_compared_with_float16_at_the_same_tokens(judge: Judge, reference: TokenScores, float16: TokenScores) -> None:
    assert judge.describe(float16)["all"]["against_float16"] is None
    itself = judge.describe(replace(float16))["all"]["against_float16"]
    assert {key: entry["noise"] for key, entry in itself.items()} == dict.fromkeys(("perplexity_pct", "mean_kl", "top1_agreement"), INSIDE)
    int8 = judge.describe(scores(reference.nll + 0.02, 0.005, wrong=100))["all"]["against_float16"]
    assert {entry["noise"] for entry in int8.values()} == {BEYOND}
    assert int8["mean_kl"]["value"] == pytest.approx(0.005 - 1e-5)
    assert int8["top1_agreement"]["value"] < 0


def test_without_float16_there_is_nothing_beside_it(reference: TokenScores) -> None:
    assert Judge(["a"], Resampling([2 * COUNT]), reference).describe(reference)["all"]["against_float16"] is None


def test_saboteur_whose_tail_alone_is_bad_shows_in_the_99th_percentile(judge: Judge, reference: TokenScores) -> None:
    quiet = np.random.default_rng(3).exponential(0.004, 2 * COUNT)
    damaged = quiet.copy()
    damaged[::64] = 0.2  # 1.6 % of the tokens
    sound, bad = (judge.describe(scores(reference.nll, kl))["all"] for kl in (quiet, damaged))
    assert bad["mean_kl"] < INT8["mean_kl"]  # the mean lets it pass
    assert bad["p99_kl"] > 8 * sound["p99_kl"]


def test_saboteur_who_is_bad_on_one_text_fails_though_the_mean_of_both_holds(judge: Judge, reference: TokenScores) -> None:
    kl = np.concatenate((np.full(COUNT, 0.003), np.full(COUNT, 0.015)))
    nll = reference.nll + np.concatenate((np.zeros(COUNT), np.full(COUNT, 0.015)))
    quality = judge.describe(scores(nll, kl))
    for check, limit in (("mean_kl", INT8["mean_kl"]), ("perplexity_increase_pct", INT8["perplexity_increase_pct"])):
        assert quality["all"][check] <= limit
        value, text = gated_value(check, quality["all"], quality["texts"])
        assert value is not None
        assert value > limit
        assert text == "code"


def test_what_is_not_finite_is_neither_inside_nor_beyond_noise(judge: Judge, reference: TokenScores) -> None:
    nll = reference.nll.copy()
    nll[5] = np.nan
    quality = judge.describe(scores(nll, 0.001))
    assert of(quality, "prose")["perplexity_noise"] is None
    assert np.isnan(of(quality, "prose")["perplexity_increase_pct"])
    assert np.isfinite(of(quality, "code")["perplexity_increase_pct"])
    value, text = gated_value("perplexity_increase_pct", quality["all"], quality["texts"])
    assert np.isnan(value)
    assert text == "prose"
