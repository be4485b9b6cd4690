"""commands/sessions.py: which plans are a stage's."""

from __future__ import annotations

from typing import Any

import pytest

from commands.sessions import Wanted, is_of


@pytest.mark.parametrize(
    ("graph", "stage", "expected"),
    [
        ("fused-engine.onnx", "fused", True),
        ("fused-engine-gemv.onnx", "fused", True),
        ("fused-engine.onnx", "fused-engine", True),
        ("fused-engine-gemv.onnx", "fused-engine", False),
        ("fused-engine-gemv.onnx", "fused-engine-gemv", True),
        ("fused-engine-gemv-c512.onnx", "fused-engine-gemv", True),
        ("fused-engine.onnx", "fused-engine-gemv", False),
        ("fused-engine-layers-00-01.onnx", "fused-engine-gemv", False),
        ("int8-engine.onnx", "fused", False),
    ],
)
def test_a_stage_may_ask_for_the_form_of_decode(graph: str, stage: str, expected: bool) -> None:
    assert is_of(graph, stage) is expected


def entry(graph: str, length: int, capacity: int | None = None) -> dict[str, Any]:
    return {"graph": graph, "capacity": capacity, "profiles": {"prefill": {"batch_size": [1, 1, 2], "total_sequence_length": [1, 1, length]}}}


def test_the_usual_form_of_decode_comes_first_where_both_fit() -> None:
    usual, gemv, short = entry("fused-engine.onnx", 64), entry("fused-engine-gemv.onnx", 64), entry("fused-engine.onnx", 8)
    assert sorted([gemv, short, usual], key=Wanted(1, 32).order) == [usual, gemv, short]
    large, small = entry("fused-engine-c64.onnx", 0, 64), entry("fused-engine-gemv-c32.onnx", 0, 32)
    assert sorted([small, large], key=Wanted(1, 16).order) == [large, small]
