"""The fusion of the report: what each rule did, and what the fused graph computes each layer with; as text, for page and Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from validation.render.gates import Report
from validation.render.wording import DASH, number

COLUMNS = ("Rule", "Fired", "Expected", "Refused", "First reason")


@dataclass(frozen=True)
class FusionView:
    """What a page shows of a fusion.

    Attributes:
        summary: nodes before and after, and what the graph needs of TensorRT.
        rules: (whether it fired as often as it must, the cells under ``COLUMNS``).
        layers: operators by layer, in lines.
    """

    summary: str
    rules: list[tuple[bool, tuple[str, ...]]]
    layers: list[str]


def view_fusion(report: Report) -> FusionView | None:
    """The fusion of an artifact; None where nothing was fused."""
    fusion: dict[str, Any] | None = report.get("fusion")
    if not fusion:
        return None
    needs = (fusion.get("needs_tensorrt") or {}).get("words")
    summary = f"{number(fusion.get('nodes_before'))} → {number(fusion.get('nodes_after'))} nodes" + (f"; {needs}" if needs else "")
    layers = list((fusion.get("layer_operators") or {}).get("lines") or ())
    return FusionView(summary, [_rule(rule) for rule in fusion.get("rules") or ()], layers)


def _rule(rule: Report) -> tuple[bool, tuple[str, ...]]:
    refused = rule.get("refused") or []
    reason = f"{refused[0]['node']}: {refused[0]['reason']}" if refused else rule.get("note") or DASH
    return rule["fired"] == rule["expected"], (rule["rule"], number(rule["fired"]), number(rule["expected"]), number(len(refused)), reason)
