"""What a set of quantised linears costs together: perplexity and divergence of the whole model, streamed, against the float32 reference.

Letters: L tokens of a window, m of them scored, E hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from artifact.layout import layer_of
from artifact.progress import Progress, silent
from exporter.rope import rotary_tables
from graphs.quantize.placement import Measured
from validation.bootstrap import Resampling
from validation.fake_quant import quantised
from validation.perplexity import Window, scored_of
from validation.quality import percent_of
from validation.reference import Reference
from validation.sensitivity import BLOCK, Forms, divergence


class JointCost:
    """Measures sets of one model on the same tokens.

    Args:
        reference: the model, streamed.
        windows: what is scored.
        progress: told which layer runs.
    """

    def __init__(self, reference: Reference, windows: Sequence[Window], progress: Progress = silent) -> None:
        self._reference, self._windows, self._progress = reference, windows, progress

    @torch.inference_mode()
    def measure(self, forms: Forms) -> Measured:
        """What these linears cost together; one pass over the weights (two the first time). Errors are of blocks of neighbours drawn again."""
        parts = [self._compare(*pair) for pair in zip(self._windows, self._exact, self.final_states(forms), strict=True)]
        kl, difference = (torch.cat(side).numpy() for side in zip(*parts, strict=True))
        resampling = Resampling(scored_of(self._windows))
        increase_se, kl_se = (float(draws.std(ddof=1)) for draws in (percent_of(resampling.means(difference)), resampling.means(kl)))
        return Measured(float(kl.mean()), float(percent_of(difference.mean())), increase_se, len(kl), kl_se)

    @cached_property
    def _exact(self) -> list[Tensor]:
        """What leaves the last layer of the reference, [L, E] of each window."""
        return self.final_states({})

    @torch.inference_mode()
    def final_states(self, forms: Forms) -> list[Tensor]:
        """What leaves the last layer with these linears quantised, before the final norm: [L, E] of each window."""
        config = self._reference.config
        states = self._reference.embed([window.inputs for window in self._windows])
        tables = rotary_tables(config, torch.float32)
        for number in range(config.num_hidden_layers):
            self._progress("measuring a set of quantised linears, whole", number, config.num_hidden_layers)
            layer = self._reference.decoder_layer(number)
            with quantised(layer, {name: form for name, form in forms.items() if layer_of(name) == number}):
                states = [self._reference.advance(layer, state, tables)[0] for state in states]
            del layer  # before the next one is read
        return [state[0] for state in states]

    def _compare(self, window: Window, exact: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Of the scored tokens of a window [m]: divergence, and how much less likely they are, nats."""
        norm, head, targets = self._reference.final_norm(), self._reference.lm_head, torch.from_numpy(window.targets)
        kl, difference = [], []
        for start in range(0, len(targets), BLOCK):
            wanted = targets[start : start + BLOCK, None]
            rows = slice(len(exact) - len(targets) + start, len(exact) - len(targets) + start + len(wanted))
            log_p, log_q = (torch.log_softmax(F.linear(norm(each[rows]), head), dim=-1) for each in (exact, state))
            kl.append(divergence(log_p.exp(), log_p, log_q))
            difference.append((log_p.gather(1, wanted) - log_q.gather(1, wanted))[:, 0])
        return torch.cat(kl).double(), torch.cat(difference).double()
