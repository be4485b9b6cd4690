"""The part of GitHub's expressions that these workflows use: contexts, literals, ``== != ! && ||``, a few functions. The rest is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(r"\s*(?:(&&|\|\||==|!=|[!(),])|'((?:[^']|'')*)'|(-?\d+(?:\.\d+)?)|([A-Za-z_][\w.\-]*))")
_WHOLE = re.compile(r"^\$\{\{((?:(?!\}\}).)*)\}\}$", re.DOTALL)
_PART = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
Context = Mapping[str, Any]


class ExpressionError(Exception):
    """An expression that this evaluator does not know."""


def render(text: str, context: Context) -> Any:
    """Fill a string's ``${{ … }}``; a string that is one expression keeps its value's type."""
    whole = _WHOLE.match(text.strip())
    if whole:
        return evaluate(whole[1], context)
    return _PART.sub(lambda match: as_text(evaluate(match[1], context)), text)


def evaluate(text: str, context: Context) -> Any:
    """The value of one expression.

    Raises:
        ExpressionError: it uses what is not known here.
    """
    tokens, position = list[tuple[str, str]](), 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"can't read {text[position:]!r}")
        kind = next(name for name, group in zip(("sign", "string", "number", "name"), match.groups(), strict=True) if group is not None)
        tokens.append((kind, str(next(group for group in match.groups() if group is not None))))
        position = match.end()
    parser = _Parser(tokens, context)
    value = parser.any_of()
    if parser.tokens:
        raise ExpressionError(f"can't read {text!r} from {parser.tokens[0][1]!r} on")
    return value


def as_text(value: Any) -> str:
    """As GitHub writes a value into a string."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


class _Parser:
    """Recursive descent; ``&&`` and ``||`` give one of their operands, as GitHub's do."""

    def __init__(self, tokens: list[tuple[str, str]], context: Context) -> None:
        self.tokens, self.context = tokens, context

    def any_of(self) -> Any:
        value = self.all_of()
        while self.take("||"):
            other = self.all_of()
            value = value or other
        return value

    def all_of(self) -> Any:
        value = self.equal()
        while self.take("&&"):
            other = self.equal()
            value = other if value else value
        return value

    def equal(self) -> Any:
        value = self.one()
        while sign := self.take("==") or self.take("!="):
            same = as_text(value).lower() == as_text(self.one()).lower()
            value = same if sign == "==" else not same
        return value

    def one(self) -> Any:
        if self.take("!"):
            return not self.one()
        if self.take("("):
            value = self.any_of()
            self.expect(")")
            return value
        kind, text = self.tokens.pop(0) if self.tokens else ("end", "the end")
        if kind == "string":
            return text.replace("''", "'")
        if kind == "number":
            return float(text) if "." in text else int(text)
        if kind == "name":
            return self.call(text) if self.take("(") else self.look_up(text)
        raise ExpressionError(f"a value is missing before {text!r}")

    def call(self, name: str) -> Any:
        arguments = []
        while not self.take(")"):
            arguments.append(self.any_of())
            self.take(",")
        if name == "fromJSON":
            return json.loads(as_text(arguments[0]))
        if name == "format":
            return re.sub(r"\{(\d+)\}", lambda match: as_text(arguments[int(match[1]) + 1]), as_text(arguments[0]))
        states = {"always": True, "success": not self.context["failed"], "failure": self.context["failed"], "cancelled": False}
        if name in states:
            return states[name]
        raise ExpressionError(f"no function {name}")

    def look_up(self, name: str) -> Any:
        if name in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[name]
        first, *rest = name.split(".")
        if first not in self.context:
            raise ExpressionError(f"no context {first!r} in {name}")
        value = self.context[first]
        for key in rest:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def take(self, sign: str) -> str | None:
        if self.tokens and self.tokens[0] == ("sign", sign):
            return self.tokens.pop(0)[1]
        return None

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            raise ExpressionError(f"{sign!r} is missing")
