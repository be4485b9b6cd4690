"""The report of a fusion: for each rule how often it fired, how often it must, and what it refused; operators before and after."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from artifact.errors import ParityMismatch
from graphs.rewriting import Refusal


@dataclass(frozen=True)
class RuleReport:
    """How often one rule fired, how often it should have, and what it refused."""

    rule: str
    fired: int
    expected: int
    refused: list[Refusal]
    note: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it fired as often as the model's shape says."""
        return self.fired == self.expected

    def as_json(self) -> dict[str, Any]:
        """The contract's entry of `rules`."""
        refused = [{"node": refusal.node, "reason": refusal.reason} for refusal in self.refused]
        note = {"note": self.note} if self.note else {}
        return {"rule": self.rule, "fired": self.fired, "expected": self.expected, "refused": refused, **note}


@dataclass(frozen=True)
class FusionReport:
    """What became of a graph."""

    target: str
    nodes_before: int
    nodes_after: int
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    rules: list[RuleReport]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every rule fired as often as expected."""
        return all(rule.passed for rule in self.rules)

    def as_json(self) -> dict[str, Any]:
        """The step's report."""
        return {
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "target": self.target,
            "passed": self.passed,
            "seconds": self.seconds,
            "rules": [rule.as_json() for rule in self.rules],
            "ops_before": self.ops_before,
            "ops_after": self.ops_after,
        }


def check_complete(report: FusionReport) -> None:
    """Refuse a report in which a rule fired another number of times than expected.

    Raises:
        ParityMismatch: with the first such rule, and the first node that it refused.
    """
    for rule in report.rules:
        if rule.passed:
            continue
        why = f"; first refused: {rule.refused[0].node}: {rule.refused[0].reason}" if rule.refused else "; no candidate is left in the graph"
        raise ParityMismatch(
            f"fusion {rule.rule} fired {rule.fired} times, expected {rule.expected}{why}", hint="fuse with --allow-partial to keep what is fused"
        )


def count_operators(model: ir.Model) -> dict[str, int]:
    """Operator → how many nodes of it, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph).items()))
