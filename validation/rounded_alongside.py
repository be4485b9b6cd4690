"""The reference rounded to float16 beside the reference in float32: one pass over the weights serves both, and what float16 costs each layer alone.

A layer's float32 weights are rounded in turn when the float32 sequences are through it, its norms and biases become float16, and products of float16
activations are computed in float32 kernels and rounded (``Float32Products``): the numbers of a run in float16, without reading or widening a weight
twice.
Letters: L tokens, E hidden, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from artifact.layout import layer_prefix
from exporter.model import DecoderLayer
from exporter.rope import rotary_tables
from validation.float16_costs import Float16Costs, relative_errors, score_run
from validation.floor import Float32Products
from validation.local_ratio import TOKENS, mean_error
from validation.perplexity import Window
from validation.reference import Reference, ReferenceRun

HEAD_ROWS = 4096


class RoundedAlongside:
    """Sequences in float16, for ``Reference.run(after_layer=…)``, and what float16 costs along the first of them.

    Args:
        reference: whose layers they go through.
        sequences: token ids [L] each, in the order of that run; the main one first.
    """

    def __init__(self, reference: Reference, sequences: Sequence[np.ndarray]) -> None:
        self._reference = reference
        self._states = reference.embed(sequences, torch.float16)
        self._tables = rotary_tables(reference.config, torch.float16)
        self.hidden_errors: list[float] = []
        self.layer_errors: list[float] = []

    def after_layer(self, number: int, layer: DecoderLayer, entered: Sequence[Tensor], left: Sequence[Tensor]) -> None:
        """One layer further, the layer itself rounded."""
        self._round(layer, number)
        with Float32Products():
            self._states = [self._reference.advance(layer, state, self._tables)[0] for state in self._states]
            alone, _ = self._reference.advance(layer, entered[0][:, :TOKENS].half(), self._tables)
        self.layer_errors.append(mean_error(_array(alone), _array(left[0])[:TOKENS]))
        self.hidden_errors += relative_errors([_array(self._states[0])], [_array(left[0])])

    @torch.inference_mode()
    def runs(self) -> list[ReferenceRun]:
        """What was computed for each sequence; their logits are made under ``Float32Products``."""
        norm, head = self._reference.final_norm(torch.float16), self._rounded_head()
        return [ReferenceRun(norm(state)[0], head) for state in self._states]

    def costs(self, windows: Sequence[Window], halves: Sequence[ReferenceRun], runs: Sequence[ReferenceRun]) -> Float16Costs:
        """What float16 costs, on the windows too.

        Args:
            windows: of the texts.
            halves, runs: of each window, rounded and in float32.
        """
        with Float32Products():
            scores = score_run(windows, halves, runs) if windows else None
        return Float16Costs(scores, self.hidden_errors, self.layer_errors)

    def _round(self, layer: DecoderLayer, number: int) -> None:
        """Products keep float32 tensors, of values that float16 holds; all else becomes float16."""
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 1:
                _replace(layer, name, parameter.half())
            elif not self._reference.is_float16(f"{layer_prefix(number)}.{name}"):
                _replace(layer, name, parameter.half().float())

    def _rounded_head(self) -> Tensor:
        head = self._reference.lm_head
        return head if self._reference.is_float16(self._reference.head_name) else torch.cat([rows.half().float() for rows in head.split(HEAD_ROWS)])


def _replace(layer: nn.Module, name: str, weight: Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(module), attribute, nn.Parameter(weight, requires_grad=False))


def _array(tensor: Tensor) -> np.ndarray:
    """[1, L, E] of any float dtype → [L, E] float32."""
    return tensor[0].float().numpy()
