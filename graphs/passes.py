"""One pass of a pipeline as data, and how a list of them is run: claims checked, rules applied, counts compared."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, cast

import onnx_ir as ir

from artifact.progress import Progress, silent
from graphs.cleanup import merge
from graphs.contract import CONNECTED, Claim, check_claims
from graphs.fusions._reading import Reader, apply_reader
from graphs.report import RuleReport
from graphs.rewriting import FusionResult, apply_fusion

logger = logging.getLogger(__name__)
GROUPED_NOTE = "ONNX Runtime takes several new tokens over a past in a batch of one alone, and a mask of as many columns as past and new tokens"
NOT_PACKED = "not tried: the weights lie as the checkpoint stores them (--weights reference), and a packed weight would be a copy"


class ModelShape(Protocol):
    """What counts depend on; a config has it, and so has the shape that is read from a foreign graph."""

    @property
    def num_hidden_layers(self) -> int: ...  # noqa: D102  # as in config.json


@dataclass(frozen=True)
class Fusion:
    """One pass.

    Attributes:
        rule: name in the report.
        module: the file: ``RULES`` and ``is_candidate``, or a ``Reader`` for graphs that others made.
        whole: how often it fires in a whole model; None where only the graph can say: once for each candidate.
        requires: what must hold before it.
        ensures: what holds after it.
        makes: operator of which a foreign graph may hold some already; they are not expected again, unless they are candidates.
        needs_layout: whether weights must lie as this toolkit stores them; with a checkpoint's own files it is not tried.
        optional: whether a graph is whole without it: what is refused is said, and expected as often as it fired.
        merged: whether equal computations must be one before it.
        note: what whoever runs the graph must know where it fired.
    """

    rule: str
    module: ModuleType
    whole: Callable[[ModelShape], int] | None
    requires: tuple[Claim, ...] = ()
    ensures: tuple[Claim, ...] = ()
    makes: str | None = None
    needs_layout: bool = False
    optional: bool = False
    merged: bool = False
    note: str | None = None

    def expected(self, model: ir.Model, shape: ModelShape) -> int:
        """How often it must fire in this graph."""
        if self.whole is not None and self.makes is None:
            return self.whole(shape)
        candidates = {node for node in model.graph if self.module.is_candidate(node)}
        if self.whole is None:
            return len(candidates)
        return self.whole(shape) - sum(1 for node in model.graph if node.op_type == self.makes and node.domain == "" and node not in candidates)

    def apply(self, model: ir.Model) -> FusionResult:
        """Rewrite what matches, in place."""
        if hasattr(self.module, "RULES"):
            return apply_fusion(model, self.module.RULES, self.module.is_candidate)
        return apply_reader(model, cast("Reader", self.module))


def run_passes(
    model: ir.Model, fusions: tuple[Fusion, ...], shape: ModelShape, *, own_layout: bool = True, progress: Progress = silent
) -> list[RuleReport]:
    """Run passes in order, in place.

    Claims are checked for as long as every pass has fired as often as it must: after a partial one, nothing can be relied on, and what the rules
    themselves object to decides.

    Args:
        model: changed in place; weights are neither read nor copied.
        fusions: the passes.
        shape: of the whole model.
        own_layout: whether the weights lie as this toolkit stores them.
        progress: told of each pass.

    Raises:
        FusionError: a claim does not hold; the pass and the node are named.
    """
    rules: list[RuleReport] = []
    for done, fusion in enumerate(fusions):
        progress(f"fusing {fusion.rule}", done, len(fusions))
        if fusion.needs_layout and not own_layout:
            rules.append(RuleReport(fusion.rule, 0, 0, [], NOT_PACKED))
            continue
        if all(rule.passed for rule in rules):
            check_claims(fusion.requires, model, fusion.rule, "requires")
        if fusion.merged:
            merge(model)
        expected = fusion.expected(model, shape)
        result = fusion.apply(model)
        expected = result.fired if fusion.optional else expected
        rules.append(RuleReport(fusion.rule, result.fired, expected, result.refused, fusion.note if result.fired else None))
        if all(rule.passed for rule in rules):
            check_claims((CONNECTED, *fusion.ensures), model, fusion.rule, "ensures")
        logger.debug("%s fired %d times, %d expected, %d refused", fusion.rule, result.fired, expected, len(result.refused))
    progress("fused", len(fusions), len(fusions))
    return rules
