"""One layer, or what follows the last, beside its trusted counterpart: first its weights, then every landmark of every call, then its roundings.

Letters: B batch, S new tokens, E hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.layout import EMBEDDING, LM_HEAD, PACKED, layer_prefix, layer_shapes, shared_shapes
from graphs.partition import cut_layer, cut_tail
from validation.bisect.finding import Finding
from validation.bisect.landmarks import OUTPUT, expected_at
from validation.bisect.probes import Probe
from validation.bisect.promoted import Kept, in_float32
from validation.bisect.proof import is_cheap, proof_error
from validation.bisect.region import departures, region, unlike_others
from validation.bisect.shared import ALLOWED
from validation.bisect.smoothed import Factors, factors_of
from validation.bisect.subject import Subject
from validation.bisect.walk import Tensor, run_trusted, walk
from validation.bisect.weight_faults import compare_weight
from validation.bisect.weights import Weight, weights_of
from validation.oracle import Oracle

Array = NDArray[Any]
EIGHT_BITS = 0.05
"""Where a kernel rounds its inputs to eight bits (MatMulNBits on a CPU)."""
PROOF = 2.0**-7
"""Between the trusted layer and PyTorch's own, whose head scale is not rounded to the artifact's dtype."""
LAST = 8
"""Positions of a call of which logits are computed."""


@dataclass(frozen=True)
class Pair:
    """A cut of the graph in float32 and the trusted one with the same weights; ``layer`` is None for what follows the last.

    Attributes:
        weights: what both compute with, by the checkpoint's names, and the tables.
        found: those that were read of the graph.
        kept: the graph's constants in float32.
    """

    layer: int | None
    cut: ir.Model
    trusted: ir.Model
    weights: dict[str, Array]
    found: dict[str, Weight]
    kept: Kept

    @property
    def name(self) -> str:
        """``layer 3``."""
        return "what follows the layers" if self.layer is None else f"layer {self.layer}"

    def close(self) -> None:
        """Let go of its weights, whatever still refers to its graphs."""
        for weights in (self.weights, self.found, self.kept):
            weights.clear()


def make_pair(subject: Subject, layer: int | None) -> Pair:
    """Cut both, and give the trusted cut the weights that the graph computes with; what can't be read of it is the checkpoint's, and is said."""
    oracle, config = subject.oracle, subject.oracle.config
    kept: Kept = {}
    cut = in_float32(cut_tail(subject.model) if layer is None else cut_layer(subject.model, layer), kept)
    shapes = {**shared_shapes(config), LM_HEAD: (config.vocab_size, config.hidden_size)} if layer is None else layer_shapes(config, layer)
    found = weights_of(cut, shapes)
    weights = {name: found[name].array if name in found else exact_weight(oracle, name) for name in shapes if name != EMBEDDING}
    subject.looked.missed([name for name in weights if name not in found])
    if layer is None and config.tie_word_embeddings:
        weights[EMBEDDING] = weights[LM_HEAD]
    weights |= subject.tables
    counterpart = subject.trusted.tail(weights) if layer is None else subject.trusted.layer(layer, weights)
    return Pair(layer, cut, counterpart, weights, found, kept)


def exact_weight(oracle: Oracle, name: str) -> Array:
    """The checkpoint's, float32."""
    stored = EMBEDDING if name == LM_HEAD and oracle.config.tie_word_embeddings else name
    exact: Array = oracle.reference.read(stored).float().numpy()
    return exact


def stored_weight(oracle: Oracle, name: str) -> Array:
    """The checkpoint's as the artifact's dtype holds it, float32."""
    stored: Array = exact_weight(oracle, name).astype(io_spec.NUMPY_DTYPES[oracle.dtype]).astype(np.float32)
    return stored


def weight_fault(subject: Subject, pair: Pair) -> Finding | None:
    """The first node that reads a weight which is not the checkpoint's."""
    oracle, looked = subject.oracle, subject.looked
    factors, unknown = _factors(subject, pair)
    looked.missed(unknown, "what smoothing moved into it can't be read of the graph")
    faults = []
    for name, weight in pair.found.items():
        if name in unknown:
            continue
        fault = compare_weight(name, weight, stored_weight(oracle, name), factors.get(name))
        looked.weights += 1
        looked.see(name, fault.share, fault.error, fault.allowed)
        faults += [fault] if fault.share > 1 else []
    order = {node: index for index, node in enumerate(pair.cut.graph)}
    for fault in sorted(faults, key=lambda fault: order[fault.weight.node]):
        words = f"{fault.words}; its own arithmetic is not at fault, it reads {fault.weight.initializer}"
        return Finding("weight", pair.layer, None, fault.weight.node, fault.name, fault.error, fault.allowed, words)
    return None


def _factors(subject: Subject, pair: Pair) -> tuple[dict[str, Factors], list[str]]:
    """What smoothing moved into the weights of a layer."""
    if not subject.smoothed or pair.layer is None:
        return {}, []
    return factors_of(subject.oracle.config, pair.layer, pair.found, partial(stored_weight, subject.oracle))


