"""commands/sessions.py: which plans are a stage's."""

from __future__ import annotations

from typing import Any

from commands.sessions import Wanted


def entry(graph: str, length: int, capacity: int | None = None) -> dict[str, Any]:
    return {"graph": graph, "capacity": capacity, "profiles": {"prefill": {"batch_size": [1, 1, 2], "total_sequence_length": [1, 1, length]}}}


def test_the_smallest_plan_that_holds_it_comes_first_then_the_one_that_reaches_furthest() -> None:
    short, usual = entry("fused-engine.onnx", 8), entry("fused-engine.onnx", 64)
    assert sorted([short, usual], key=Wanted(1, 32).order) == [usual, short]
    small, large, tiny = (entry("fused-engine-c32.onnx", 0, slots) for slots in (32, 64, 16))
    assert sorted([large, tiny, small], key=Wanted(1, 20).order) == [small, large, tiny]
    assert sorted([small, tiny, large], key=Wanted(1, 100).order) == [large, small, tiny]
