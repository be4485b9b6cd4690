"""Which operators a graph computes each decoder layer with, and what lies outside the layers; layers that are alike are counted together.

Where nodes name their module, that says the layer. Foreign graphs have no such names: there a layer reaches from the input of one attention's norm to
that of the next, which is known where every norm is one node, be it one with the sum that it reads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from artifact.layout import MODULE_KEY, layer_of

UNKNOWN = "not known where a layer begins: no node names its module, and the norms are not one node each"
SIZES = ("Shape", "Size")
NORMS, SUMMED = ("RMSNormalization", "SkipSimplifiedLayerNormalization"), 3
"""Norms, and the output of the second that is the sum it reads."""
ATTENTIONS = ("Attention", "GroupQueryAttention")
Operators = dict[str, int]


@dataclass(frozen=True)
class LayerOperators:
    """Operators by layer, in the order in which a graph computes them.

    Attributes:
        groups: (layers, their operators), layers that are alike together, in order of their first.
        outside: operators of no layer.
        known_by: `module names` or `norms`; None where layers are not known, and ``outside`` is everything.
    """

    groups: tuple[tuple[tuple[int, ...], Operators], ...]
    outside: Operators
    known_by: str | None

    def as_json(self) -> dict[str, Any]:
        """For reports: the same, and each line in words."""
        groups = [{"layers": list(layers), "operators": operators} for layers, operators in self.groups]
        return {"known_by": self.known_by, "groups": groups, "outside": self.outside, "lines": self.lines()}

    def lines(self) -> list[str]:
        """``layers 0–29 (30 alike): RMSNormalization 2, MatMul 4 …``, and what is outside."""
        if self.known_by is None:
            return [f"layers: {UNKNOWN}", f"whole graph: {_listed(self.outside)}"]
        return [*(f"{_named(layers)}: {_listed(operators)}" for layers, operators in self.groups), f"outside layers: {_listed(self.outside)}"]


def layer_operators(model: ir.Model) -> LayerOperators:
    """Count a graph's operators by layer."""
    layers, known_by = _layers_of(model)
    counts: dict[int | None, Counter[str]] = {}
    for node in model.graph:
        counts.setdefault(layers.get(node), Counter())[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
    groups: dict[tuple[tuple[str, int], ...], tuple[list[int], Operators]] = {}
    for layer in sorted(layer for layer in counts if layer is not None):
        operators = dict(counts[layer])
        groups.setdefault(tuple(sorted(operators.items())), ([], operators))[0].append(layer)
    return LayerOperators(tuple((tuple(alike), operators) for alike, operators in groups.values()), dict(counts.get(None, {})), known_by)


def _layers_of(model: ir.Model) -> tuple[dict[ir.Node, int], str | None]:
    named = {node: layer for node in model.graph if (layer := layer_of(node.metadata_props.get(MODULE_KEY))) is not None}
    if named:
        return named, "module names"
    ends = _layer_ends(model)
    return (_between(model, ends), "norms") if ends else ({}, None)


def _layer_ends(model: ir.Model) -> list[tuple[ir.Value, ...]]:
    """What lies between layers: what every second norm reads, or makes with it; none where norms are not two a layer and one at the end."""
    norms = [node for node in model.graph if node.op_type in NORMS]
    n_layers = sum(node.op_type in ATTENTIONS for node in model.graph)
    hidden = [_between_layers(norm) for norm in norms[::2]]
    return hidden if n_layers and len(norms) == 2 * n_layers + 1 and all(hidden) else []


def _between_layers(norm: ir.Node) -> tuple[ir.Value, ...]:
    """The hidden state that a norm reads; where one node computes both, that and what is normed."""
    values = norm.inputs[:1] if len(norm.outputs) == 1 else (norm.outputs[0], norm.outputs[SUMMED])
    return tuple(value for value in values if value is not None)


def _between(model: ir.Model, ends: list[tuple[ir.Value, ...]]) -> dict[ir.Node, int]:
    """Nodes by the last of the hidden states that they depend on; what depends on none, on sizes alone, or on the last of all, is outside."""
    level = {value: layer for layer, values in enumerate(ends) for value in values}
    layers: dict[ir.Node, int] = {}
    for node in model.graph:
        found = max((level[value] for value in node.inputs if value is not None and value in level), default=None)
        if found is None or node.op_type in SIZES:
            continue
        for value in node.outputs:
            level.setdefault(value, found)
        if found < len(ends) - 1:
            layers[node] = found
    return layers


def _named(layers: tuple[int, ...]) -> str:
    """``layers 0–13, 15–29 (29 alike)``."""
    breaks = [index for index, (first, second) in enumerate(pairwise(layers), start=1) if second != first + 1]
    runs = [layers[start:end] for start, end in pairwise([0, *breaks, len(layers)])]
    spans = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"layer {spans}" if len(layers) == 1 else f"layers {spans} ({len(layers)} alike)"


def _listed(operators: Operators) -> str:
    return ", ".join(f"{operator} {count}" for operator, count in operators.items()) or "nothing"