def caches_of(pair: Pair, probe: Probe, oracle: Oracle) -> dict[str, Array]:
    """Keys and values that a pair's layer finds: the same for both sides; none outside the layers."""
    return {} if pair.layer is None else probe.caches(oracle, pair.layer)


def feeds_of(pair: Pair, probe: Probe, shared: Mapping[str, Array], oracle: Oracle, cut: ir.Model, caches: Mapping[str, Array]) -> dict[str, Array]:
    """All that a cut reads in a call, by the names it has in it."""
    layer = oracle.config.num_hidden_layers if pair.layer is None else pair.layer
    state = probe.entering(oracle, layer)
    state = state[:, -LAST:] if pair.layer is None else state
    return {**shared, **probe.call.inputs(), **caches, str(cut.graph.inputs[0].name): state}


def arithmetic_fault(subject: Subject, pair: Pair, probe: Probe) -> Finding | None:
    """The first node of a cut that computes something else than the trusted one."""
    oracle, looked, shared = subject.oracle, subject.looked, subject.shared[probe.name]
    caches = caches_of(pair, probe, oracle)
    theirs = feeds_of(pair, probe, shared[1], oracle, pair.trusted, caches)
    roles, _ = run_trusted(pair.trusted, pair.layer, theirs)
    if pair.layer is not None and is_cheap(probe) and (fault := _prove(subject, pair, probe, caches, roles)) is not None:
        return fault
    allowed = EIGHT_BITS if rounds_inputs(pair.cut) else ALLOWED
    feeds = feeds_of(pair, probe, shared[0], oracle, pair.cut, caches)
    tensors, _ = walk(pair.cut, pair.layer, feeds, roles, allowed)
    for tensor in tensors:
        looked.tensors += 1
        looked.see(f"{tensor.value.name} in {probe.name}", tensor.share, tensor.error, tensor.allowed)
    bad = next((tensor for tensor in tensors if tensor.share > 1), None)
    if bad is None:
        return None
    nodes = region(bad.value, {*pair.cut.graph.inputs, *(tensor.value for tensor in tensors)} - {bad.value})
    _, computed = walk(pair.cut, pair.layer, feeds, roles, allowed, keep={value for node in nodes for value in node.outputs})
    sizes = {array.size for array in computed.values()}
    _, values = run_trusted(pair.trusted, pair.layer, theirs, keep=lambda array: array.size in sizes)
    known = [*values, *feeds.values(), *shared[1].values(), *_packed(roles, oracle.config)]
    node, words = _name(nodes, bad, pair, computed, known, subject.model)
    return Finding("arithmetic", pair.layer, probe.label, node, str(bad.value.name), bad.error, bad.allowed, words, nodes)


def _packed(roles: Mapping[str, Array], config: LlamaConfig) -> list[Array]:
    """What packed projections hold between their product and their split: heads of several members side by side."""
    projections = [roles[f"self_attn.{name}_proj"] for name in "qkv" if f"self_attn.{name}_proj" in roles]
    joined = [np.concatenate(projections[start:], axis=-1) for start in range(len(projections) - 1)]
    heads = [array.reshape(*array.shape[:2], -1, config.head_dim) for array in joined]  # [B, S, heads, D]
    halves = [expected for packed in PACKED if (expected := expected_at(packed, roles)) is not None]
    return [*heads, *(half.reshape(*half.shape[:2], 2, -1) for half in halves if half.shape[-1] % 2 == 0)]


def _name(nodes: list[ir.Node], bad: Tensor, pair: Pair, computed: Mapping[str, Array], known: list[Array], model: ir.Model) -> tuple[ir.Node, str]:
    parted = departures(nodes, computed, known)
    if pair.layer is not None:
        for node in parted:
            if words := unlike_others(node, pair.layer, model):
                return node, words
    return parted[0], f"{bad.role} is not what the model's own trace computes from the same inputs and weights"


def _prove(subject: Subject, pair: Pair, probe: Probe, caches: Mapping[str, Array], roles: Mapping[str, Array]) -> Finding | None:
    """The end of the trusted layer, where it is not PyTorch's own."""
    oracle = subject.oracle
    assert pair.layer is not None
    prefix = f"{layer_prefix(pair.layer)}."
    weights = {name: array for name, array in pair.weights.items() if name.startswith(prefix)}
    error = proof_error(oracle, pair.layer, weights, probe, caches, roles[OUTPUT])
    subject.looked.see(f"{pair.name} of the trace beside PyTorch's in {probe.name}", error / PROOF, error, PROOF)
    if error <= PROOF:
        return None
    output = pair.trusted.graph.outputs[0]
    node = output.producer()
    assert node is not None
    words = "the trace that the graph is held against is not PyTorch's own layer: the exporter is at fault"
    return Finding("exporter", pair.layer, probe.label, node, str(output.name), error, PROOF, words)


def rounds_inputs(cut: ir.Model) -> bool:
    """Whether a kernel of it rounds its inputs to eight bits."""
    return any(node.op_type == "MatMulNBits" for node in cut.graph)
