"""Every layer alone, from the reference's hidden state, while its session is open for the scenarios: the numerators of local ratios (local_ratio.py).

Letters: L tokens, E hidden, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from validation.local_ratio import first_tokens, mean_error
from validation.streamed_pass import Array, Batch


@dataclass
class LayersAlone(Batch):
    """One call of L tokens from an empty cache; before each layer its hidden state is the reference's own.

    Attributes:
        states: the reference's N+1 hidden states [L, E] float32, from position 0.
        errors: mean |layer(state rounded to float16), rounded to float16, − the next state| of every layer so far.
    """

    states: Sequence[Array] = field(default=(), repr=False)
    errors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """As many tokens of the states as are used."""
        self.states = first_tokens(self.states)

    def enter(self, layer: int) -> None:
        """From the reference, and not from what left the last layer."""
        self.hidden[0] = self.states[layer].astype(np.float16)[None]

    def leave(self, layer: int) -> None:
        """What the layer alone is wrong by."""
        with np.errstate(over="ignore"):
            given = self.hidden[0][0].astype(np.float16)
        self.errors.append(mean_error(given, self.states[layer + 1]))
