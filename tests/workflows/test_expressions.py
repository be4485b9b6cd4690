from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

CONTEXT = {
    "inputs": {"cache": "true", "max-batch": "4", "random": False},
    "steps": {"key": {"outputs": {"restore-key": "abc"}}},
    "vars": {},
    "matrix": {"precision": "int8"},
    "failed": False,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("inputs.cache == 'true'", True),
        ("inputs.max-batch", "4"),
        ("steps.key.outputs.restore-key", "abc"),
        ("vars.GPU_RUNNER != ''", False),
        ("vars.GPU_RUNNER || 'ubuntu-latest'", "ubuntu-latest"),
        ("matrix.precision == 'fp16' && 'fused' || matrix.precision", "int8"),
        ('fromJSON(\'["a", "b"]\')', ["a", "b"]),
        ("always() && inputs.cache != 'none'", True),
        ("!inputs.random && (1 == 1)", True),
        ("'it''s'", "it's"),
        ("failure()", False),
        ("!cancelled() && inputs.cache", "true"),
        ("format('-{1}-{0}', matrix.precision, 7)", "-7-int8"),
    ],
)
def test_evaluates_what_the_workflows_use(expressions: ModuleType, text: str, value: Any) -> None:
    assert expressions.evaluate(text, CONTEXT) == value


@pytest.mark.parametrize("text", ["hashFiles('x')", "secret.X", "'a' ~ 'b'", "(1", "a b", ""])
def test_refuses_what_it_does_not_know(expressions: ModuleType, text: str) -> None:
    with pytest.raises(expressions.ExpressionError):
        expressions.evaluate(text, CONTEXT)


def test_renders_strings_and_keeps_the_type_of_a_whole_expression(expressions: ModuleType) -> None:
    assert expressions.render("a-${{ matrix.precision }}-${{ vars.none }}", CONTEXT) == "a-int8-"
    assert expressions.render("${{ inputs.random }}", CONTEXT) is False
    assert expressions.render("${{ matrix.precision }}-${{ inputs.cache }}", CONTEXT) == "int8-true"
