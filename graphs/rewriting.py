"""Apply one fusion to a graph, count what fired, and say in words why each candidate that is left was refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript.rewriter import pattern

MAX_STEPS = 6
"""How far behind a candidate a match may have broken off to be its reason."""


@dataclass(frozen=True)
class Refusal:
    """A node that could have been fused, and why it was not."""

    node: str
    reason: str


@dataclass(frozen=True)
class FusionResult:
    """What one fusion did to a graph."""

    fired: int
    refused: list[Refusal] = field(default_factory=list)


def apply_fusion(model: ir.Model, rules: pattern.RewriteRuleSet, is_candidate: Callable[[ir.Node], bool]) -> FusionResult:
    """Rewrite what matches, drop what is dead then, and explain the candidates that are left. The model is changed in place."""
    fired = rules.apply_to_model(model)
    common_passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return FusionResult(fired, explain_refusals(model, rules, is_candidate))


def explain_refusals(model: ir.Model, rules: pattern.RewriteRuleSet, is_candidate: Callable[[ir.Node], bool]) -> list[Refusal]:
    """The reason of the best match of each candidate; the graph is not changed."""
    candidates = [node for node in model.graph if is_candidate(node)]
    if not candidates:
        return []
    tracer = NearestMatches()
    rules.apply_to_model(model, tracer=tracer)
    return [Refusal(node.name or node.op_type, tracer.reason(node)) for node in candidates]


class NearestMatches(pattern.MatchingTracer):
    """Keeps, for each node of the graph, the failed match that came furthest with this node in it, or that broke off at it."""

    def __init__(self) -> None:
        super().__init__()
        self._nearest: dict[ir.Node, tuple[int, str]] = {}

    def log(
        self,
        rule: pattern.RewriteRule,
        container: ir.Graph | ir.Function,
        node: ir.Node,
        match_result: pattern.MatchResult,
        status: pattern.MatchStatus,
    ) -> None:
        """Called by the rewriter for every rule and node."""
        if not match_result.nodes:
            return
        score = len(match_result.nodes) + 1000 * int(status)  # a refusal in words is nearer than any difference in structure
        broken_off = [found for found in match_result.failure_nodes_and_values if isinstance(found, ir.Node)]
        for matched in {*match_result.nodes, *broken_off}:
            if score > self._nearest.get(matched, (0, ""))[0]:
                self._nearest[matched] = (score, in_words(match_result))

    def reason(self, node: ir.Node) -> str:
        """Why a node was not fused: the record of the node, or of the nearest node that it leads to."""
        reached = [node]
        for _ in range(MAX_STEPS):
            known = [self._nearest[found] for found in reached if found in self._nearest]
            if known:
                return max(known)[1]
            reached = list({user: None for found in reached for output in found.outputs for user, _ in output.uses()})
        return f"nothing that is fused reads this {node.op_type}"


def in_words(match: pattern.MatchResult) -> str:
    """The rewriter's reason for a failed match, as a sentence about the graph."""
    where = next((str(found.name) for found in match.failure_nodes_and_values if found is not None and found.name), "")
    differs = re.match(r"OpType mismatch: expected (\w+), got (\w+)", match.reason)
    if differs:
        return f"its structure differs: {where or 'a node'} is {differs[2]}, expected {differs[1]}"
    for internal, words in _WORDS.items():
        if match.reason.startswith(internal):
            return f"{words} (near {where})" if where else words
    return f"{match.reason} ({where})" if where else match.reason


_WORDS = {
    "Matched nodes have other uses": "a value between its first and last node is used elsewhere too",
    "Mismatch: Computed node pattern does not match": "an operand is fed or stored where it should be computed",
    "Binding failure": "two operands should be one value, and are not",
    "Node output index mismatch": "the outputs of a node are used in another order",
    "Attribute": "an attribute differs",
    "Number of inputs": "a node has more inputs than expected",
}
"""How the rewriter's own reasons begin → what they mean for a reader of the report."""
