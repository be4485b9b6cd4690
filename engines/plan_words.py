"""What a plan holds by layer, in words: one line for neighbours that read alike, for terminal and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from engines.plan_kinds import COPIED, GEMM, REPEATED, Description

WASTE = {REPEATED: "repeats", COPIED: "copies"}
"""What a kernel writes beside what is asked of it → the verb for it."""


@dataclass(frozen=True)
class LayerLine:
    """`decode`, `layers 1–29 (29 alike)`, 10, `norm · gemm half · cache …`."""

    profile: str
    layers: str
    kernels: int
    content: str


def layer_lines(kernels_by_layer: Mapping[str, Description]) -> list[LayerLine]:
    """The lines of an engine's ``kernels_by_layer``; kernels of one kind read alike, whatever their names."""
    return [line for profile, content in kernels_by_layer.items() for line in _profile_lines(profile, content)]


def _profile_lines(profile: str, content: Description) -> list[LayerLine]:
    spans = [(group["first"], group["last"], sequence(group["kernels"]), len(group["kernels"])) for group in content["layers"]]
    lines = []
    for (words, count), alike in groupby(spans, key=lambda span: span[2:]):
        members = list(alike)
        lines.append(LayerLine(profile, _span(members[0][0], members[-1][1]), count, words))
    outside = [LayerLine(profile, "outside the layers", len(content["outside"]), sequence(content["outside"]))] if content["outside"] else []
    return lines + outside


def sequence(kernels: Sequence[Mapping[str, Any]]) -> str:
    """Kinds in order, with a GEMM's weight and what a kernel repeats or copies of the cache."""
    return " · ".join(_words(kernel) for kernel in kernels)


def _words(kernel: Mapping[str, Any]) -> str:
    words = f"{kernel['kind']} {kernel['weight']}" if kernel["kind"] == GEMM else str(kernel["kind"])
    waste = [f"{verb} {role.partition(' ')[2]}" for role, verb in WASTE.items() if role in kernel["writes"]]
    return f"{words} ({', '.join(waste)})" if waste else words


def _span(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}–{last} ({last - first + 1} alike)"
