"""What every rule of ours is: pattern → objections → rewrite. The first objection refuses the match, in words."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

Objection = tuple[str, ir.Value]
"""Why a match is not taken, in words, and the value at which it shows."""


class FusionRule(RewriteRuleClassBase):
    """A rewrite rule that says why it refuses; stateless, so that a match carries nothing from ``objections`` to ``rewrite``."""

    @abc.abstractmethod
    def objections(self, **matched: ir.Value) -> Iterator[Objection]:
        """Why the matched values must not be rewritten; drawn one by one, and none after the first."""

    def check(self, context: Any, **matched: ir.Value) -> MatchResult:  # type: ignore[override]  # the base calls the context "op"
        """Called by the rewriter when the pattern's structure has been found."""
        for reason, where in self.objections(**matched):
            return MatchResult().fail(reason, where)
        return MatchResult()
