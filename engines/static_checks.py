"""What the plan of a static cache must show, read from its programs: the lengths are used, and the caches are updated in place.

A network whose attention was left without lengths gives a plan that looks sound, but does not read them: TensorRT drops an input that nothing uses.
Letters: L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from artifact.io_spec import CACHE_KINDS, KEY_VALUE_LENGTHS, present_name
from engines.checks import Check, check
from engines.plan_program import Program, interface_name

LENGTHS_READ = f"{KEY_VALUE_LENGTHS} is an input of the profile: without it attention sees the wrong slots"
IN_PLACE = "a cache is read and written at one address: past and present are one buffer"


def static_checks(programs: Sequence[Program], profiles: Sequence[str], layers: Sequence[int]) -> list[Check]:
    """Two checks a profile.

    Args:
        programs: of the plan.
        profiles: their names, in the plan's order.
        layers: those of the graph.
    """
    presents = {present_name(layer, kind) for layer in layers for kind in CACHE_KINDS}
    checks = []
    for index, name in enumerate(profiles):
        own = [program for program in programs if program.profile == index]
        inputs, outputs = ({interface_name(name) for name in names} for names in _bindings(own))
        checks.append(check(f"lengths_read_{name}", int(KEY_VALUE_LENGTHS in inputs), 1, "==", LENGTHS_READ))
        checks.append(check(f"caches_in_place_{name}", len(presents & inputs & outputs), len(presents), "==", IN_PLACE))
    return checks


def _bindings(programs: Sequence[Program]) -> tuple[list[str], list[str]]:
    return [name for program in programs for name in program.inputs], [name for program in programs for name in program.outputs]
