"""commands/sessions.py: which plans are a stage's."""

from __future__ import annotations

import pytest

from commands.sessions import is_of


@pytest.mark.parametrize(
    ("graph", "stage", "expected"),
    [
        ("fused-engine.onnx", "fused", True),
        ("fused-engine-gemv.onnx", "fused", True),
        ("fused-engine.onnx", "fused-engine", True),
        ("fused-engine-gemv.onnx", "fused-engine-gemv", True),
        ("fused-engine-gemv-c512.onnx", "fused-engine-gemv", True),
        ("fused-engine.onnx", "fused-engine-gemv", False),
        ("fused-engine-layers-00-01.onnx", "fused-engine-gemv", False),
        ("int8-engine.onnx", "fused", False),
    ],
)
def test_a_stage_may_ask_for_the_form_of_decode(graph: str, stage: str, expected: bool) -> None:
    assert is_of(graph, stage) is expected
