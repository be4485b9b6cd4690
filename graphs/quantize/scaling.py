"""One vector a site, folded exactly into the weights around it: a linear's columns times s, and what makes its input divided by s.

    qkv_proj      ← weight of input_layernorm
    gate_up_proj  ← weight of post_attention_layernorm
    o_proj        ← rows of v_proj; query heads of one group read the same values, so they share a factor
    down_proj     ← rows of up_proj

The graph computes what it did: silu(gate) · up and soft-max · value are linear in up and value, and a bias is a row like any other. Values in the
cache are divided too where o_proj is scaled: such a cache can't be continued by another graph.

A linear is scaled as it is read, some rows at a time. A norm's weight is rounded to its dtype first, and the columns take the ratio that this left.
Letters: E hidden, F ffn, H query heads, K kv heads, D head_dim.
Source: SmoothQuant, arXiv:2211.10438 §4; AWQ, arXiv:2306.00978 §3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import QuantizationError
from artifact.layout import PACKED, layer_of, layer_prefix, linear_shapes
from graphs.quantize.linears import site_of

Floats = NDArray[np.float32]
NORMS = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}
"""Site → the norm that makes its input."""
ROWS = {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}
"""Projection → the site whose input its rows make."""


@dataclass(frozen=True)
class Scaling:
    """What is folded into a model's linears; ``fold`` makes one with the norms that belong to it.

    Attributes:
        vectors: site → s [in], as it really is after the norms were rounded. A site that is not here is not scaled.
        norms: name of a norm's weight → the new weight [E], of the dtype of the old one.

    Raises:
        ValueError: a site that no model has, a vector of another length, not finite or not positive, or one of o_proj that differs within a group.
    """

    config: LlamaConfig
    vectors: Mapping[str, Floats] = field(default_factory=dict)
    norms: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site, vector in self.vectors.items():
            self._check(site, vector)

    def columns(self, module: str) -> Floats | None:
        """What a linear's columns are multiplied by [in]; None for nothing."""
        return self.vectors.get(site_of(module))

    def rows(self, module: str) -> Floats | None:
        """What a linear's rows, and its bias, are divided by [out]; None for nothing. A packed projection holds those of its members."""
        layer = layer_of(module)
        if layer is None:
            return None
        prefix, shapes = f"{layer_prefix(layer)}.", linear_shapes(self.config)
        name = module.removeprefix(prefix)
        members = PACKED.get(name, (name,))
        if not any(prefix + ROWS[member] in self.vectors for member in members if member in ROWS):
            return None
        return np.concatenate([self._member_rows(prefix, member, shapes[member][0]) for member in members])

    def weight(self, module: str, rows: NDArray[Any], first: int = 0) -> Floats:
        """Some rows [n, in] of a linear's weight, from row ``first``, as the scaled graph has them; in float32."""
        columns, divisors = self.columns(module), self.rows(module)
        scaled = rows.astype(np.float32)
        if columns is not None:
            scaled *= columns
        if divisors is not None:
            scaled /= divisors[first : first + len(rows), None]
        return scaled

    def bias(self, module: str, bias: NDArray[Any]) -> Floats:
        """A linear's bias [out] as the scaled graph has it; in float32."""
        divisors = self.rows(module)
        return bias.astype(np.float32) if divisors is None else bias.astype(np.float32) / divisors

    def _member_rows(self, prefix: str, member: str, count: int) -> Floats:
        vector = self.vectors.get(prefix + ROWS[member]) if member in ROWS else None
        if vector is None:
            return np.ones(count, np.float32)
        return self._by_heads(vector)[:, 0].ravel() if member == "self_attn.v_proj" else vector

    def _by_heads(self, vector: Floats) -> Floats:
        """[H·D] → [K, H/K, D]: the query heads that read one kv head side by side."""
        n_kv_heads = self.config.num_key_value_heads
        return vector.reshape(n_kv_heads, self.config.num_attention_heads // n_kv_heads, self.config.head_dim)

    def _check(self, site: str, vector: Floats) -> None:
        layer = layer_of(site)
        name = site.removeprefix(f"{layer_prefix(layer)}.") if layer is not None else site
        member = PACKED.get(name, (name,))[0]
        if name not in (*NORMS, *ROWS.values()):
            raise ValueError(f"{site} is no site that can be scaled: there are {', '.join((*NORMS, *ROWS.values()))} of a layer")
        wanted = linear_shapes(self.config)[member][1]
        if vector.shape != (wanted,) or not np.isfinite(vector).all() or (vector <= 0).any():
            raise ValueError(f"{site} is scaled by {vector.shape}, expected ({wanted},) of finite positive numbers")
        if name == "self_attn.o_proj":
            heads = self._by_heads(vector)
            if (heads != heads[:, :1]).any():
                raise ValueError(f"{site}: query heads that read the same values are scaled apart")


def fold(config: LlamaConfig, vectors: Mapping[str, Floats], read: Callable[[str], NDArray[Any]]) -> Scaling:
    """Fold vectors into a model; only norms are read.

    Args:
        config: the model.
        vectors: site → s [in] as it is wanted.
        read: name of a weight (`model.layers.3.input_layernorm.weight`) → the weight.

    Raises:
        ValueError: a vector that can't be folded.
        QuantizationError: a norm's weight leaves the range of its dtype.
    """
    exact, norms = dict(vectors), {}
    for site, vector in Scaling(config, vectors).vectors.items():
        prefix = f"{layer_prefix(layer_of(site) or 0)}."
        norm = NORMS.get(site.removeprefix(prefix))
        if norm is not None:
            name = f"{prefix}{norm}.weight"
            norms[name], exact[site] = divide_norm(name, read(name), vector)
    return Scaling(config, exact, norms)


def divide_norm(name: str, weight: NDArray[Any], vector: Floats) -> tuple[NDArray[Any], Floats]:
    """A norm's weight [E] divided by a vector [E] and rounded to its dtype; and the vector that it is really divided by, in float32.

    Raises:
        QuantizationError: a quotient is beyond the dtype's range, or becomes zero.
    """
    old = weight.astype(np.float32)
    with np.errstate(over="ignore"):
        new = (old / vector).astype(weight.dtype)
    lost = ~np.isfinite(new) | ((old != 0) & (new == 0))
    if lost.any():
        channel = int(np.flatnonzero(lost)[0])
        raise QuantizationError(f"{name}: {old[channel]:.3g} ÷ {vector[channel]:.3g} in channel {channel} is out of {weight.dtype}'s range")
    real = np.divide(old, new.astype(np.float32), out=np.ones_like(old), where=old != 0)
    return new, real
