"""What a graph can't be asked for: the scenarios that are cut short or left out, each with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from graphs.foreign.ports import Ports
from graphs.fusions._contrib import BIAS, GROUPED
from graphs.partition import upstream
from validation.lone.graph import LoneGraph
from validation.scenarios import Scenario


@dataclass(frozen=True)
class Plan:
    """Scenarios that are run, and ``not_run``: what is not, with the reason."""

    scenarios: tuple[Scenario, ...]
    not_run: tuple[tuple[str, str], ...]


def plan_scenarios(graph: LoneGraph, scenarios: tuple[Scenario, ...]) -> Plan:
    """The scenarios, cut to what the graph takes: without a cache no calls after the first, without padding no padded batch.

    Where a call gives one position, those that would judge one to three positions alone are left out.
    """
    unpadded, uncached = _no_padding(graph), _no_cache(graph.ports)
    run, left_out = [], []
    for scenario in scenarios:
        padded, cached = len(scenario.rows) > 1, len(scenario.chunks) > 1
        if padded and unpadded:
            left_out.append((scenario.name, unpadded))
        elif cached and uncached and not padded:
            left_out.append((scenario.name, uncached))
        elif graph.one_position and 1 not in scenario.chunks:
            left_out.append((scenario.name, f"a call gives one position, {len(scenario.chunks)} in all; decode and padded judge such calls"))
        elif cached and uncached:
            run.append(replace(scenario, chunks=(scenario.width,)))
            left_out.append((f"{scenario.name}, steps", uncached))
        else:
            run.append(scenario)
    return Plan(tuple(run), tuple(left_out))


def _no_cache(ports: Ports) -> str | None:
    """Why there is no call after the first; None where there is."""
    return None if ports.past else "it takes no past keys and values"


def _no_padding(graph: LoneGraph) -> str | None:
    """Why rows of unequal lengths, padded on the left, can't be run; None where they can."""
    ports = graph.ports
    if ports.input_ids.shape[0] == 1:
        return "its batch is fixed to 1"
    if ports.attention_mask is None:
        return "it has no mask input"
    if ports.position_ids is not None and len(ports.position_ids.shape) == 1:
        return f"its input {ports.position_ids} gives all rows the same positions"
    if any(node.op_type == GROUPED and not _takes_columns(node, str(ports.attention_mask.name)) for node in graph.model.graph):
        return f"{GROUPED} takes the length of each row from the mask, not its columns: padding on the left is not masked"
    return None


def _takes_columns(node: ir.Node, mask: str) -> bool:
    """Whether a GroupQueryAttention is given a bias made of the mask, and does not rotate by columns itself."""
    bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    return bias is not None and node.attributes.get_int("do_rotary", 0) == 0 and any(value.name == mask for value in upstream([bias]))
