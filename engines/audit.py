"""What is inside a plan, read from its bytes: is each weight there once, in its precision, and what does each layer run?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.engine_names import has_gemv
from engines.checks import Check, check, first
from engines.form_limits import LAYER_TEXT, QUANTIZED_BITS, QUANTIZED_TYPES, FormLimits, form_limits, part_limits
from engines.graph_weights import Weight, find_biases, find_weights, weights_bytes
from engines.kernel_source import read_kernel_sources, source_bytes
from engines.layer_checks import ATTENTION_KERNELS, attention_check, integers_check, layer_checks, logits_check, quantized_check, sums_check
from engines.one_position import is_static
from engines.plan_layers import Launch, PlanReader, describe
from engines.plan_memory import read_activation_bytes
from engines.plan_program import Constant, Program, read_programs
from engines.plan_sums import REASON, float16_sums
from engines.static_checks import static_checks
from engines.weight_search import Copies, count_copies

BYTES_PER_WEIGHT = {
    **dict.fromkeys(("int8", "int8-smoothquant"), (1.05, "int8 and its scales; 2 would be float16")),
    "int4": (0.57, "two levels a byte and a scale for each block of 32 to 128; 1 would be int8"),
    "fp16": (2.1, "float16, once; a second layout would show as 4"),
}
"""Precision → limit over all linears of that precision, and why."""
APART = ".k_proj."
"""In the name of a weight that no other was packed with."""
FLOAT_BYTES = 4
PLAN_LIMIT, TEXT_LIMIT = 1.06, 1.1
PLAN_TEXT = 3_500_000
"""What TensorRT-RTX 1.7.1 adds in text (programs and CUDA source), beside that of each layer. SmolLM2: 14.1 MB in all."""


def audit_plan(
    plan: Path, graph_file: Path, *, precision: str, profiles: Sequence[str], config: LlamaConfig, lowered: bool = False
) -> dict[str, Any]:
    """Audit a plan against the graph that it was built from.

    Args:
        plan: TensorRT-RTX plan.
        graph_file: ``<stage>-engine.onnx``.
        precision: as built; fp32 comes from the unpacked graph, so of it only the weights' presence is asked.
        profiles: their names, in the plan's order.
        config: of the model.
        lowered: whether the graph's attention was written in the operators of an older TensorRT release.

    Returns:
        ``kernels`` {name: launches over all profiles}, ``kernels_by_profile``, ``kernels_by_layer`` {profile: {layers, outside}},
        ``bytes_per_weight``, ``activation_bytes`` {profile: bytes on the device}, ``audit`` {passed, checks}.

    Raises:
        EngineError: the plan can't be read.
    """
    graph = ir.load(graph_file).graph
    programs, weights = read_programs(plan), find_weights(graph)
    reader, gated, static = PlanReader(graph, config), precision != "fp32", is_static(graph)
    launches = {name: _launches(programs, index, reader) for index, name in enumerate(profiles)}
    dtype = QUANTIZED_TYPES.get(precision)
    per_weight, worst = bytes_per_weight(programs, weights, quantized=dtype is not None)
    packed, integer = not any(APART in weight.name for weight in weights), any(weight.integer for weight in weights)
    form = {"static": static, "packed": packed, "lowered": lowered, "integer": integer, "gemv": has_gemv(graph_file.stem)}
    limits = form_limits(config, precision=precision, **form)
    limits = part_limits(limits, begins=reader.layers[:1] != [0], ends=not reader.gives_logits)
    checks = [*_weight_checks(plan, graph, weights, gated), *_kernel_checks(programs, launches, reader, config, gated=gated, limits=limits)]
    if dtype is not None:
        apart = {"decode": limits.written_out * len(reader.layers)}
        for name, found in launches.items():
            checks.append(quantized_check(found, weights, name, dtype, written_out=apart.get(name, 0)))
            checks.append(integers_check(found, weights, name))
        checks.append(_read_quantized(programs, weights, QUANTIZED_BITS[dtype], apart["decode"]))
    if precision in BYTES_PER_WEIGHT:
        limit, reason = BYTES_PER_WEIGHT[precision]
        checks.append(check("bytes_per_weight", per_weight, limit, "<=", reason, where=worst))
    half, where = float16_sums(plan, [label for weight in weights if not weight.integer for label in weight.linears])
    checks.append(check("float16_sums", half, 0 if gated else None, "==", REASON, where=where))
    if form["gemv"]:
        checks.append(sums_check(launches["decode"], graph))
    if static:
        checks += static_checks(programs, profiles, reader.layers)
    checks.append(_constant_bytes(programs, weights_bytes(graph), gated))
    checks.append(plan_bytes(plan, weights_bytes(graph), len(reader.layers), gated=precision == "fp16", layer_text=limits.layer_text))
    return {
        "kernels": dict(Counter(kernel.name for program in programs for kernel in program.kernels).most_common()),
        "kernels_by_profile": {name: _names(found) for name, found in launches.items()},
        "kernels_by_layer": {name: describe(found) for name, found in launches.items()},
        "bytes_per_weight": per_weight,
        "activation_bytes": read_activation_bytes(plan, profiles),
        "audit": {"passed": all(line["passed"] is not False for line in checks), "checks": checks},
    }


def _launches(programs: Sequence[Program], profile: int, reader: PlanReader) -> list[Launch]:
    return [launch for program in programs if program.profile == profile for launch in reader.launches(program)]


def _weight_checks(plan: Path, graph: ir.Graph, weights: Sequence[Weight], gated: bool) -> list[Check]:
    copies = count_copies(plan, [*weights, *find_biases(graph)])
    return [_all_found(copies), _once(copies[: len(weights)], gated)]


def _kernel_checks(
    programs: Sequence[Program],
    launches: Mapping[str, Sequence[Launch]],
    reader: PlanReader,
    config: LlamaConfig,
    *,
    gated: bool,
    limits: FormLimits,
) -> list[Check]:
    """What each profile runs, layer by layer and behind them."""
    checks = []
    for index, (name, found) in enumerate(launches.items()):
        positions = [reader.logits_positions(program) for program in programs if program.profile == index]
        checks.append(attention_check(found, name, reader.layers, gated=gated, kernels=limits.attention))
        checks += layer_checks(found, name, gated=gated, limits=limits.layer)
        if reader.gives_logits:
            checks.append(logits_check(next((count for count in positions if count is not None), None), name, gated=gated))
    return checks


def bytes_per_weight(programs: Sequence[Program], weights: Sequence[Weight], *, quantized: bool) -> tuple[float | None, str | None]:
    """Bytes of the constants that linears' kernels read, over all profiles, for each of their parameters; and the largest linear's name.

    A weight that two profiles keep in different layouts counts twice, as it is stored twice.
    """
    linears = [weight for weight in weights if weight.linears and weight.quantized == quantized]
    stored = {weight.name: _constants_of(programs, weight) for weight in linears}
    parameters = sum(weight.parameters for weight in linears)
    if not parameters or not all(stored.values()):
        return None, next((name for name, constants in stored.items() if not constants), None)
    sizes = {weight.name: sum(constant.size_bytes for constant in stored[weight.name]) / weight.parameters for weight in linears}
    total = sum(constant.size_bytes for constant in set().union(*stored.values()))
    return round(total / parameters, 4), max(sizes, key=lambda name: sizes[name])


def _constants(programs: Sequence[Program], labels: Sequence[str]) -> set[Constant]:
    kernels = (kernel for program in programs for kernel in program.kernels if not set(labels).isdisjoint(kernel.layers))
    return {constant for kernel in kernels for constant in kernel.constants}


def _constants_of(programs: Sequence[Program], weight: Weight) -> set[Constant]:
    """What the kernels of a weight read of it.

    Behind a GEMM of int8 by int8 the scales are a vector of the kernel that goes on with its sums, which may read rotary tables and more: that is not
    the weight's.
    """
    constants, rows = _constants(programs, weight.linears), weight.tensor.shape.numpy()[0]
    return {constant for constant in constants if not weight.integer or constant.dtype == "int8" or constant.size_bytes <= FLOAT_BYTES * rows}


def _all_found(copies: Sequence[Copies]) -> Check:
    missing = [found.name for found in copies if not found.total]
    reason = "a sample of every linear's and the embedding's weight stands in the plan, as stored or transposed, and of every bias"
    return check("weights_missing", len(missing), 0, "<=", reason, where=first(missing))


def _once(copies: Sequence[Copies], gated: bool) -> Check:
    twice = [found.name for found in copies if found.total > 1]
    unpacked = "fp32 engines come from the unpacked graph, where each profile may keep its own layout"
    reason = "each profile may ask for its own layout of a weight; packed on a new axis, all agree" if gated else unpacked
    return check("weights_stored_twice", len(twice), 0 if gated else None, "<=", reason, where=first(twice))


def _read_quantized(programs: Sequence[Program], weights: Sequence[Weight], bits: int, limit: int) -> Check:
    """How many quantised weights their own GEMM does not read in some profile: another kernel writes them out in float16 for it."""
    written = [
        weight.name for weight in weights if weight.quantized and any(8 * _bytes(program, weight) < bits * weight.parameters for program in programs)
    ]
    reason = "a weight that is written out in float16 before it is multiplied costs more memory traffic than a float16 engine"
    return check("weights_written_out", len(written), limit, "<=", reason, where=first(written))


def _bytes(program: Program, weight: Weight) -> int:
    """Of the constants that a weight's linears read in one program."""
    return sum(constant.size_bytes for constant in _constants([program], weight.linears))


