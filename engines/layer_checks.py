"""Gates on what a plan's layers hold: attention fused, no needless kernel, copy or cast, keys and values as they are, logits of one position.

The limits are what the fused and packed graph gives in TensorRT-RTX 1.7.1 at every width that was measured (docs/kernels.md); one more is a fusion
that no longer reaches the hardware.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from engines.checks import Check, check, first
from engines.decode_gemv import SUFFIX
from engines.graph_weights import Weight, node_label
from engines.plan_kinds import ATTENTION, CAST, COPIED, COPY, GEMM, REPEATED
from engines.plan_layers import LIBRARY, Launch, layers_of
from engines.plan_program import Kernel

ATTENTION_KERNELS = {"prefill": "_gemm_mha_v2", "decode": "_gemv_mha_v1"}
"""Profile → the kernel that fused attention must be: tiles over a prompt, one query row a step in decode."""


@dataclass(frozen=True)
class LayerLimit:
    """How much of something a layer may hold.

    Attributes:
        check: name, to which the profile is added.
        count: how much a launch holds of it.
        limits: profile → the most that one layer may hold.
        reason: why.
    """

    check: str
    count: Callable[[Launch], int]
    limits: Mapping[str, int]
    reason: str


def _kernels(prefill: int, decode: int, reason: str) -> LayerLimit:
    return LayerLimit("kernels_per_layer", lambda launch: 1, {"prefill": prefill, "decode": decode}, reason)


def _copies(prefill: int, reason: str, decode: int = 0) -> LayerLimit:
    limits = {"prefill": prefill, "decode": decode}
    return LayerLimit("copies_per_layer", lambda launch: launch.kind == COPY, limits, f"a kernel that only moves values; {reason}")


LIMITS = (
    _kernels(
        11,
        10,
        "four GEMMs, attention, two norms, SiLU, the cache with its keys' rotation, the query's rotation; prefill turns attention's result besides",
    ),
    _copies(1, "prefill's attention gives [B, H, S, D] and the next GEMM reads it turned, in decode that is the same"),
    LayerLimit(
        "casts_per_layer",
        lambda launch: launch.kind == CAST,
        {"prefill": 0, "decode": 0},
        "a kernel that only casts; every cast has arithmetic beside it to go with",
    ),
    LayerLimit(
        "repeated_caches_per_layer",
        lambda launch: launch.writes.count(REPEATED),
        {"prefill": 0, "decode": 0},
        "keys or values written once for every query head, H / K times the memory traffic",
    ),
    LayerLimit(
        "copied_caches_per_layer",
        lambda launch: launch.writes.count(COPIED),
        {"prefill": 2, "decode": 0},
        "keys or values written a second time; prefill's attention kernel reads its own layout of both",
    ),
)

UNPACKED_LIMITS = (
    _kernels(
        12,
        11,
        "query, key and value, and gate and up, are GEMMs of their own where weights lie as the checkpoint stores them",
    ),
    *LIMITS[1:],
)
"""The same for a graph whose linears could not be packed (``--weights reference``; docs/kernels.md)."""

BLOCK_LIMITS = (
    _kernels(11, 11, "as one scale a channel has; in decode attention's result is moved once more before a GEMM that spreads scales over blocks"),
    _copies(1, "attention's result, before a GEMM that spreads scales over blocks: 30 of 30 layers of SmolLM2, in both profiles", decode=1),
    *LIMITS[2:],
)
"""The same for INT4 in blocks."""

STATIC_LIMITS = (
    _kernels(
        12,
        9,
        "four GEMMs, attention, two norms, SiLU, the cache with both rotations; in prefill the three copies besides",
    ),
    _copies(3, "prefill's attention reads its own layout of keys and values, and its result is turned for the next GEMM"),
    *LIMITS[2:],
)
"""The same for a static cache, whose kernels write slots in the place of joining tensors (docs/adr/009)."""


GEMV_LIMITS = (
    _kernels(
        11,
        8,
        "as usual in prefill; in decode q·k·v and down take in the norm's last step and SiLU · up, and one kernel rotates and writes the cache",
    ),
    *LIMITS[1:],
)
"""The same for a graph whose decode multiplies by a vector (``decode_gemv``; docs/adr/010)."""

GEMV_STATIC_LIMITS = (replace(GEMV_LIMITS[0], limits={"prefill": 12, "decode": 8}), *STATIC_LIMITS[1:])
"""And with a static cache."""


def layer_checks(launches: Sequence[Launch], profile: str, *, gated: bool, limits: Sequence[LayerLimit] = LIMITS) -> list[Check]:
    """One check a limit: the worst layer's count; without layers there is no value, and a gated check fails."""
    layers = layers_of(launches)
    checks = []
    for limit in limits:
        counts = Counter({layer: 0 for layer in layers})
        for launch in launches:
            if launch.layer is not None:
                counts[launch.layer] += limit.count(launch)
        allowed = limit.limits[profile]
        over = [f"layer {layer}: {counts[layer]}" for layer in layers if counts[layer] > allowed]
        where = first(over) if layers else "no kernel says to which layer it belongs"
        worst = max(counts.values(), default=None)
        checks.append(check(f"{limit.check}_{profile}", worst, allowed if gated else None, "<=", limit.reason, where=where))
    return checks


