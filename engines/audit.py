"""What is inside a plan, read from its bytes: is each weight there once, in its precision, and is attention fused in every layer?

Letters: L decoder layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from engines.graph_weights import Weight, find_biases, find_weights, layer_by_label, weights_bytes
from engines.kernel_source import read_kernel_sources, source_bytes
from engines.plan_program import Constant, Program, read_programs
from engines.plan_sums import REASON, float16_sums
from engines.weight_search import Copies, count_copies

ATTENTION_KERNELS = {"prefill": "_gemm_mha_v2", "decode": "_gemv_mha_v1"}
"""Profile → the kernel that fused attention must be: tiles over a prompt, one query row a step in decode."""
BYTES_PER_WEIGHT = {"int8": (1.05, "int8 and its scales; 2 would be float16"), "fp16": (2.1, "float16, once; a second layout would show as 4")}
"""Precision → limit over all linears of that precision, and why."""
PLAN_LIMIT = 1.06
PLAN_TEXT, LAYER_TEXT = 3_500_000, 400_000
"""What TensorRT-RTX 1.7.1 adds in text (programs and CUDA source), whatever the width: in any case, and for each layer. SmolLM2: 14.1 MB."""
Check = dict[str, Any]


def audit_plan(plan: Path, graph_file: Path, *, precision: str, profiles: Sequence[str], layers: int) -> dict[str, Any]:
    """Audit a plan against the graph that it was built from.

    Args:
        plan: TensorRT-RTX plan.
        graph_file: ``<stage>-engine.onnx``.
        precision: ``fp16``, ``int8`` or ``fp32``; fp32 comes from the unpacked graph, so of it only the weights' presence is asked.
        profiles: their names, in the plan's order.
        layers: L.

    Returns:
        ``kernels`` {name: launches over all profiles}, ``kernels_by_profile``, ``bytes_per_weight``, ``audit`` {passed, checks}.

    Raises:
        EngineError: the plan can't be read.
    """
    graph = ir.load(graph_file).graph
    programs, weights = read_programs(plan), find_weights(graph)
    copies = count_copies(plan, [*weights, *find_biases(graph)])
    gated = precision != "fp32"
    per_weight, worst = bytes_per_weight(programs, weights, quantized=precision == "int8")
    checks = [_all_found(copies), _once(copies[: len(weights)], gated), *_attention(programs, profiles, layer_by_label(graph), layers, gated)]
    if precision == "int8":
        checks.append(_read_quantized(programs, weights))
    if precision in BYTES_PER_WEIGHT:
        limit, reason = BYTES_PER_WEIGHT[precision]
        checks.append(_check("bytes_per_weight", per_weight, limit, "<=", reason, where=worst))
    half, where = float16_sums(plan, [label for weight in weights for label in weight.linears])
    checks += [
        _check("float16_sums", half, 0 if gated else None, "==", REASON, where=where),
        _constant_bytes(programs, weights_bytes(graph), gated),
        plan_bytes(plan, weights_bytes(graph), layers, gated=precision == "fp16"),
    ]
    return {
        "kernels": dict(Counter(kernel.name for program in programs for kernel in program.kernels).most_common()),
        "kernels_by_profile": {name: _names(programs, index) for index, name in enumerate(profiles)},
        "bytes_per_weight": per_weight,
        "audit": {"passed": all(check["passed"] is not False for check in checks), "checks": checks},
    }


def bytes_per_weight(programs: Sequence[Program], weights: Sequence[Weight], *, quantized: bool) -> tuple[float | None, str | None]:
    """Bytes of the constants that linears' kernels read, over all profiles, for each of their parameters; and the largest linear's name.

    A weight that two profiles keep in different layouts counts twice, as it is stored twice.
    """
    linears = [weight for weight in weights if weight.linears and weight.quantized == quantized]
    stored = {weight.name: _constants(programs, weight.linears) for weight in linears}
    parameters = sum(weight.parameters for weight in linears)
    if not parameters or not all(stored.values()):
        return None, next((name for name, constants in stored.items() if not constants), None)
    sizes = {weight.name: sum(constant.size_bytes for constant in stored[weight.name]) / weight.parameters for weight in linears}
    total = sum(constant.size_bytes for constant in set().union(*stored.values()))
    return round(total / parameters, 4), max(sizes, key=lambda name: sizes[name])


def _constants(programs: Sequence[Program], labels: Sequence[str]) -> set[Constant]:
    kernels = (kernel for program in programs for kernel in program.kernels if not set(labels).isdisjoint(kernel.layers))
    return {constant for kernel in kernels for constant in kernel.constants}


def _all_found(copies: Sequence[Copies]) -> Check:
    missing = [found.name for found in copies if not found.total]
    reason = "a sample of every linear's and the embedding's weight stands in the plan, as stored or transposed, and of every bias"
    return _check("weights_missing", len(missing), 0, "<=", reason, where=_first(missing))


def _once(copies: Sequence[Copies], gated: bool) -> Check:
    twice = [found.name for found in copies if found.total > 1]
    unpacked = "fp32 engines come from the unpacked graph, where each profile may keep its own layout"
    reason = "each profile may ask for its own layout of a weight; packed on a new axis, all agree" if gated else unpacked
    return _check("weights_stored_twice", len(twice), 0 if gated else None, "<=", reason, where=_first(twice))


def _read_quantized(programs: Sequence[Program], weights: Sequence[Weight]) -> Check:
    """How many quantised weights their own GEMM does not read in some profile: another kernel writes them out in float16 for it."""
    written = [
        weight.name
        for weight in weights
        if weight.quantized and any(sum(c.size_bytes for c in _constants([program], weight.linears)) < weight.parameters for program in programs)
    ]
    reason = "a weight that is written out in float16 before it is multiplied costs more memory traffic than a float16 engine"
    return _check("weights_written_out", len(written), 0, "<=", reason, where=_first(written))


def _attention(programs: Sequence[Program], profiles: Sequence[str], layer_of: Mapping[str, int], layers: int, gated: bool) -> list[Check]:
    """One check a profile: in how many layers exactly one kernel computes attention."""
    checks = []
    for index, name in enumerate(profiles):
        wanted = ATTENTION_KERNELS[name]
        found = Counter(
            layer
            for program in programs
            if program.profile == index
            for kernel in program.kernels
            if kernel.name == wanted
            for layer in {layer_of[label] for label in kernel.layers if label in layer_of}
        )
        wrong = [f"layer {layer}: {found[layer]}" for layer in range(layers) if found[layer] != 1]
        reason = f"one {wanted} a layer" if gated else "shown, not asked for: in float32 TensorRT fuses the attention of decode alone"
        checks.append(_check(f"fused_attention_{name}", layers - len(wrong), layers if gated else None, "==", reason, where=_first(wrong)))
    return checks


def _constant_bytes(programs: Sequence[Program], weights: int, gated: bool) -> Check:
    """The constants that the plan's programs name against the graph's."""
    constants = sum(constant.size_bytes for constant in {constant for program in programs for constant in program.constants})
    once = "the plan's constants ÷ the graph's: each weight in one layout for all profiles; plain packing gives 1.5"
    return _check("constant_bytes_per_weight_byte", round(constants / weights, 4), PLAN_LIMIT if gated else None, "<=", once)


def plan_bytes(plan: Path, weights: int, layers: int, *, gated: bool) -> Check:
    """The whole file against the graph's constants; asked for where the text that any such plan holds fits the limit."""
    size, sources = plan.stat().st_size, read_kernel_sources(plan)
    asked = gated and PLAN_TEXT + LAYER_TEXT * layers <= (PLAN_LIMIT - 1) * weights
    repeated = [
        f"{source.kernel} {source.copies} times" for source in sources if source.copies > 1 and source.kernel not in ATTENTION_KERNELS.values()
    ]
    reason = f"{size / 1e6:.1f} MB, of which {source_bytes(sources) / 1e6:.1f} MB are the kernels' CUDA source; attention's is stored for every layer"
    limit = PLAN_LIMIT if asked else None
    return _check("plan_bytes_per_weight_byte", round(size / weights, 4), limit, "<=", reason, where=_first(repeated))


def _names(programs: Sequence[Program], profile: int) -> dict[str, int]:
    return dict(Counter(kernel.name for program in programs if program.profile == profile for kernel in program.kernels).most_common())


def _first(items: Sequence[str]) -> str | None:
    """The first of them, and how many more."""
    if not items:
        return None
    return items[0] if len(items) == 1 else f"{items[0]} and {len(items) - 1} more"


def _check(name: str, value: float | None, limit: float | None, comparison: str, reason: str, *, where: str | None = None) -> Check:
    """One line of the audit; without a limit the value is shown and not gated, without a value the check fails."""
    passed = None if limit is None else value is not None and (value <= limit if comparison == "<=" else value == limit)
    return {"check": name, "value": value, "limit": limit, "comparison": comparison, "passed": passed, "reason": reason, "where": where}
