"""Who made a node: every fusion of every pipeline is known, or is one that leaves no node to be blamed."""

from __future__ import annotations

import itertools

from graphs.pipeline import PIPELINES, STATIC_PIPELINES
from validation.bisect.hints import PACKING, RULES

UNSEEN = {"constant_shape", "accumulate"}
"""Their nodes are shapes and casts."""


def test_every_fusion_that_writes_operators_is_known() -> None:
    fusions = itertools.chain(*PIPELINES.values(), *STATIC_PIPELINES.values())
    known = set(itertools.chain(*RULES.values(), *PACKING.values()))
    assert {fusion.rule for fusion in fusions} - UNSEEN == known
