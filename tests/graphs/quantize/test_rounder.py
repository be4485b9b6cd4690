"""graphs/quantize/rounder.py: data-driven rounding is never worse than plain by its own objective, and says what it cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifact.errors import QuantizationError
from graphs.quantize.int8 import FORM as INT8
from graphs.quantize.rounder import Rounder, prepare, rounding_report
from graphs.quantize.rounding import FACTORS, Format, Grid, largest_over, round_plainly, search_scale
from graphs.quantize.statistics import FIELDS, SiteStatistics, Statistics

SITE = "model.layers.0.mlp.down_proj"
HALF = np.dtype(np.float16)
IN = 96
INT4 = Grid(-8, 7, 32, largest_over(7, HALF), FACTORS)
GRIDS = {"int8": INT8.grid(SITE, IN, HALF), "int4": INT4, "onnxruntime int4": Format(4, 64).grid(HALF)}


@pytest.fixture
def site() -> SiteStatistics:
    """Correlated inputs, some channels large, and one that is huge at position 0."""
    rng = np.random.default_rng(0)
    samples = (rng.standard_normal((200, 24)) @ rng.standard_normal((24, IN)) * 4 ** rng.uniform(-1, 1, IN)).astype(np.float16)
    first = samples[:2].copy()
    first[:, 7] = 900
    exact = samples.astype(np.float32)
    return SiteStatistics(np.abs(exact).max(axis=0), np.square(exact).mean(axis=0), exact, first.astype(np.float32))


@pytest.fixture
def statistics(site: SiteStatistics, tmp_path: Path) -> Statistics:
    tensors = {f"{SITE}.{name}": getattr(site, name) for name in FIELDS}
    save_file(tensors, tmp_path / "calibration.safetensors")
    return Statistics(tmp_path / "calibration.safetensors")


@pytest.fixture
def weight() -> np.ndarray:
    return (0.05 * np.random.default_rng(1).standard_normal((40, IN))).astype(np.float16)


@pytest.mark.parametrize("kind", GRIDS)
def test_no_row_is_worse_than_plain_rounding(kind: str, site: SiteStatistics, statistics: Statistics, weight: np.ndarray) -> None:
    grid, exact, feedback = GRIDS[kind], weight.astype(np.float32), prepare(site).feedback
    levels, scale = Rounder(statistics).round(weight, SITE, grid)
    plain_levels, plain_scale = round_plainly(exact, grid)
    chosen, plain = (feedback.objective((exact - one * grid.spread(steps, IN)).T) for one, steps in ((levels, scale), (plain_levels, plain_scale)))
    assert (chosen <= plain * (1 + 1e-5)).all()
    assert chosen.sum() < 0.75 * plain.sum()
    assert (grid.low, grid.high) <= (levels.min(), levels.max()) <= (grid.high, grid.high)


def test_position_0_keeps_its_output(site: SiteStatistics, statistics: Statistics, weight: np.ndarray) -> None:
    grid, exact = GRIDS["int8"], weight.astype(np.float32)
    levels, scale = Rounder(statistics).round(weight, SITE, grid)
    plain_levels, plain_scale = round_plainly(exact, grid)
    chosen, plain = (np.square(site.first @ (exact - a * b).T).sum() for a, b in ((levels, scale), (plain_levels, plain_scale)))
    assert chosen < plain


def test_report_compares_outputs_with_plain_rounding(statistics: Statistics, weight: np.ndarray) -> None:
    driven, plain = Rounder(statistics), Rounder()
    driven.round(weight, SITE, INT4)
    levels, scale = plain.round(weight, SITE, INT4)
    report = rounding_report(driven)
    assert (report["method"], rounding_report(plain)["method"]) == ("gptq", "plain")
    (entry,) = report["rounded"]
    assert entry["name"] == SITE
    assert entry["output_rms"] < entry["plain_output_rms"]
    assert report["output_error"]["chosen"]["worst"] == SITE
    assert "output_error" not in rounding_report(plain)
    error = levels * INT4.spread(scale, IN) - weight.astype(np.float32)
    expected = np.linalg.norm(error) / np.linalg.norm(weight.astype(np.float32))
    assert plain.errors[SITE].report() == {"weight_rms": pytest.approx(expected, rel=1e-4)}


def test_output_error_is_that_of_the_samples(site: SiteStatistics, statistics: Statistics, weight: np.ndarray) -> None:
    rounder, grid, exact = Rounder(statistics), GRIDS["int8"], weight.astype(np.float32)
    levels, scale = rounder.round(weight, SITE, grid)
    seen = prepare(site).samples
    expected = np.linalg.norm(seen @ (levels * scale - exact).T) / np.linalg.norm(seen @ exact.T)
    assert rounder.errors[SITE].report()["output_rms"] == pytest.approx(expected, rel=1e-3)


def test_what_is_outside_the_layers_is_rounded_plainly(statistics: Statistics, weight: np.ndarray) -> None:
    levels, _ = Rounder(statistics).round(weight, "lm_head", INT4)
    np.testing.assert_array_equal(levels, round_plainly(weight.astype(np.float32), INT4)[0])


def test_refuses_statistics_of_another_model(statistics: Statistics, weight: np.ndarray) -> None:
    with pytest.raises(QuantizationError, match=r"down_proj reads 64 channels, the statistics of .* have 96: they are of another model"):
        Rounder(statistics).round(weight[:, :64], SITE, INT4)
    with pytest.raises(QuantizationError, match=r"has no statistics of model\.layers\.7\.mlp\.down_proj"):
        Rounder(statistics).round(weight, "model.layers.7.mlp.down_proj", INT4)


def test_weight_that_is_not_finite_is_named(statistics: Statistics, weight: np.ndarray) -> None:
    weight[3, 5] = np.nan
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.mlp\.down_proj\.weight holds NaN or Inf in rows 0 … 39"):
        Rounder(statistics).round(weight, SITE, INT4)


def test_search_takes_a_smaller_scale_where_it_costs_less(weight: np.ndarray) -> None:
    rows = weight.astype(np.float32)
    rows[:, 0] = 4 * np.abs(rows).max()  # a weight that would leave the others few levels
    importance = np.ones(IN, np.float32)
    importance[0] = 1e-6
    scale, plain = search_scale(rows, INT4, importance), INT4.scale_of(INT4.blocked(rows), 1.0)
    assert (scale[:, 0] < plain[:, 0]).all()
    importance[0] = 1e6
    assert (search_scale(rows, INT4, importance)[:, 0] == plain[:, 0]).all()
