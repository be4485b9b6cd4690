"""graphs/quantize/smoothing.py: what is chosen, on inputs of which the answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifact.config import LlamaConfig
from graphs.quantize.smoothing import ALPHAS, HEADROOMS, HIGHEST, LARGEST_FACTOR, factors, search, smooth, unsmoothed
from graphs.quantize.statistics import FIELDS, SiteStatistics, Statistics

IN, OUT, ROWS = 64, 48, 200
CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64,
    max_position_embeddings=96, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
)  # fmt: skip
WIDTHS = {"self_attn.qkv_proj": (64, 32), "self_attn.o_proj": (32, 32), "mlp.gate_up_proj": (96, 32), "mlp.down_proj": (32, 48)}


def measured(samples: np.ndarray, first: np.ndarray | None = None) -> SiteStatistics:
    first = samples[:4] if first is None else first
    rows = np.concatenate([samples, first])
    return SiteStatistics(np.abs(rows).max(axis=0), np.square(samples).mean(axis=0), samples, first)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_outlier(size: float = 100) -> np.ndarray:
    samples = noise(ROWS, IN)
    samples[:, 7] *= size
    return samples


def test_factors_balance_inputs_and_weights() -> None:
    inputs, weights = np.array([1, 4, 100], np.float32), np.array([2, 2, 0.5], np.float32)
    half = factors(inputs, weights, 0.5)
    np.testing.assert_allclose(half / half[0], np.sqrt(inputs / weights) / np.sqrt(inputs / weights)[0], rtol=1e-6)
    assert np.exp(np.log(half).mean()) == pytest.approx(1)
    all_of_it = factors(inputs, weights, 1.0)
    np.testing.assert_allclose(inputs / all_of_it, (inputs / all_of_it)[0], rtol=1e-6)
    np.testing.assert_array_equal(factors(inputs, weights, None), np.ones(3, np.float32))


def test_silent_channel_keeps_a_factor_in_range() -> None:
    vector = factors(np.array([0, 1, 1e4], np.float32), np.array([1, 0, 1], np.float32), 0.9)
    assert np.isfinite(vector).all()
    assert vector.min() >= 1 / LARGEST_FACTOR * 0.999
    assert vector.max() <= LARGEST_FACTOR * 1.001


def test_moves_an_outlier_into_the_weights() -> None:
    found = search(noise(OUT, IN, seed=1), measured(with_outlier()))
    assert found.alpha in ALPHAS
    assert found.vector[7] > 5 * np.delete(found.vector, 7).max()
    assert found.error < found.plain_error / 20
    largest = np.abs(with_outlier() / found.vector).max()
    assert found.activation_scale == pytest.approx(found.headroom * largest / HIGHEST, rel=1e-5)


def test_leaves_inputs_alone_that_smoothing_does_not_help() -> None:
    """Inputs and weights are levels already, so one scale is exact, and no factor can be better."""
    samples = np.sign(noise(ROWS, IN)) * np.where(np.arange(IN) % 3, 1, 64 / HIGHEST).astype(np.float32)
    found = search(np.sign(noise(OUT, IN, seed=1)), measured(samples))
    assert found.alpha is None
    np.testing.assert_array_equal(found.vector, np.ones(IN, np.float32))
    assert found.error == found.plain_error < 1e-8


def test_a_scale_is_judged_by_what_all_other_parts_of_the_text_reach() -> None:
    """Rows of one part reach further than any other sampled row; what decides is whether all of the other parts' tokens, sampled or not, do."""
    samples = np.clip(noise(ROWS, IN), -1, 1)
    samples[: ROWS // 4] *= 1.45
    still, weight = measured(samples, samples[-1:]), noise(OUT, IN, seed=1)
    counts = (ROWS // 4,) * 4
    reached = replace(still, part_absmax=np.full((4, IN), 1.45, np.float32), part_samples=counts)
    sampled = np.stack([np.abs(part).max(axis=0) for part in np.split(samples, 4)])
    alone = replace(still, part_absmax=sampled, part_samples=counts)
    assert search(weight, reached).headroom == 1.0
    assert search(weight, alone).headroom > 1.0
    assert search(weight, reached).error < search(weight, alone).error


def test_position_0_is_among_what_a_scale_is_made_from() -> None:
    samples = np.clip(noise(ROWS, IN), -1, 1)
    spike = np.zeros((1, IN), np.float32)
    spike[0, 3] = 50
    parts = np.stack([np.abs(part).max(axis=0) for part in np.split(samples, 4)])
    found = search(noise(OUT, IN, seed=1), replace(measured(samples, spike), part_absmax=parts, part_samples=(ROWS // 4,) * 4))
    assert found.first_error < 0.02
    assert found.vector[3] > 5 * np.delete(found.vector, 3).max()


def test_gives_headroom_where_the_other_half_reaches_further() -> None:
    samples = noise(ROWS, IN)
    samples = np.clip(samples, -1, 1)
    samples[::2] *= np.where(np.arange(ROWS // 2) < ROWS // 4, 1, 1.45)[:, None]  # the second half is wider
    still = np.clip(noise(ROWS, IN), -1, 1)
    weight = noise(OUT, IN, seed=1)
    assert search(weight, measured(samples, samples[:1])).headroom == max(HEADROOMS)
    assert search(weight, measured(still, still[:1])).headroom == 1.0


def test_position_0_takes_part() -> None:
    """A spike that only position 0 has: the scale must hold it, though no sampled row shows it."""
    first = noise(8, IN, seed=3)
    first[:, 5] = 500
    found = search(noise(OUT, IN, seed=1), measured(noise(ROWS, IN), first))
    assert found.activation_scale * HIGHEST >= np.abs(first / found.vector).max() * 0.999
    assert found.vector[5] > 5 * np.delete(found.vector, 5).max()
    assert found.first_error < 0.01


def test_one_row_at_position_0_serves_both_halves() -> None:
    found = search(noise(OUT, IN, seed=1), measured(with_outlier(), with_outlier()[:1]))
    assert found.error < found.plain_error


def test_nothing_moved_is_one_scale_of_the_largest() -> None:
    plain = unsmoothed(measured(with_outlier()))
    assert plain.alpha is None
    assert plain.activation_scale == pytest.approx(np.abs(with_outlier()).max() / HIGHEST)
    np.testing.assert_array_equal(plain.vector, np.ones(IN, np.float32))


def test_input_of_zeros_has_a_scale_above_zero() -> None:
    silent = measured(np.zeros((8, IN), np.float32))
    assert unsmoothed(silent).activation_scale > 0
    assert search(noise(OUT, IN), silent).activation_scale > 0


def test_every_site_is_searched_and_heads_of_a_group_share_a_factor(tmp_path: Path) -> None:
    sites = {f"model.layers.0.{name}": shape for name, shape in WIDTHS.items()}
    tensors = {}
    for seed, (site, (_, width)) in enumerate(sites.items()):
        of_site = measured(noise(ROWS, width, seed=seed) * np.exp(noise(width, seed=99)))
        tensors |= {f"{site}.{field}": getattr(of_site, field) for field in FIELDS}
    save_file(tensors, tmp_path / "calibration.safetensors")
    found = smooth(CONFIG, Statistics(tmp_path / "calibration.safetensors"), sites, lambda site: noise(*sites[site], seed=5).astype(np.float16))
    assert list(found) == list(sites)
    heads = found["model.layers.0.self_attn.o_proj"].vector.reshape(2, 2, 8)  # [kv heads, query heads of each, head_dim]
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    assert len(np.unique(found["model.layers.0.mlp.down_proj"].vector)) > 40
