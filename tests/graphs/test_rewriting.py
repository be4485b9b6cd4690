from __future__ import annotations

import ast
from pathlib import Path

import onnx_ir as ir
import pytest
from onnxscript.rewriter.pattern import MatchResult

from graphs.fusions import attention, rms_norm
from graphs.rewriting import apply_fusion, in_words

ROOT = Path(__file__).resolve().parents[2]
HEADER = '<ir_version: 11, opset_import: ["" : 23]>\n'


def test_names_every_candidate_that_is_left() -> None:
    model = ir.from_onnx_text(HEADER + "agraph (float[B,S] x) => (float[B,S] y) { [first] z = Softmax(x)\n [second] y = Softmax(z) }")
    result = apply_fusion(model, attention.RULES, attention.is_candidate)
    assert result.fired == 0
    assert [refusal.node for refusal in result.refused] == ["first", "second"]
    assert {refusal.reason for refusal in result.refused} == {"nothing that is fused reads this Softmax"}


def test_does_not_change_what_it_refuses() -> None:
    text = HEADER + "agraph (float[B,S] x, int64[1] axes) => (float[B,1] y) { [mean] y = ReduceMean(x, axes) }"
    model, untouched = ir.from_onnx_text(text), ir.from_onnx_text(text)
    apply_fusion(model, rms_norm.RULES, rms_norm.is_candidate)
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(untouched).SerializeToString()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("OpType mismatch: expected MatMul, got Gemm.", "its structure differs: linear is Gemm, expected MatMul"),
        ("Matched nodes have other uses preventing replacement.", "a value between its first and last node is used elsewhere too (near linear)"),
        (
            "Mismatch: Computed node pattern does not match uncomputed IR value.",
            "an operand is fed or stored where it should be computed (near linear)",
        ),
        ("Binding failure: x bound to two different values.", "two operands should be one value, and are not (near linear)"),
        ("Node output index mismatch: expected 0, got 1.", "the outputs of a node are used in another order (near linear)"),
        ("Attribute perm mismatch: expected (1, 0), got (0, 1).", "an attribute differs (near linear)"),
        ("Number of inputs (3) is greater than expected (2)", "a node has more inputs than expected (near linear)"),
        ("epsilon is not a constant number", "epsilon is not a constant number (linear)"),
    ],
)
def test_says_the_reason_in_words(reason, words) -> None:
    node = ir.Node("", "Gemm", [], name="linear")
    assert in_words(MatchResult().fail(reason, node)) == words


def test_every_refusal_of_every_rule_is_tested() -> None:
    """Four words in a row of each objection stand in the test file of a fusion."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests/graphs/fusions").glob("test_*.py"))
    untested = []
    for path in (ROOT / "graphs/fusions").glob("*.py"):
        for words in objection_words(ast.parse(path.read_text(encoding="utf-8"))):
            runs = [part.split()[at : at + 4] for part in words for at in range(max(1, len(part.split()) - 3))]
            if not any(" ".join(run) in tests for run in runs if len(run) > 1):
                untested.append((path.name, words))
    assert untested == []


def objection_words(tree: ast.Module) -> list[list[str]]:
    """The constant parts of every text that is yielded, returned beside a value or raised, as a reason."""
    texts = [node.value.elts[0] for node in ast.walk(tree) if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple)]
    texts += [node.value.elts[1] for node in ast.walk(tree) if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)]
    texts += [node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused"]
    parts = [[part.value for part in getattr(text, "values", [text]) if isinstance(part, ast.Constant)] for text in texts]
    return [[part for part in words if isinstance(part, str)] for words in parts if any(isinstance(part, str) and part for part in words)]


def test_objections_are_found() -> None:
    words = [words for path in (ROOT / "graphs/fusions").glob("*.py") for words in objection_words(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(words) >= 80
