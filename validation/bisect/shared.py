"""What all layers share: embedded tokens, mask, rotary values and positions, beside the trusted trace's; and the tables that they are read from.

Letters: B batch, S new tokens, T columns or slots, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact import io_spec
from artifact.layout import EMBEDDING
from exporter.rope import rotary_tables
from exporter.trace import TORCH_DTYPES
from exporter.weights import ROTARY_COS, ROTARY_SIN
from graphs.partition import upstream
from validation.bisect.finding import Finding, Looked
from validation.bisect.landmarks import position_error
from validation.bisect.probes import Probe
from validation.bisect.region import departures, region
from validation.bisect.weight_faults import compare_weight
from validation.bisect.weights import Weight, stored_as
from validation.node_runner import run_nodes
from validation.oracle import Oracle

Array = NDArray[Any]
MASK, POSITIONS, SIZE = "mask", "positions", "size"
ALLOWED = 2.0**-12
"""Half of float16's last place: a difference below it is lost when the value is rounded."""


def run_shared(cut: ir.Model, probe: Probe, oracle: Oracle) -> dict[str, Array]:
    """Every value that a shared cut in float32 computes, and the inputs of the call, by name."""
    config = oracle.config
    width = probe.slots or probe.call.in_use - probe.turn.width
    empty = np.zeros((len(probe.sequences), config.num_key_value_heads, width, config.head_dim), np.float32)
    feeds: dict[str, Array] = {**probe.call.inputs(), **{past: empty for past, _ in io_spec.cache_names(config)}}
    computed: dict[str, Array] = dict(probe.call.inputs())

    def observe(node: ir.Node, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        computed[str(value.name)] = array

    run_nodes(cut, feeds, observe=observe)
    return computed


def exact_tables(oracle: Oracle) -> dict[str, Array]:
    """The config's rotary tables, rounded to the artifact's dtype, float32."""
    cos, sin = rotary_tables(oracle.config, TORCH_DTYPES[oracle.dtype])
    return {ROTARY_COS: cos.float().numpy(), ROTARY_SIN: sin.float().numpy()}


def table_faults(model: ir.Model, oracle: Oracle, looked: Looked) -> Iterator[Finding]:
    """Rotary tables and the rows of the embedding that the scenarios read, which are not the config's and the checkpoint's."""
    dtype = io_spec.NUMPY_DTYPES[oracle.dtype]
    ids = np.unique(np.concatenate([row for scenario in oracle.scenarios for row in scenario.rows]))
    exact = exact_tables(oracle)
    for name, weight in stored_as(model, (EMBEDDING, ROTARY_COS, ROTARY_SIN)):
        if name == EMBEDDING:
            ours, theirs = weight.array[ids], oracle.reference.read(name)[ids].float().numpy()
        else:
            ours, theirs = weight.array, exact[name]
        fault = compare_weight(name, Weight(ours.astype(np.float32), name, weight.node), theirs.astype(dtype).astype(np.float32))
        looked.weights += 1
        looked.see(f"{name}", fault.share, fault.error, fault.allowed)
        if fault.share > 1:
            yield Finding("weight", None, None, weight.node, name, fault.error, fault.allowed, fault.words)


def shared_fault(
    cuts: tuple[ir.Model, ir.Model], computed: Mapping[str, Array], trusted: Mapping[str, Array], probe: Probe, looked: Looked
) -> Finding | None:
    """The first value that layers read and that is not the one which the trusted trace's layers read in its place."""
    cut, counterpart = cuts
    roles = {str(value.name): _role(value, counterpart, trusted) for value in counterpart.graph.outputs} | {io_spec.POSITION_IDS: POSITIONS}
    for value in cut.graph.outputs:
        ours, role = computed[str(value.name)], _role(value, cut, computed)
        named = [str(value.name)] if value.name in roles and role not in (POSITIONS, SIZE) else []
        names = named or [name for name, theirs in roles.items() if theirs == role is not None]
        expected = [trusted[name] for name in names if trusted[name].size == ours.size and role != SIZE]
        if not expected and role != SIZE:
            looked.note(f"{value.name}, which the layers read, has no counterpart in the trace: what they make of it was compared, and not itself")
        if not expected:
            continue
        error = min(position_error(ours, other.reshape(ours.shape)) for other in expected)
        looked.tensors += 1
        looked.see(f"{value.name} in {probe.name}", error / ALLOWED, error, ALLOWED)
        if error > ALLOWED:
            nodes = region(value, set(cut.graph.inputs))
            node = departures(nodes, computed, [*trusted.values(), *probe.call.inputs().values()])[0]
            words = f"{value.name}, which the layers read, is not what the model's own trace computes"
            return Finding("arithmetic", None, probe.label, node, str(value.name), error, ALLOWED, words, nodes)
    return None


def _role(value: ir.Value, cut: ir.Model, computed: Mapping[str, Array]) -> str | None:
    """What a shared value is to the layers, by what it is made of; None for what the trace may have otherwise. Its name goes before that."""
    array = computed[str(value.name)]
    if value is cut.graph.outputs[0]:
        return EMBEDDING
    if array.dtype == np.bool_:
        return MASK
    if array.dtype.kind == "i":
        return POSITIONS if array.size == computed[io_spec.POSITION_IDS].size and _reads(value, io_spec.POSITION_IDS) else SIZE
    return next((table for table in (ROTARY_COS, ROTARY_SIN) if _reads(value, table)), None)


def _reads(value: ir.Value, name: str) -> bool:
    return any(one.name == name for one in upstream([value]))
