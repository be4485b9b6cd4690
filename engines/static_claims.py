"""What the plan of a static cache must show, read from its programs: the lengths are used, and the caches are updated in place.

A network whose attention was left without lengths gives a plan that looks sound, but does not read them: TensorRT drops an input that nothing uses.
Letters: L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from artifact.io_spec import CACHE_KINDS, CACHE_WRITE_INDICES, KEY_VALUE_LENGTHS, present_name
from engines.plan_program import Program

Claim = tuple[str, int, int, str]
"""Name, what was found, what it must be, and why."""


def is_static(graph: ir.Graph) -> bool:
    """Whether a graph has a static cache."""
    return any(value.name == CACHE_WRITE_INDICES for value in graph.inputs)


def static_claims(programs: Sequence[Program], profiles: Sequence[str], layers: int) -> list[Claim]:
    """Two claims a profile.

    Args:
        programs: of the plan.
        profiles: their names, in the plan's order.
        layers: L.
    """
    presents = {present_name(layer, kind) for layer in range(layers) for kind in CACHE_KINDS}
    claims = []
    for index, name in enumerate(profiles):
        own = [program for program in programs if program.profile == index]
        reads = sum(KEY_VALUE_LENGTHS in program.inputs for program in own)
        in_place = {tensor for program in own for tensor in presents.intersection(program.inputs, program.outputs)}
        claims += [
            (f"lengths_read_{name}", min(reads, 1), 1, f"{KEY_VALUE_LENGTHS} is an input of the profile: without it attention sees the wrong slots"),
            (f"caches_in_place_{name}", len(in_place), len(presents), "a cache is read and written at one address: past and present are one buffer"),
        ]
    return claims
