"""Every small change of a source file that its tests should notice: the mutants of ``scripts/mutate``.

What is changed: conditions (negated, a clause of ``and``/``or`` left out, a comparison or quantifier turned), numbers and words (attributes,
axes, operator names, entries of tables), attributes left out of new nodes, arithmetic, and refusals, which are passed over.
What is not: docstrings, annotations, decorators, assertions (``zip(strict=True)`` is one), and what a refusal says: the tests compare it as it is.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}
QUANTIFIERS = {"any": "all", "all": "any"}
UNTOUCHED_FIELDS = ("annotation", "returns", "decorator_list")
UNTOUCHED_NODES = (ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
TYPING = ("like", "shape", "dtype", "name", "outputs", "strict", "default")
"""Keywords that are no attributes of a node."""
Changes = Iterator[tuple[str, ast.AST]]
"""How a change reads (empty: before → after), and the node after it."""


@dataclass(frozen=True)
class Mutant:
    """One change: ``apply`` makes it in the tree that it was found in, for good."""

    where: str
    line: int
    kind: str
    change: str
    apply: Callable[[], None]


@dataclass(frozen=True)
class Slot:
    """The place of a node in its parent."""

    parent: ast.AST
    field: str
    index: int | None

    def put(self, node: ast.AST) -> None:
        """Put another node there."""
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def find_mutants(tree: ast.Module, source: str) -> Iterator[Mutant]:
    """All mutants of a module, in the order of its text; ``change`` tells them apart within a function, and does not hold line numbers."""
    lines, seen = source.splitlines(), Counter[tuple[str, str]]()
    for slot, node, where in _places(tree, ""):
        for kind, words, changed in _changes(slot, node):
            ast.fix_missing_locations(ast.copy_location(changed, node))
            change = f"{lines[node.lineno - 1].strip()} ⟶ {words or f'{_text(node)} → {_text(changed)}'}"
            seen[where, change] += 1
            change += f" (no. {seen[where, change]})" if seen[where, change] > 1 else ""
            yield Mutant(where, node.lineno, kind, change, lambda slot=slot, changed=changed: slot.put(changed))


def _text(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def _places(parent: ast.AST, where: str) -> Iterator[tuple[Slot, Any, str]]:
    """Every node that has a line, with its place and the function it is in."""
    for field, value in ast.iter_fields(parent):
        if field in UNTOUCHED_FIELDS or (isinstance(parent, ast.keyword) and parent.arg == "strict"):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or isinstance(node, UNTOUCHED_NODES) or _is_docstring(node):
                continue
            if hasattr(node, "lineno") and isinstance(node, ast.expr | ast.stmt):
                yield Slot(parent, field, index), node, where
            named = isinstance(node, ast.FunctionDef | ast.ClassDef)
            yield from _places(node, f"{where}.{node.name}".strip(".") if named else where)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _changes(slot: Slot, node: Any) -> Iterator[tuple[str, str, ast.AST]]:
    """What a node is changed to, with the kind of change, in words where the two texts would not say it well."""
    if slot.field in ("test", "ifs") and not isinstance(node, ast.Compare) and not _is_not(node):
        yield "condition", f"not ({_text(node)})", ast.UnaryOp(ast.Not(), node)
    for kind, make in _OF_NODE.get(type(node), {}).items():
        for words, changed in make(node):
            yield kind, words, changed


def _is_not(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _without_a_clause(node: ast.BoolOp) -> Changes:
    for left_out in node.values:
        kept = [clause for clause in node.values if clause is not left_out]
        yield f"without {_text(left_out)}", kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)


def _compared_otherwise(node: ast.Compare) -> Changes:
    for index, operator in enumerate(node.ops):
        yield "", ast.Compare(node.left, [*node.ops[:index], COMPARISONS[type(operator)](), *node.ops[index + 1 :]], node.comparators)


def _not_negated(node: ast.UnaryOp) -> Changes:
    if _is_not(node):
        yield f"without not: {_text(node.operand)}", node.operand


def _other_constant(node: ast.Constant) -> Changes:
    value = node.value
    if isinstance(value, bool):
        yield "", ast.Constant(not value)
    elif isinstance(value, int | float):
        yield "", ast.Constant(value + 1)
    elif isinstance(value, str) and value.isidentifier():
        yield "", ast.Constant(f"{value}_")


def _calculated_otherwise(node: ast.BinOp) -> Changes:
    if type(node.op) in ARITHMETIC:
        yield "", ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)


def _other_quantifier(node: ast.Call) -> Changes:
    if isinstance(node.func, ast.Name) and node.func.id in QUANTIFIERS:
        yield "", ast.Call(ast.Name(QUANTIFIERS[node.func.id], ast.Load()), node.args, node.keywords)


def _without_an_attribute(node: ast.Call) -> Changes:
    """A node that is made (``tape.add("Op", …)``, ``op.Op(…)``) without one of its attributes."""
    made = isinstance(node.func, ast.Attribute) and (node.func.attr == "add" or node.func.attr[0].isupper())
    for left_out in node.keywords if made else ():
        if left_out.arg is None or left_out.arg.lstrip("_") in TYPING:
            continue
        yield f"without {left_out.arg}", ast.Call(node.func, node.args, [keyword for keyword in node.keywords if keyword is not left_out])


def _passed_over(node: ast.stmt) -> Changes:
    """A statement under ``if False``, so that a generator stays one."""
    if isinstance(node, ast.Raise) or isinstance(getattr(node, "value", None), ast.Yield):
        yield "passed over", ast.If(ast.Constant(False), [copy.copy(node)], [])


def _no_reason(node: ast.Return) -> Changes:
    """A refusal that is returned: words, alone or behind a value."""
    if _is_words(node.value):
        yield "without a reason", ast.Return(ast.Constant(""))
    elif isinstance(node.value, ast.Tuple) and _is_words(node.value.elts[-1]):
        yield "without a reason", ast.Return(ast.Tuple([*node.value.elts[:-1], ast.Constant("")], ast.Load()))


def _is_words(node: ast.AST | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value)


_OF_NODE: dict[type[ast.AST], dict[str, Callable[[Any], Changes]]] = {
    ast.BoolOp: {"clause": _without_a_clause},
    ast.Compare: {"comparison": _compared_otherwise},
    ast.UnaryOp: {"condition": _not_negated},
    ast.Constant: {"constant": _other_constant},
    ast.BinOp: {"arithmetic": _calculated_otherwise},
    ast.Call: {"quantifier": _other_quantifier, "attribute": _without_an_attribute},
    ast.Raise: {"refusal": _passed_over},
    ast.Expr: {"refusal": _passed_over},
    ast.Return: {"refusal": _no_reason},
}
