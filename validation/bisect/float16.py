"""What float16 takes from a layer: the graph's own operations rounded, beside the same operations in float32 on the same float16 inputs.

Integer products are those of an engine on both sides, so that what int8 takes from an activation is no loss of float16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from graphs.partition import cut_layer
from validation.bisect.finding import Finding
from validation.bisect.landmarks import position_error
from validation.bisect.layer import EIGHT_BITS, Pair, caches_of, feeds_of, rounds_inputs
from validation.bisect.probes import Probe
from validation.bisect.promoted import in_float32
from validation.bisect.region import region
from validation.bisect.subject import Subject
from validation.bisect.walk import run_trusted, walk
from validation.integer_products import with_integer_products

Array = NDArray[Any]
NO_LIMIT = float("inf")


def rounding_fault(subject: Subject, pair: Pair, probe: Probe) -> Finding | None:
    """The first node of a layer whose output float16 can't hold: beyond four times what the trace loses there, every operation rounded."""
    oracle, looked, (ours, theirs) = subject.oracle, subject.looked, subject.shared[probe.name]
    assert pair.layer is not None
    caches = caches_of(pair, probe, oracle)
    roles, _ = run_trusted(pair.trusted, pair.layer, feeds_of(pair, probe, theirs, oracle, pair.trusted, caches))
    allowed = _lost_by_the_trace(subject, pair, probe, caches, roles)
    cut = cut_layer(with_integer_products(subject.model), pair.layer)
    plain = in_float32(cut)
    halved, feeds = _rounded(roles), _rounded(feeds_of(pair, probe, ours, oracle, cut, caches))
    del caches
    _, exact = walk(plain, pair.layer, _as_float32(feeds), _as_float32(halved), NO_LIMIT)
    tensors, _ = walk(cut, pair.layer, feeds, halved, allowed, beside=exact)
    for tensor in tensors:
        looked.tensors += 1
        looked.see(f"{tensor.value.name} in float16", tensor.share, tensor.error, tensor.allowed)
    if (free := next((tensor for tensor in tensors if not np.isfinite(tensor.allowed)), None)) is not None:
        looked.note(f"{pair.name}: from {free.role} on nothing has a limit in {probe.name}: the model's own trace overflows float16 there")
    bad = next((tensor for tensor in tensors if tensor.share > 1), None)
    if bad is None:
        return None
    nodes = region(bad.value, {*cut.graph.inputs, *(tensor.value for tensor in tensors)} - {bad.value})
    names = {str(value.name) for node in nodes for value in node.outputs}
    _, computed = walk(cut, pair.layer, feeds, halved, allowed, beside=exact, keep=_named(cut, names))
    _, exact = walk(plain, pair.layer, _as_float32(feeds), _as_float32(halved), NO_LIMIT, keep=_named(plain, names))
    lost = [(node, str(node.outputs[0].name)) for node in nodes]
    least = bad.allowed if np.isfinite(bad.allowed) else 1.0
    node = next((node for node, name in lost if name in exact and position_error(computed[name], exact[name]) > least), nodes[-1])
    words = f"{bad.role} loses it in float16: the same operations in float32 are right"
    return Finding("rounding", pair.layer, probe.label, node, str(bad.value.name), bad.error, bad.allowed, words, nodes)


def _lost_by_the_trace(subject: Subject, pair: Pair, probe: Probe, caches: Mapping[str, Array], roles: Mapping[str, Array]) -> dict[str, float]:
    """Role → the limit of a graph's own loss."""
    assert pair.layer is not None
    cut = subject.trusted.rounded_layer(pair.layer, pair.weights)
    feeds = _rounded(feeds_of(pair, probe, subject.shared[probe.name][1], subject.oracle, cut, caches))
    tensors, _ = walk(cut, pair.layer, feeds, roles, NO_LIMIT)
    least = EIGHT_BITS if rounds_inputs(pair.cut) else 2.0**-10
    return {tensor.role: 4 * tensor.error + least for tensor in tensors}


def _named(cut: ir.Model, names: Collection[str]) -> set[ir.Value]:
    return {value for node in cut.graph for value in node.outputs if value.name in names}


def _rounded(arrays: Mapping[str, Array]) -> dict[str, Array]:
    with np.errstate(over="ignore"):
        return {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in arrays.items()}


def _as_float32(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array.astype(np.float32) if array.dtype == np.float16 else array for name, array in arrays.items()}