def attention_check(
    launches: Sequence[Launch], profile: str, layers: Sequence[int], *, gated: bool, kernels: Mapping[str, str] = ATTENTION_KERNELS
) -> Check:
    """In how many layers exactly one kernel computes attention, and it is the profile's."""
    wanted = kernels[profile]
    found = Counter(launch.layer for launch in launches if launch.kind == ATTENTION and launch.kernel.name == wanted)
    wrong = [f"layer {layer}: {found[layer]}" for layer in layers if found[layer] != 1]
    reason = f"one {wanted} a layer" if gated else "shown, not asked for: in float32 TensorRT fuses the attention of decode alone"
    return check(f"fused_attention_{profile}", len(layers) - len(wrong), len(layers) if gated else None, "==", reason, where=first(wrong))


def logits_check(positions: int | None, profile: str, *, gated: bool) -> Check:
    """Of how many positions a row the plan gives logits."""
    reason = "one position a row is gathered before lm_head; logits of a whole prompt are megabytes that nobody reads"
    return check(f"logits_positions_{profile}", positions, 1 if gated else None, "==", reason)


def integers_check(launches: Sequence[Launch], weights: Sequence[Weight], profile: str) -> Check:
    """How many linears a GEMM of int8 by int8 computes, and that they are the ones whose input the graph rounds: none where it is weight-only."""
    wanted = {label for weight in weights if weight.integer for label in weight.linears}
    linears = {label for weight in weights for label in weight.linears}
    found = {label for launch in launches if launch.multiplies_integers for label in launch.kernel.layers if label in linears}
    reason = "a GEMM of int8 by int8 with float32 results for every linear whose input is rounded, and for no other"
    value = len(found) if found <= wanted else len(found | wanted)
    return check(f"integer_gemms_{profile}", value, len(wanted), "==", reason, where=first(sorted(found ^ wanted)))


def sums_check(launches: Sequence[Launch], graph: ir.Graph) -> Check:
    """How many sums of products decode adds up in float32: all that the graph has (``decode_gemv``); no GEMM's line says it of them."""
    wanted = {node_label(node) for node in graph if node.op_type == "ReduceSum" and node_label(node).endswith(SUFFIX)}
    adding = [launch.kernel for launch in launches if launch.kind == GEMM and launch.kernel.name != LIBRARY]
    found = {label for kernel in adding if _gives_float32(kernel) for label in kernel.layers if label in wanted}
    reason = "a kernel that adds up products in float32 for every linear whose decode multiplies by a vector"
    return check("float32_sums_decode", len(found), len(wanted), "==", reason, where=first(sorted(wanted - found)))


def _gives_float32(kernel: Kernel) -> bool:
    """Whether all that a kernel writes is float32, but for single numbers."""
    return {tensor.dtype for tensor in kernel.writes if any(size != 1 for size in tensor.dims)} == {"float"}


def quantized_check(launches: Sequence[Launch], weights: Sequence[Weight], profile: str, dtype: str = "int8", *, written_out: int = 0) -> Check:
    """How many quantised linears a GEMM computes that reads their weight of this dtype itself; all, but for those that may be written out first."""
    linears = {name: weight.name for weight in weights if weight.quantized for name in weight.linears}
    read = {linears[label] for launch in launches if launch.weight == dtype for label in launch.kernel.layers if label in linears}
    missing = sorted(set(linears.values()) - read)
    reason = f"a GEMM for every quantised linear, which reads the {dtype} weight itself"
    return check(f"quantized_gemms_{profile}", len(read), len(set(linears.values())) - written_out, ">=", reason, where=first(missing))
