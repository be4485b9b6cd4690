"""The audit of an enterprise TensorRT plan, from what TensorRT says of it: its interface is held to what was asked, its kernels are shown.

The limits on kernels (``layer_checks``) were measured on TensorRT-RTX alone. Until a plan of this compiler has been measured they are no verdict on
it: every number is there, none is gated. What holds for any compiler is. Where the inspector's account is not whole, nothing failed and nothing was
proven: the audit is no verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.io_spec import cache_names
from engines.checks import Check, all_passed, check, first
from engines.graph_weights import find_weights, weights_bytes
from engines.inspected_plan import read_layers
from engines.layer_checks import LIMITS, STATIC_LIMITS, attention_check, layer_checks
from engines.one_position import is_static
from engines.plan_kinds import GEMM, PRODUCT
from engines.plan_layers import Launch, PlanReader, describe
from engines.profiles import Profile
from engines.static_checks import IN_PLACE

UNREAD = "of unknown type"
"""In the place of a weight's type, where the inspector does not say which constant a kernel reads."""
SHOWN = "shown, not asked for: its limit was measured on TensorRT-RTX"


def audit_inspected(plan: Path, graph_file: Path, facts: Mapping[str, Any], *, profiles: Sequence[Profile], config: LlamaConfig) -> dict[str, Any]:
    """Audit a plan by what its runtime says.

    Args:
        plan: the file; only its size is looked at.
        graph_file: what it was built from.
        facts: of ``backends.engine_facts.read_engine``.
        profiles: as asked, in the plan's order.
        config: of the model.

    Returns:
        As ``audit.audit_plan``; ``bytes_per_weight`` is None: the inspector does not say which weights are stored; ``passed`` is None where a
        profile's layers were not all read.
    """
    graph = ir.load(graph_file).graph
    reader, static = PlanReader(graph, config), is_static(graph)
    programs = read_layers(facts["layers"], len(profiles))
    linears = {label for weight in find_weights(graph) for label in weight.linears}
    launches = {}
    for profile, program in zip(profiles, programs, strict=True):
        launches[profile.name] = [_as_gemm(one, linears) for one in reader.launches(program)]
    checks = [*_interface(facts, profiles, graph), _plan_bytes(plan, graph)]
    checks += [_in_place(facts, config, graph)] if static else []
    limits = STATIC_LIMITS if static else LIMITS
    read = [_layers_read(name, found, linears) for name, found in launches.items()]
    for name, found in launches.items():
        shown = [attention_check(found, name, reader.layers, gated=False), *layer_checks(found, name, gated=False, limits=limits)]
        checks += [line | {"reason": f"{line['reason']}; {SHOWN}"} for line in shown]
    held = all(line["passed"] is not False for line in checks)
    return {
        "kernels": dict(Counter(launch.kernel.name for found in launches.values() for launch in found).most_common()),
        "kernels_by_profile": {name: dict(Counter(launch.kernel.name for launch in found).most_common()) for name, found in launches.items()},
        "kernels_by_layer": {name: describe(found) for name, found in launches.items()},
        "bytes_per_weight": None,
        "audit": {"passed": all_passed([held, *(line["passed"] for line in read)]), "checks": [*read, *checks]},
    }


def _layers_read(profile: str, launches: Sequence[Launch], linears: Set[str]) -> Check:
    """Whether the account names every linear of the graph; None where it does not: what it leaves out may be as asked."""
    unseen = sorted(linears - {label for launch in launches for label in launch.kernel.layers})
    line = check(f"layers_read_{profile}", len(linears) - len(unseen), len(linears), "==", "linears that the inspector names", where=first(unseen))
    if line["passed"] and launches:
        return line
    return line | {"passed": None, "reason": f"{line['reason']}: its account is not whole, so this audit is no verdict"}


def _as_gemm(launch: Launch, linears: Set[str]) -> Launch:
    """A product that computes a linear multiplies by a stored weight, whether or not the inspector names it."""
    return replace(launch, kind=GEMM, weight=UNREAD) if launch.kind == PRODUCT and not linears.isdisjoint(launch.kernel.layers) else launch


def _interface(facts: Mapping[str, Any], profiles: Sequence[Profile], graph: ir.Graph) -> list[Check]:
    """As many profiles as asked, of the shapes asked, and every output of the graph."""
    found = facts["profiles"]
    lines = [check("profiles", len(found), len(profiles), "==", "a profile for prefill and one for decode")]
    for asked, given in zip(profiles, found, strict=False):
        other = [name for name, shapes in asked.shapes.items() if [list(shape) for shape in shapes] != given.get(name)]
        reason = "each input's smallest, optimum and largest shape as asked"
        lines.append(check(f"shapes_{asked.name}", len(other), 0, "==", reason, where=first(other)))
    missing = sorted({str(value.name) for value in graph.outputs} - set(facts["outputs"]))
    lines.append(check("outputs_missing", len(missing), 0, "==", "logits, and each layer's keys and values", where=first(missing)))
    return lines


def _in_place(facts: Mapping[str, Any], config: LlamaConfig, graph: ir.Graph) -> Check:
    """Caches that the runtime itself says share their buffer with the input."""
    outputs = {value.name for value in graph.outputs}
    names = [(past, present) for past, present in cache_names(config) if present in outputs]
    apart = [present for past, present in names if facts["aliases"].get(present) != past]
    return check("caches_in_place", len(names) - len(apart), len(names), "==", IN_PLACE, where=first(apart))


def _plan_bytes(plan: Path, graph: ir.Graph) -> Check:
    ratio = round(plan.stat().st_size / weights_bytes(graph), 4)
    return check("plan_bytes_per_weight_byte", ratio, None, "<=", f"the file ÷ the graph's constants; {SHOWN}")
