"""What float16 itself costs on the texts and layer by layer: the reference rounded to float16 after every operation, its products in float32 kernels.

A quantised form is read beside it: what is no further from float32 than this is no loss that a float16 model would not have too.
Letters: L tokens, E hidden, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation import perplexity
from validation.perplexity import TokenScores, Window
from validation.reference import ReferenceRun

Array = NDArray[Any]


@dataclass(frozen=True)
class Float16Costs:
    """What float16 costs.

    Attributes:
        scores: of the texts' tokens; None where there are none.
        hidden_errors: relative error of the hidden state after each layer [N], along the main sequence.
        layer_errors: mean error of each layer alone [N], from the reference's hidden state: the denominators of local ratios (local_ratio.py).
    """

    scores: TokenScores | None
    hidden_errors: list[float]
    layer_errors: list[float]


def score_run(windows: Sequence[Window], runs: Sequence[ReferenceRun], reference: Sequence[ReferenceRun] | None = None) -> TokenScores:
    """Scores of what the reference computed; in float32 it is compared with nothing."""
    scored = [slice(len(window.inputs) - len(window.targets), None) for window in windows]
    against = None if reference is None else lambda index: reference[index].logits(scored[index])
    return perplexity.score(windows, lambda index: runs[index].logits(scored[index]), against)


def relative_errors(states: Sequence[Array], reference: Sequence[Array]) -> list[float]:
    """Error of each layer's hidden state ÷ its size, both as lengths of vectors, the mean over positions.

    Position by position, because the first token's state is a thousand times larger than the others' and would be all that one sum sees.

    Args:
        states: N arrays [L, E] of any float dtype.
        reference: the same in float32.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return [_relative(ours.astype(np.float32), theirs) for ours, theirs in zip(states, reference, strict=True)]


def _relative(ours: Array, theirs: Array) -> float:
    size = np.linalg.norm(theirs, axis=-1)
    known = size != 0  # NaN is: what is not finite stays so
    return float(np.mean(np.linalg.norm(ours - theirs, axis=-1)[known] / size[known], dtype=np.float64)) if known.any() else 0.0
