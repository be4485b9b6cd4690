"""What a plan is held to by the form of its graph: its cache, whether linears are packed, whether attention is one node or was lowered.

Measured with TensorRT-RTX 1.7.1 (docs/adr/010). The lowered form is that of ``fuse --min-tensorrt`` for releases without Attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from artifact.config import LlamaConfig
from engines.layer_checks import (
    ATTENTION_KERNELS,
    BLOCK_LIMITS,
    GEMV_LIMITS,
    GEMV_STATIC_LIMITS,
    LIMITS,
    STATIC_LIMITS,
    UNPACKED_LIMITS,
    LayerLimit,
)

QUANTIZED_BITS = {"int8": 8, "int4": 4}
"""Type of a quantised weight → its bits."""
QUANTIZED_TYPES = {"int8": "int8", "int8-smoothquant": "int8", "int4": "int4"}
"""Precision → type of its quantised weights."""
PACKED_LIMITS = {"int4": BLOCK_LIMITS}
"""Precision → what a layer of a packed graph may hold, where it is not as in float16."""
LAYER_TEXT = 400_000
"""What TensorRT-RTX 1.7.1 adds in text (programs and CUDA source) for each layer, whatever the width."""
STATIC_LAYER_TEXT = 800_000
"""The same with a static cache: the kernels that write it are stored for every layer, in both profiles (docs/adr/009)."""

GEMV_LAYER_TEXT = 200_000
"""What a decode that multiplies by a vector adds: the kernel that rotates and writes the cache is stored for every layer (docs/adr/010)."""


@dataclass(frozen=True)
class FormLimits:
    """The limits that depend on the form.

    Attributes:
        layer: how much one layer may hold of what.
        attention: profile → the kernel that fused attention must be.
        layer_text: bytes of text that a layer adds to the plan.
        written_out: quantised weights a layer that decode may write out in float16 before it multiplies by them.
    """

    layer: tuple[LayerLimit, ...]
    attention: Mapping[str, str]
    layer_text: int
    written_out: int = 0


@dataclass(frozen=True)
class Lowered:
    """What attention in older operators adds to decode: check → (how many, why); prefill's layers are within the usual limits."""

    decode: Mapping[str, tuple[int, str]]
    attention: Mapping[str, str]
    layer_text: int
    written_out: int = 0


_COPIED = (2, "without Attention, decode's kernel reads its own layout of keys and values too")
GROUPED = Lowered(
    {
        "kernels_per_layer": (1, "decode attends to a group's queries as rows of one head, and copies the result back"),
        "copies_per_layer": (1, "decode's result for a group's queries is copied back to their heads"),
        "copied_caches_per_layer": _COPIED,
    },
    {**ATTENTION_KERNELS, "decode": ATTENTION_KERNELS["prefill"]},  # as many rows as a group has queries
    420_000,
)
_KERNELS, _WHY = GROUPED.decode["kernels_per_layer"]
_WRITTEN_OUT = (_KERNELS + 1, f"{_WHY}; behind that copy o_proj's int8 weight is written out in float16 first")
GROUPED_INT8 = replace(GROUPED, decode={**GROUPED.decode, "kernels_per_layer": _WRITTEN_OUT}, written_out=1)
MULTI_HEAD = Lowered({"copied_caches_per_layer": _COPIED}, ATTENTION_KERNELS, 620_000)
"""Without groups: the kernel that writes query, keys and values in prefill is stored for every layer."""


ROUNDED = {"kernels_per_layer": (1, "int8 by int8: decode rounds attention's result in a kernel of its own; norms and SiLU round theirs")}
"""What rounding inputs adds to decode; prefill's copy of attention's result does it on its way (docs/adr/015)."""


def form_limits(
    config: LlamaConfig, *, static: bool, packed: bool, lowered: bool, precision: str, integer: bool = False, gemv: bool = False
) -> FormLimits:
    """The limits of a form.

    Args:
        config: of the model; query heads that share key heads are lowered otherwise.
        static: whether the cache is written in place; such a graph is never lowered.
        packed: whether query, key and value are one linear, and gate and up.
        lowered: whether Attention was written in older operators.
        precision: of the engine.
        integer: whether inputs of linears are rounded to int8 too.
        gemv: whether decode multiplies by a vector; such a graph is packed, and never lowered.
    """
    limits = _form_limits(config, static=static, packed=packed, lowered=lowered, precision=precision, gemv=gemv)
    return replace(limits, layer=tuple(_raised(limit, ROUNDED) for limit in limits.layer)) if integer else limits


BEGINS = "a part turns its hidden state as its first GEMMs read it, in a copy of its own"
ENDS = "a part writes its hidden state in a kernel of its own, where the whole adds it up behind a GEMM"


def part_limits(limits: FormLimits, *, begins: bool, ends: bool) -> FormLimits:
    """The limits of a part: one more in both profiles where it begins behind another, or ends before one (SmolLM2 in two parts, measured)."""
    more = [("kernels_per_layer", BEGINS), ("copies_per_layer", BEGINS)] * begins + [("kernels_per_layer", ENDS)] * ends
    layers = list(limits.layer)
    for check, why in more:
        for index, limit in enumerate(layers):
            if limit.check == check:
                raised = {name: most + 1 for name, most in limit.limits.items()}
                layers[index] = replace(limit, limits=raised, reason=f"{limit.reason}; {why}")
    return replace(limits, layer=tuple(layers))


def _form_limits(config: LlamaConfig, *, static: bool, packed: bool, lowered: bool, precision: str, gemv: bool) -> FormLimits:
    more = GEMV_LAYER_TEXT if gemv else 0
    if static:
        return FormLimits(GEMV_STATIC_LIMITS if gemv else STATIC_LIMITS, ATTENTION_KERNELS, STATIC_LAYER_TEXT + more)
    limits = UNPACKED_LIMITS if not packed else GEMV_LIMITS if gemv else PACKED_LIMITS.get(precision, LIMITS)
    if not lowered:
        return FormLimits(limits, ATTENTION_KERNELS, LAYER_TEXT + more)
    grouped = config.num_key_value_heads < config.num_attention_heads
    form = MULTI_HEAD if not grouped else GROUPED_INT8 if precision in QUANTIZED_TYPES else GROUPED
    return FormLimits(tuple(_raised(limit, form.decode) for limit in limits), form.attention, form.layer_text, form.written_out)


def _raised(limit: LayerLimit, decode: Mapping[str, tuple[int, str]]) -> LayerLimit:
    if limit.check not in decode:
        return limit
    more, why = decode[limit.check]
    return replace(limit, limits={**limit.limits, "decode": limit.limits["decode"] + more}, reason=f"{limit.reason}; {why}")
