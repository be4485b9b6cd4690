"""What int8-smoothquant moved from inputs into the weights of a layer, read off the graph itself: factors that must cancel.

    norm ÷ s        q·k·v and gate·up are multiplied by s column by column          s = the checkpoint's norm ÷ the graph's
    v, up ÷ s       o_proj and down_proj are multiplied by s column by column       s = the scale that rounding a row would give ÷ the graph's

So each matrix is held against the checkpoint's with the factors that another asks for: one that does not cancel is a fault of the later weight.
Letters: E hidden, K kv heads, H query heads, D head_dim.
Source: graphs/quantize/scaling.py, which folds them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.layout import PACKED, layer_prefix
from graphs.quantize.scaling import NORMS, ROWS
from validation.bisect.rounded_block import SCALE
from validation.bisect.weights import Weight

Array = NDArray[Any]
Exact = Callable[[str], Array]
ROOM = 3 * SCALE
"""What a scale may be off by: its own last place of float16, and that of the scale which its factors are read off, with float32's products."""


@dataclass(frozen=True)
class Factors:
    """Of one weight.

    Attributes:
        columns: what its columns are multiplied by [in]; None for nothing.
        rows: what its rows, a norm's or a bias's values are multiplied by [out]; None for nothing.
        source: where the columns' are read off.
    """

    columns: Array | None = None
    rows: Array | None = None
    source: str = ""

    @property
    def nothing(self) -> bool:
        """Whether nothing was moved."""
        return self.columns is None and self.rows is None

    def of(self, exact: Array) -> Array:
        """The weight as smoothing leaves it."""
        scaled = exact if self.columns is None else exact * self.columns
        if self.rows is None:
            return scaled
        wanted: Array = scaled * (self.rows if scaled.ndim == 1 else self.rows[:, None])
        return wanted


def factors_of(config: LlamaConfig, layer: int, found: Mapping[str, Weight], exact: Exact) -> tuple[dict[str, Factors], list[str]]:
    """Weight → its factors, of every weight of a layer that has some; and those whose factors can't be known.

    Args:
        config: says which heads share a factor.
        layer: which.
        found: the weights that the graph computes with, by the checkpoint's names.
        exact: name → the checkpoint's, rounded to the artifact's dtype, float32.
    """
    prefix, factors, unknown = f"{layer_prefix(layer)}.", dict[str, Factors](), list[str]()
    for site, norm in NORMS.items():
        name = f"{prefix}{norm}.weight"
        if name not in found:
            unknown += [f"{prefix}{member}.weight" for member in PACKED[site]]
            continue
        moved = _moved_from_norm(found[name].array, exact(name))
        factors[name] = Factors(rows=None if moved is None else 1 / moved)
        factors |= {f"{prefix}{member}.weight": Factors(moved, source=norm) for member in PACKED[site]}
    for member, reader in ROWS.items():
        name, later = f"{prefix}{member}.weight", f"{prefix}{reader}.weight"
        if name not in found or name not in factors:
            unknown += [later]
            continue
        first = factors[name]
        rows = _rows(found[name], first.of(exact(name)))
        factors[name] = Factors(first.columns, rows, first.source)
        factors[f"{prefix}{member}.bias"] = Factors(rows=rows)
        factors[later] = Factors(None if rows is None else 1 / _read_by(config, reader, rows), source=member)
    return factors, [name for name in unknown if name in found]


def _read_by(config: LlamaConfig, reader: str, rows: Array) -> Array:
    """The rows [K·D] of values as the query heads that read them have them side by side [H·D]; of others as they are."""
    if reader != "self_attn.o_proj":
        return rows
    group = config.num_attention_heads // config.num_key_value_heads
    return np.repeat(rows.reshape(config.num_key_value_heads, 1, -1), group, axis=1).ravel()


def _moved_from_norm(ours: Array, exact: Array) -> Array | None:
    """What a norm was divided by [E]; where that is no positive number, 1, and the norm is at fault. None for nothing."""
    if np.array_equal(ours, exact):
        return None
    return _positive(np.divide(exact, ours, out=np.ones_like(exact), where=(ours != 0) & (exact != 0)))


def _rows(weight: Weight, wanted: Array) -> Array | None:
    """What the rows of a weight are multiplied by [out]: of a rounded one by its scale, which the row's largest level or the one below it is of.

    None where that is no more than a scale's own rounding.
    """
    size = np.maximum(np.square(wanted, dtype=np.float64).sum(axis=1), 1e-300)
    slope = np.einsum("oi,oi->o", weight.array, wanted, dtype=np.float64) / size
    rows = slope
    if weight.grid is not None:
        either = np.abs(weight.array).max(axis=1) / np.array([[weight.grid.high], [weight.grid.high - 1]], np.float32)  # scales [2, out]
        scale = np.take_along_axis(either, np.stack([_from_whole(weight.array, one) for one in either]).argmin(axis=0)[None], axis=0)[0]
        rows = scale / weight.grid.scale_of(wanted[:, None], 1.0)[:, 0]
    found = _positive(rows)
    return None if np.abs(found - 1).max() <= SCALE else found


def _from_whole(rows: Array, scale: Array) -> Array:
    """How far the values of rows are from whole numbers of a scale each [out]."""
    levels = rows / np.maximum(scale, 1e-30)[:, None]
    found: Array = np.abs(levels - np.rint(levels)).max(axis=1)
    return found


def _positive(factors: Array) -> Array:
    """The factors, and 1 where one is no positive number."""
    return np.where(np.isfinite(factors) & (factors > 0), factors, np.float32(1)).astype(np.float32)
