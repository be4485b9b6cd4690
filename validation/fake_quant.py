"""What quantising a linear does to it, computed in float32 in the reference's own layer: its weight, and its input, rounded and given back.

Smoothing multiplies a weight's columns by s and divides its input by s. Here both are undone after rounding, so that a linear is rounded as the
scheme rounds it and everything around it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from artifact.layout import layer_of, layer_prefix, members
from exporter.model import DecoderLayer
from graphs.quantize.int8 import round_plainly_by_row
from graphs.quantize.islands import HIGHEST, LOWEST

Weight = NDArray[np.float32]
Rounding = Callable[[str, Weight], Weight]
"""Module path of a linear and its weight [out, in], smoothed → as it is once it is dequantised."""


def round_rows(name: str, weight: Weight) -> Weight:
    """Plain rounding, one float32 scale a row."""
    return round_plainly_by_row(weight)


@dataclass(frozen=True)
class Form:
    """How the linears of one input are rounded.

    Attributes:
        columns: s [in] float32; None for no smoothing.
        activation_scale: of the smoothed input; None where it is not quantised.
        rounding: of the smoothed weight.
        scale_dtype: of the weight's scales.
    """

    columns: NDArray[np.float32] | None = None
    activation_scale: float | None = None
    rounding: Rounding = round_rows
    scale_dtype: str = "float32"

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """Module path and [out, in] float32 → as it is once it is dequantised."""
        smoothed = weight.numpy() if self.columns is None else weight.numpy() * self.columns
        rounded = self.rounding(name, smoothed)
        return torch.from_numpy(rounded if self.columns is None else rounded / self.columns)

    def input(self, values: Tensor) -> Tensor:
        """[…, in] float32 → as they are once they are dequantised."""
        if self.activation_scale is None:
            return values
        step = torch.tensor(self.activation_scale) * (torch.ones(()) if self.columns is None else torch.from_numpy(self.columns))
        return (values / step).round_().clamp_(LOWEST, HIGHEST).mul_(step)


def within_layer(module: str) -> str:
    """Module path within its decoder layer: `model.layers.3.mlp.up_proj` → `mlp.up_proj`."""
    return module.removeprefix(f"{layer_prefix(layer_of(module) or 0)}.")


@contextmanager
def quantised(layer: DecoderLayer, forms: Mapping[str, Form]) -> Iterator[dict[str, float]]:
    """A layer with some of its linears rounded (module path → form); as it was afterwards.

    Gives the relative root mean square error of each one's weight.
    """
    errors = {}
    with ExitStack() as undo:
        for name, form in forms.items():
            squared = total = 0.0
            for member in members(name):
                linear = layer.get_submodule(within_layer(member))
                exact = linear.get_parameter("weight")
                rounded = form.weight(member, exact.detach())
                squared += float((rounded - exact.detach()).square().sum())
                total += float(exact.detach().square().sum())
                linear.weight = nn.Parameter(rounded, requires_grad=False)
                undo.callback(setattr, linear, "weight", exact)
                hook = linear.register_forward_pre_hook(lambda _, inputs, form=form: (form.input(inputs[0]), *inputs[1:]))
                undo.callback(hook.remove)
            errors[name] = (squared / total) ** 0.5 if total else 0.0
        yield errors
