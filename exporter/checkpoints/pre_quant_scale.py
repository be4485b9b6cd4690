"""ModelOpt's pre_quant_scale: a linear reads x · p. Moved to what makes x, exactly, where something does; else into the columns.

    q·k·v        → weight of input_layernorm              all three must have the same p
    gate and up  → weight of post_attention_layernorm     both must
    o_proj       → rows of v_proj                         query heads that read the same values must share a factor
    down_proj    → rows of up_proj

A row takes its factor into its scale, so that no level changes. Where p can't be moved, the columns of the float weight take it: the float graphs
compute the same model, and the linear has no levels that a graph could use.
Letters: H query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.layout import PACKED, layer_prefix

NORMS = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}
"""Packed projection → the norm that makes its input."""
ROWS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
"""Linear → the one whose rows make its input."""


@dataclass(frozen=True)
class Folded:
    """What each weight is multiplied by.

    Attributes:
        rows: module (a norm or a linear) → [out], of its weight's rows and its bias.
        columns: linear → [in], where there was nothing else to take it.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)


def fold(config: LlamaConfig, scales: Mapping[str, Tensor]) -> Folded:
    """Find a place for every vector.

    Args:
        config: the model.
        scales: linear → p [in], float32.

    Raises:
        CheckpointError: one is not finite and positive.
    """
    for module, scale in scales.items():
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise CheckpointError(f"{module}.pre_quant_scale: not all of {scale.numel()} numbers are finite and positive")
    rows: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"{layer_prefix(layer)}."
        for site, norm in NORMS.items():
            vectors = [scales.get(prefix + member) for member in PACKED[site]]
            first = vectors[0]
            if first is not None and all(one is not None and torch.equal(one, first) for one in vectors):
                rows[prefix + norm] = first
        for linear, maker in ROWS.items():
            vector = scales.get(prefix + linear)
            if vector is not None and (shared := vector if linear != "self_attn.o_proj" else _by_values(config, vector)) is not None:
                rows[prefix + maker] = shared
    return Folded(rows, {module: scale for module, scale in scales.items() if not _moved(module, rows)})


def _by_values(config: LlamaConfig, vector: Tensor) -> Tensor | None:
    """[H·D] → [K·D]; None where query heads of a group differ."""
    heads = vector.view(config.num_key_value_heads, -1, config.head_dim)  # [K, H/K, D]
    return heads[:, 0].reshape(-1) if bool((heads == heads[:, :1]).all()) else None


def _moved(module: str, rows: Mapping[str, Tensor]) -> bool:
    prefix, name = ".".join(module.split(".")[:3]) + ".", ".".join(module.split(".")[3:])
    makers = [norm for site, norm in NORMS.items() if name in PACKED[site]] + [maker for linear, maker in ROWS.items() if linear == name]
    return any(prefix + maker in rows for maker in makers)
