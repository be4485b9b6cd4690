from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter.checkpoints import Checkpoint
from validation.float16_costs import relative_errors
from validation.floor import streamed_logits
from validation.local_ratio import float16_layer_errors
from validation.perplexity import make_windows
from validation.reference import Reference
from validation.rounded_alongside import RoundedAlongside


def test_relative_errors_are_of_each_position_so_that_a_large_one_does_not_hide_the_others() -> None:
    exact = np.array([[24000.0, 0, 0], [3.0, 0, 4.0], [0, 0, 2.0]], np.float32)
    ours = exact + np.array([[0, 0, 24.0], [0, 0.5, 0], [0, 0, 0]], np.float32)
    assert relative_errors([ours, exact.astype(np.float16)], [exact, exact]) == pytest.approx([(0.001 + 0.1 + 0) / 3, 0])


def test_relative_errors_keep_what_is_not_finite_and_leave_out_what_has_no_length() -> None:
    exact = np.array([[0, 0], [1, 0]], np.float32)
    assert relative_errors([np.array([[1, 1], [1.5, 0]])], [exact]) == [0.5]
    assert np.isnan(relative_errors([np.array([[0, 0], [np.nan, 0]])], [exact])).all()
    assert relative_errors([exact], [np.zeros_like(exact)]) == [0.0]


def test_float16_costs_little_and_not_nothing(checkpoint: Checkpoint) -> None:
    config, reference = checkpoint.config, Reference(checkpoint.config, checkpoint.read)
    main = np.random.default_rng(0).integers(0, config.vocab_size, 48)
    windows = make_windows(np.random.default_rng(1).integers(0, config.vocab_size, 121), 120, 64, None)
    sequences = [main, *(window.inputs for window in windows)]
    rounded = RoundedAlongside(reference, sequences)
    _, *runs = reference.run(sequences, after_layer=rounded.after_layer)
    costs = rounded.costs(windows, rounded.runs()[1:], runs)
    assert len(costs.hidden_errors) == config.num_hidden_layers
    assert all(0 < error < 0.01 for error in costs.hidden_errors)
    assert costs.scores is not None
    assert len(costs.scores.kl) == 120
    assert 0 < costs.scores.kl.mean() < 1e-4
    assert rounded.costs([], [], []).scores is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float16_alongside_is_float16_by_itself(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    weights: dict[str, torch.Tensor] = {}

    def read(name: str) -> torch.Tensor:
        return weights.setdefault(name, (checkpoint.read(name).float() * 1.37).to(dtype))

    reference = Reference(checkpoint.config, read)
    sequences = [np.arange(3, 51), np.arange(20, 50)]
    rounded = RoundedAlongside(reference, sequences)
    runs = reference.run(sequences, keep_hidden={0}, after_layer=rounded.after_layer)
    together, alone = streamed_logits(reference, sequences, rounded.runs()), streamed_logits(reference, sequences)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    assert runs[0].hidden is not None
    assert rounded.layer_errors == float16_layer_errors(reference, runs[0].hidden)
    exact = Reference(checkpoint.config, read).run(sequences)
    assert all(np.array_equal(ours.logits(), theirs.logits()) for ours, theirs in zip(runs, exact, strict=True))
