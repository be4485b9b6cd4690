"""The report of a fusion: for each rule how often it fired, how often it must, and what it refused; operators before and after."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from artifact.errors import ParityMismatch
from graphs.layers import LayerOperators, layer_operators
from graphs.rewriting import Refusal
from graphs.tensorrt_releases import Need, needed_release


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
    """What became of a graph.

    Attributes:
        layers: operators of each layer, afterwards.
        needs: what it needs of TensorRT, afterwards.
        min_tensorrt: the release that was asked for; ``lowered`` operators were then written in others.
    """

    target: str
    nodes_before: int
    nodes_after: int
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    rules: list[RuleReport]
    seconds: float
    layers: LayerOperators
    needs: Need
    min_tensorrt: str | None = None
    lowered: dict[str, int] = field(default_factory=dict)

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
            "layer_operators": self.layers.as_json(),
            "needs_tensorrt": self.needs.as_json(),
            "min_tensorrt": self.min_tensorrt,
            "lowered": self.lowered,
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


@dataclass(frozen=True)
class Before:
    """A graph before it is fused, and when that was."""

    nodes: int
    operators: dict[str, int]
    started: float

    @classmethod
    def of(cls, model: ir.Model) -> Before:
        """Look at a graph, and start the clock."""
        return cls(model.graph.num_nodes(), count_operators(model), time.perf_counter())

    def report(self, model: ir.Model, target: str, rules: list[RuleReport]) -> FusionReport:
        """What became of it."""
        seconds = round(time.perf_counter() - self.started, 3)
        nodes, operators = model.graph.num_nodes(), count_operators(model)
        return FusionReport(target, self.nodes, nodes, self.operators, operators, rules, seconds, layer_operators(model), needed_release(model.graph))


def count_operators(model: ir.Model) -> dict[str, int]:
    """Operator → how many nodes of it, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph).items()))
