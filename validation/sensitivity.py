"""What each linear costs alone when it is quantised: KL from the float32 reference, with everything else left as it is.

Layer by layer: at a layer its linears are rounded one at a time, each giving a state of its own, and all states go on through the layers behind it.
So weights are read once a pass, and every state is a model with one linear quantised. States of as many layers as fit into ``STATE_BYTES`` make a
pass; the next one starts where they end. Only the second half of each sequence is compared, as in perplexity's windows: it has tokens before it.
Letters: S sequences of L tokens each, E hidden, V vocab, N layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.layout import layer_of, linear_shapes
from artifact.progress import Progress, silent
from exporter.rope import rotary_tables
from validation.bootstrap import Resampling
from validation.fake_quant import Form, quantised
from validation.reference import Reference

Ids = NDArray[np.int64]
Forms = Mapping[str, Form]
"""Module path of a linear of the graph → how it is rounded."""
STATE_BYTES = 1 << 30
BLOCK = 128
"""Positions whose logits are held at a time."""
FLOAT_BYTES = 4
LARGEST_EXPONENT = 80.0
"""e⁸⁰ is a float32; what diverges so far is no model anyway."""


@dataclass(frozen=True)
class Score:
    """What one linear costs.

    Attributes:
        kl: mean divergence of a position, nats.
        kl_se: its standard error, of blocks of neighbours drawn again (bootstrap.py).
        weight_error: relative root mean square error of its weight.
    """

    kl: float
    kl_se: float
    weight_error: float


@dataclass(frozen=True)
class Cost:
    """What a measurement takes, known before it starts.

    Attributes:
        layer_runs: how often all tokens go through a layer.
        passes: how often weights are read, the later ones from further behind.
        teraflops: products of the layers and of the output layer.
    """

    layer_runs: int
    passes: int
    teraflops: float

    @property
    def words(self) -> str:
        """For a person who waits."""
        return f"{self.layer_runs:,} runs of a layer, {self.teraflops:,.1f} TFLOP"


def cost_of(config: LlamaConfig, names: Iterator[str] | list[str] | tuple[str, ...], tokens: int) -> Cost:
    """What scoring these linears on so many tokens takes."""
    layers = [layer_of(name) or 0 for name in names]
    depth = config.num_hidden_layers
    passes = list(_passes(layers, depth, tokens * config.hidden_size * FLOAT_BYTES))
    runs = sum(depth - layer for layer in layers) + sum(depth - first for first, _ in passes)
    per_layer = sum(rows * columns for rows, columns in linear_shapes(config).values())
    products = runs * per_layer + (len(layers) + 1) * config.vocab_size * config.hidden_size / 2
    return Cost(runs, len(passes), 2 * tokens * products / 1e12)


@torch.inference_mode()
def score_linears(reference: Reference, ids: Ids, forms: Forms, progress: Progress = silent) -> dict[str, Score]:
    """Score every linear that has a form.

    Args:
        reference: the model, streamed.
        ids: [S, L] token ids, each sequence from position 0.
        forms: how each linear is rounded.
        progress: told how many runs of a layer are done.
    """
    config, found = reference.config, _Found({}, {})
    state, tables = torch.cat(reference.embed(list(ids))), rotary_tables(config, torch.float32)
    cost = cost_of(config, list(forms), ids.size)
    runs = 0
    for first, last in _passes([layer_of(name) or 0 for name in forms], config.num_hidden_layers, state.nbytes):
        states: dict[str, Tensor] = {}
        exact = state
        for number in range(first, config.num_hidden_layers):
            progress(f"sensitivity: {cost.words}", runs, cost.layer_runs)
            layer = reference.decoder_layer(number)
            for name, varied in states.items():
                states[name], _ = reference.advance(layer, varied, tables)
            for name in (name for name in forms if layer_of(name) == number and number < last):
                with quantised(layer, {name: forms[name]}) as errors:
                    states[name], _ = reference.advance(layer, exact, tables)
                found.errors |= errors
            exact, _ = reference.advance(layer, exact, tables)
            runs += len(states) + 1
            state = exact if number == last - 1 else state
            del layer  # before the next one is read
        behind = {name: scored(each) for name, each in states.items()}
        found.divergences |= divergences(reference, scored(exact), behind, progress)
    resampling = Resampling([scored(state).shape[0] * scored(state).shape[1]])
    return {name: _score(found.divergences[name], found.errors[name], resampling) for name in forms}


def scored(state: Tensor) -> Tensor:
    """What is compared of [S, L, …]: [S, L − ⌊L/2⌋, …]."""
    return state[:, state.shape[1] // 2 :]


@torch.inference_mode()
def divergences(reference: Reference, exact: Tensor, states: Mapping[str, Tensor], progress: Progress = silent) -> dict[str, Tensor]:
    """KL(exact ‖ state) of every position, nats [S·L]: what left the last layer [S, L, E] → of each state."""
    norm, head = reference.final_norm(), reference.lm_head
    found: dict[str, list[Tensor]] = {name: [] for name in states}
    positions = exact.shape[0] * exact.shape[1]
    for start in range(0, positions, BLOCK):
        progress(f"comparing {len(states)} models with one linear quantised", start, positions)
        rows = slice(start, start + BLOCK)
        logits = F.linear(norm(exact.flatten(0, 1)[rows]), head)
        p = torch.softmax(logits, dim=-1)
        for name, state in states.items():
            found[name].append(divergence(p, logits, F.linear(norm(state.flatten(0, 1)[rows]), head)))
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def divergence(p: Tensor, exact: Tensor, varied: Tensor) -> Tensor:
    """KL(p ‖ q) of every row [n, V] → [n], nats.

    With d = varied − exact and its mean under p taken off, it is ln(1 + Σ p·(eᵈ − 1 − d)): no term is below 0, so that small ones do not drown in
    rounding, and only one exponential is taken.

    Args:
        p: probabilities of the exact model.
        exact, varied: logits of both, or their logarithms of probabilities.
    """
    d = varied - exact
    d -= (p * d).sum(dim=-1, keepdim=True)
    d.clamp_(max=LARGEST_EXPONENT)
    return (p * (torch.expm1(d) - d)).sum(dim=-1).log1p()


@dataclass
class _Found:
    divergences: dict[str, Tensor]
    errors: dict[str, float]


def _score(kl: Tensor, weight_error: float, resampling: Resampling) -> Score:
    return Score(float(kl.mean()), float(resampling.means(kl.numpy()).std(ddof=1)), weight_error)


def _passes(layers: list[int], depth: int, state_bytes: int) -> Iterator[tuple[int, int]]:
    """[first, last) layers whose linears' states are held together; at least one layer's."""
    first = held = 0
    for layer in range(depth):
        more = layers.count(layer) * state_bytes
        if layer > first and held + more > STATE_BYTES:
            yield first, layer
            first, held = layer, 0
        held += more
    yield first, depth
