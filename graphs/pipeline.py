"""Which fusions run for which target, in which order, and the report of what they did."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.errors import FusionError, ParityMismatch
from artifact.graph_file import load_graph
from artifact.io_spec import KvCache
from artifact.manifest import kv_cache_of, require_artifact
from artifact.progress import Progress, silent
from artifact.steps import StepContext, require
from graphs.cleanup import clean_up
from graphs.fusions import attention, constant_shape, pack_gate_up, pack_qkv, rms_norm, rotary, static_attention
from graphs.rewriting import FusionResult, Refusal, apply_fusion

logger = logging.getLogger(__name__)
NOT_PACKED = "not tried: the weights lie as the checkpoint stores them (--weights reference), and a packed weight would be a copy"
OUTPUTS = {"tensorrt": "fused.onnx"}


@dataclass(frozen=True)
class Fusion:
    """One entry of a pipeline.

    Attributes:
        rule: name in the report.
        module: the file that holds ``RULES`` and ``is_candidate``.
        expected: how often it fires in a whole model.
        needs_layout: whether weights must lie as this toolkit stores them; with a checkpoint's own files it is not tried.
    """

    rule: str
    module: ModuleType
    expected: Callable[[LlamaConfig], int]
    needs_layout: bool = False


TENSORRT = (
    Fusion("rms_norm", rms_norm, lambda config: 2 * config.num_hidden_layers + 1),
    Fusion("rotary", rotary, lambda config: 2 * config.num_hidden_layers),
    Fusion("attention", attention, lambda config: config.num_hidden_layers),
    Fusion("constant_shape", constant_shape, lambda config: 4 * config.num_hidden_layers),
    Fusion("pack_qkv", pack_qkv, lambda config: config.num_hidden_layers, needs_layout=True),
    Fusion("pack_gate_up", pack_gate_up, lambda config: config.num_hidden_layers, needs_layout=True),
)
"""Operators that TensorRT's parser has and its compiler fuses.

rms_norm, rotary    require plain operations; ensure one node each.
attention           requires a scaled query and a boolean mask; ensures that no key or value is expanded.
constant_shape      requires fused attention (repeated heads have shapes that no constant can say); ensures that only the mask reads sizes.
pack_qkv            requires constant shapes; ensures one linear for query, key and value, split between heads.
pack_gate_up        requires plain operations; ensures one linear for gate and up, split on a new axis.
"""

STATIC = (*TENSORRT, Fusion("static_attention", static_attention, lambda config: config.num_hidden_layers))
"""The same for a static cache.

static_attention    requires fused attention that reads a cache written in place; ensures that lengths mask it, and that no mask is left.
"""

PIPELINES = {"tensorrt": TENSORRT}
STATIC_PIPELINES = {"tensorrt": STATIC}


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


def fuse_model(
    model: ir.Model,
    config: LlamaConfig,
    *,
    target: str = "tensorrt",
    kv_cache: KvCache = "dynamic",
    own_layout: bool = True,
    progress: Progress = silent,
) -> FusionReport:
    """Fuse a traced graph in place; weights are neither read nor copied.

    ``own_layout`` is False where the weights lie as somebody else stored them.

    Raises:
        FusionError: there is no such target, or not for this cache form.
    """
    fusions = _pipeline(target, kv_cache)
    start, nodes_before, ops_before = time.perf_counter(), model.graph.num_nodes(), _operators(model)
    rules = []
    for done, fusion in enumerate(fusions):
        progress(f"fusing {fusion.rule}", done, len(fusions))
        if fusion.needs_layout and not own_layout:
            rules.append(RuleReport(fusion.rule, 0, 0, [], NOT_PACKED))
            continue
        result: FusionResult = apply_fusion(model, fusion.module.RULES, fusion.module.is_candidate)
        rules.append(RuleReport(fusion.rule, result.fired, fusion.expected(config), result.refused))
        logger.debug("%s fired %d times, %d expected, %d refused", fusion.rule, result.fired, rules[-1].expected, len(result.refused))
    clean_up(model)
    seconds = round(time.perf_counter() - start, 3)
    progress("fused", len(fusions), len(fusions))
    logger.info("fused %d nodes to %d in %.1f s", nodes_before, model.graph.num_nodes(), seconds)
    return FusionReport(target, nodes_before, model.graph.num_nodes(), ops_before, _operators(model), rules, seconds)


def fuse_artifact(step: StepContext, *, target: str = "tensorrt", allow_partial: bool = False) -> dict[str, Any]:
    """Write ``fused.onnx`` from ``traced.onnx``; the weights stay where they are.

    Returns:
        nodes_before, nodes_after, target, passed, seconds, rules, ops_before, ops_after.

    Raises:
        ParityMismatch: a rule fired another number of times than the model's shape says, and ``allow_partial`` is not given; nothing is written.
        FusionError: there is no such target.
        ArtifactError: the folder is no artifact, or has no traced.onnx.
    """
    described = require_artifact(step.artifact, "fuse")["model"]
    config, kv_cache, own_layout = LlamaConfig(**described["config"]), kv_cache_of(described), described.get("weights") != "reference"
    _pipeline(target, kv_cache)
    model = load_graph(require(step.artifact, "traced.onnx"))
    report = fuse_model(model, config, target=target, kv_cache=kv_cache, own_layout=own_layout, progress=step.progress)
    if not allow_partial:
        check_complete(report)
    with step.write(OUTPUTS[target]) as temporary:
        ir.save(model, temporary)
    return report.as_json()


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


def _pipeline(target: str, kv_cache: KvCache) -> tuple[Fusion, ...]:
    pipelines = STATIC_PIPELINES if kv_cache == "static" else PIPELINES
    if target not in pipelines:
        form = " with a static cache" if kv_cache == "static" else ""
        raise FusionError(f"no fusions for target {target!r}{form}; there are: {', '.join(pipelines)}")
    return pipelines[target]


def _operators(model: ir.Model) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in model.graph).items()))
