"""What each linear costs when it alone is quantised, and what was decided of it: the chart and the table by linear, for page and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from validation.render.gates import Report
from validation.render.heatmap import Field, HeatMap, sample
from validation.render.wording import DASH, metric, number, size

KINDS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
COLUMNS = ("Linear", "Scheme", "KL alone", "± s.e.", "Weight error", "Input peak ÷ median", "Bytes saved", "Reason")
NUMERIC = range(2, 7)
W8A8 = "int8-smoothquant"
"""What is kept out of it is quantised all the same: weight-only."""
NAMED = 3
"""Worst linears that are named in words."""
Linear = dict[str, Any]


@dataclass(frozen=True)
class SensitivityView:
    """One scheme.

    Attributes:
        summary: how many are quantised, and which cost most.
        rows: (whether it was kept, the cells under ``columns``), in the order of the layers.
        headers: the columns as the page's macro takes them.
    """

    scheme: str
    summary: str
    chart: HeatMap
    rows: list[tuple[bool, tuple[str, ...]]]
    columns: tuple[str, ...] = COLUMNS
    headers: tuple[str, ...] = tuple(f">{name}" if index in NUMERIC else name for index, name in enumerate(COLUMNS))

    @property
    def wide(self) -> Markup:
        """The chart for a screen."""
        return Markup(self.chart.wide())

    @property
    def narrow(self) -> Markup:
        """The chart for a phone."""
        return Markup(self.chart.narrow())

    @property
    def legend(self) -> list[tuple[Markup, str]]:
        """What its colours stand for, and the ring."""
        kept = f"kept {'weight-only' if self.scheme == W8A8 else 'in float'}"
        return [*((Markup(drawn), text) for drawn, text in self.chart.legend()), (Markup(sample("none-field", kept=True)), kept)]


def view_sensitivity(report: Report) -> list[SensitivityView]:
    """Every scheme that was measured linear by linear."""
    return [_view(index, entry) for index, entry in enumerate(report.get("sensitivity") or ()) if entry.get("linears")]


def _view(index: int, entry: Report) -> SensitivityView:
    scheme, linears = str(entry["scheme"]), sorted(entry["linears"], key=lambda linear: (linear["layer"], _rank(linear["kind"]), linear["name"]))
    summary = _summary(scheme, linears, entry.get("tokens"))
    fields = {(linear["layer"], linear["kind"]): Field(linear["mean_kl"], linear["kept"], _said(linear, scheme)) for linear in linears}
    kinds = sorted({linear["kind"] for linear in linears}, key=lambda kind: (_rank(kind), kind))
    layers = max(linear["layer"] for linear in linears) + 1
    chart = HeatMap(f"sensitivity-{index}", f"Sensitivity of {scheme} by layer and linear", summary, kinds, layers, fields)
    return SensitivityView(scheme, summary, chart, [(linear["kept"], _row(linear, scheme)) for linear in linears])


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _summary(scheme: str, linears: Sequence[Linear], tokens: Any) -> str:
    kept = [linear for linear in linears if linear["kept"]]
    saved = size(sum(linear["bytes_saved"] or 0 for linear in linears if not linear["kept"]))
    measured = sorted((linear for linear in linears if linear["mean_kl"] is not None), key=lambda linear: -linear["mean_kl"])
    total = sum(linear["mean_kl"] for linear in measured)
    worst = ", ".join(f"{_short(linear)} {number(linear['mean_kl'])}" for linear in measured[:NAMED])
    share = f", {number(100 * sum(linear['mean_kl'] for linear in measured[:NAMED]) / total, digits=2)} % of the sum of all" if total > 0 else ""
    of = f" on {number(tokens)} tokens" if tokens else ""
    said = f"{len(linears) - len(kept)} of {len(linears)} linears are {scheme}, {len(kept)} kept; {saved} saved."
    return said + (f" Most sensitive, mean KL{of}: {worst}{share}." if measured else " None was measured.")


def _short(linear: Linear) -> str:
    return f"layer {linear['layer']} {linear['kind']}"


def _said(linear: Linear, scheme: str) -> str:
    decided = f"kept: {linear['reason'] or 'no reason given'}" if linear["kept"] else scheme
    return f"{_short(linear)}: KL {number(linear['mean_kl'])} ± {number(linear['kl_se'])}\n{decided}"


def _row(linear: Linear, scheme: str) -> tuple[str, ...]:
    numbers = (
        metric(key, linear[key] if isinstance(linear[key], int | float) else None) for key in ("mean_kl", "kl_se", "weight_error", "activation_peak")
    )
    saved = size(0 if linear["kept"] else linear["bytes_saved"])
    return (linear["name"], "kept" if linear["kept"] else scheme, *numbers, saved, linear["reason"] or DASH)
