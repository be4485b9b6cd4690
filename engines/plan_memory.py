"""The device memory that a plan's profiles ask for beside weights and caches, as its programs' headers state it: read without a GPU.

A header lists regions: ``region = { name=devmem_topdown_0 size=905969664 … place=accelerator … }``, at the profile's largest shapes; weights are a
constant region, what inputs and outputs take is the caller's. A runtime gives each profile's context its own.
Written from plans of TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path

from engines.plan_program import HEADER

_END = b"\n}"
_REGION = re.compile(rb"region = \{ name=\S+ size=(\d+) [^}]*place=accelerator [^}]*\}")
_CONSTANT = b"constant=true"
_PROFILE = re.compile(rb"\[profile (\d+)\]")


def read_activation_bytes(plan: Path, profiles: Sequence[str]) -> dict[str, int]:
    """Profile → bytes of its regions on the device; 0 where the plan has no program of it.

    Args:
        plan: TensorRT-RTX plan.
        profiles: their names, in the plan's order.
    """
    found = dict.fromkeys(profiles, 0)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(HEADER)
        while at >= 0:
            end = content.find(_END, at)
            header = content[at:end]
            profile = _PROFILE.search(header)
            index = int(profile[1]) if profile else 0
            if index < len(profiles):
                found[profiles[index]] += sum(int(region[1]) for region in _REGION.finditer(header) if _CONSTANT not in region[0])
            at = content.find(HEADER, end)
    return found
