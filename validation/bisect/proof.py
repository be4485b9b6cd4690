"""The trusted layer beside PyTorch's own, so that the trace that everything is held against is not taken on trust.

Row by row, without padding, from the row's own keys and values: whatever mask, positions and cache form the trace has, its result must be this.
Letters: S new tokens of a call, n of one row, P past, E hidden, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.io_spec import Dtype
from artifact.layout import layer_prefix
from exporter.model import DecoderLayer, attention_allowed
from exporter.rope import rotary_tables
from exporter.trace import TORCH_DTYPES
from validation.bisect.landmarks import position_error
from validation.bisect.probes import Probe
from validation.calls import FORMS
from validation.oracle import Oracle

Array = NDArray[Any]
CHEAP = 1 << 17
"""New tokens × all tokens, of all rows: attention that is computed twice; the edges of a long prefill are more."""


def is_cheap(probe: Probe) -> bool:
    """Whether a call is small enough to be run in PyTorch too."""
    return sum(len(new) * (len(new) + past) for new, past in zip(probe.turn.new, probe.turn.past, strict=True)) <= CHEAP


def proof_error(oracle: Oracle, layer: int, weights: Mapping[str, Array], probe: Probe, caches: Mapping[str, Array], output: Array) -> float:
    """Error of what leaves the trusted layer [B, S, E] in a call behind its caches, its worst row's: relative, as landmarks' are."""
    wanted = _rows(oracle, layer, weights, probe, caches)
    return max((position_error(output[row][_real(oracle, len(exact), probe.turn.width)], exact) for row, exact in wanted), default=0.0)


def _rows(oracle: Oracle, layer: int, weights: Mapping[str, Array], probe: Probe, caches: Mapping[str, Array]) -> Iterator[tuple[int, Array]]:
    """Rows that have new tokens, and PyTorch's result [n, E]."""
    states = probe.entering(oracle, layer)
    for row, (new, past) in enumerate(zip(probe.turn.new, probe.turn.past, strict=True)):
        if len(new):
            kept = [caches[io_spec.past_name(layer, kind)][row] for kind in io_spec.CACHE_KINDS]  # [K, W, D]
            before = [array[:, _real(oracle, past, array.shape[1])] for array in kept]
            state = states[row][_real(oracle, len(new), probe.turn.width)]
            yield row, torch_layer(oracle.config, layer, weights, state, before, oracle.dtype)


def _real(oracle: Oracle, count: int, width: int) -> slice:
    """Where the real ones of a padded row are."""
    return slice(width - count, width) if FORMS[oracle.kv_cache].padding == "left" else slice(count)


@torch.inference_mode()
def torch_layer(config: LlamaConfig, index: int, weights: Mapping[str, Array], state: Array, past: list[Array], dtype: Dtype) -> Array:
    """A layer in PyTorch on some weights: hidden states [n, E] behind keys and values [K, P, D] → [n, E], float32."""
    with torch.device("meta"):
        layer = DecoderLayer(config)
    named = {name: torch.from_numpy(np.require(weights[f"{layer_prefix(index)}.{name}"], requirements="W")) for name in layer.state_dict()}
    layer.load_state_dict(named, assign=True)
    before, total = past[0].shape[1], past[0].shape[1] + len(state)
    cos, sin = (table[None, None, before:total].float() for table in rotary_tables(config, TORCH_DTYPES[dtype]))
    mask = attention_allowed(torch.ones(1, total, dtype=torch.int64), len(state))
    keys, values = (torch.from_numpy(np.ascontiguousarray(array))[None] for array in past)
    output, _ = layer.eval()(torch.from_numpy(np.ascontiguousarray(state))[None], cos, sin, mask, (keys, values))
    result: Array = output[0].numpy()
    return result