def _constant_bytes(programs: Sequence[Program], weights: int, gated: bool) -> Check:
    """The constants that the plan's programs name against the graph's."""
    constants = sum(constant.size_bytes for constant in {constant for program in programs for constant in program.constants})
    once = "the plan's constants ÷ the graph's: each weight in one layout for all profiles; plain packing gives 1.5"
    return check("constant_bytes_per_weight_byte", round(constants / weights, 4), PLAN_LIMIT if gated else None, "<=", once)


def plan_bytes(plan: Path, weights: int, layers: int, *, gated: bool, layer_text: int = LAYER_TEXT) -> Check:
    """The whole file against the graph's constants and the text that any such plan holds; not asked for where that text is more than a tenth."""
    size, sources = plan.stat().st_size, read_kernel_sources(plan)
    limit = round(max(PLAN_LIMIT, 1 + (PLAN_TEXT + layer_text * layers) / weights), 4)
    repeated = [
        f"{source.kernel} {source.copies} times" for source in sources if source.copies > 1 and source.kernel not in ATTENTION_KERNELS.values()
    ]
    reason = f"{size / 1e6:.1f} MB, of which {source_bytes(sources) / 1e6:.1f} MB are the kernels' CUDA source; attention's is stored for every layer"
    return check(
        "plan_bytes_per_weight_byte", round(size / weights, 4), limit if gated and limit <= TEXT_LIMIT else None, "<=", reason, where=first(repeated)
    )


def _names(launches: Sequence[Launch]) -> dict[str, int]:
    return dict(Counter(launch.kernel.name for launch in launches).most_common())
