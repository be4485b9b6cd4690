"""The report as one self-contained HTML page: no scripts, nothing loaded, autoescaped, readable on paper and on a phone.

This file says what stands on the page (numbers as strings, charts as SVG); `report.html.j2` says where, `report.css.j2` how it looks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from engines.plan_words import layer_lines
from validation.render import against, wording
from validation.render.bars import interval, range_bar, range_state
from validation.render.baseline import COLUMNS as BASELINE_COLUMNS
from validation.render.baseline import NUMBERS, view_baseline
from validation.render.bisect import COLUMNS as BISECT_COLUMNS
from validation.render.bisect import view_bisect
from validation.render.budget import COLUMNS as BUDGET_COLUMNS
from validation.render.budget import view_budget
from validation.render.charts import NARROW, WIDE, LineChart, Reference, Series, swatch
from validation.render.execution import execution_line
from validation.render.fusion import COLUMNS as FUSION_COLUMNS
from validation.render.fusion import view_fusion
from validation.render.gates import METRICS, Metric, Report, counts, failing, gate_of, gate_text, groups, value_text
from validation.render.quality import FLOAT16, view_quality
from validation.render.sensitivity import view_sensitivity

TONES = {True: "good", False: "bad", None: "none"}
"""CSS classes of a verdict."""

NO_GATE: dict[str, Any] = {"check": None, "limit": None, "passed": None}

SCENARIO_COLUMNS = (
    ("positions", "Positions"), ("judged", "In the means"), ("max_abs", "Max abs"), ("mean_abs", "Mean abs"), ("cache_max_abs", "Cache max abs"),
    ("mean_kl", "Mean KL"), ("top1_agreement", "Top-1"), ("decisive_disagreements", "Decisive disagreements"),
)  # fmt: skip

PART_COLUMNS = (
    ("positions", "Positions"), ("mean_abs", "Mean abs"), ("noise_ratio", "Noise ratio"), ("self_consistency", "Against itself"),
    ("spread", "Spread"),
)  # fmt: skip


def render_html(report: Report) -> str:
    """The page. Strings of the report are escaped by the template, and stripped of what no page can carry."""
    return _environment().get_template("report.html.j2").render(_view(report))


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {name: getattr(wording, name) for name in ("number", "metric", "limit", "label", "shorten", "breakable")}
    environment.globals |= {
        "marks": wording.MARKS, "words": wording.WORDS, "tones": TONES, "heads": [f">{column.label}" for column in METRICS],
        "definitions": [(column.label, column.explanation) for column in METRICS],
        "scenario_columns": SCENARIO_COLUMNS, "scenario_heads": [f">{name}" for _, name in SCENARIO_COLUMNS],
        "baseline_columns": BASELINE_COLUMNS, "baseline_heads": [">" * (index in NUMBERS) + name for index, name in enumerate(BASELINE_COLUMNS)],
        "against_columns": against.COLUMNS, "against_heads": [">" * (index in (1, 2)) + name for index, name in enumerate(against.COLUMNS)],
        "bisect_columns": BISECT_COLUMNS, "budget_columns": BUDGET_COLUMNS, "fusion_columns": FUSION_COLUMNS,
        "part_columns": PART_COLUMNS, "part_heads": [f">{name}" for _, name in PART_COLUMNS],
    }  # fmt: skip
    return environment


def _finalize(value: Any) -> Any:
    """Every value on its way into the page: null is a dash, text is cleaned, markup of our own passes."""
    if value is None:
        return wording.DASH
    return wording.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _view(report: Report) -> dict[str, Any]:
    """What the template prints; a part that the report lacks is empty."""
    lists = {key: list(report.get(key) or ()) for key in ("stages", "not_run", "tolerances")}
    stages, model = lists["stages"], report.get("model") or {}
    return {
        **lists, **{key: report.get(key) for key in ("verdict", "headline", "passed")}, "model": {key: model.get(key) for key in ("name", "dtype")},
        "cache": wording.cache_form(report), "facts": _facts(report), "failing": failing(report), "groups": groups(report),
        "rows": [_row(stage) for stage in stages], "against": against.view_against(report), "baseline": view_baseline(report),
        "budget": view_budget(report), "bisect": view_bisect(report),
        "charts": _charts(report, stages), "quality": view_quality(report), "sensitivity": view_sensitivity(report),
        "ranges": _ranges(stages), "intervals": _intervals(stages),
        "warnings": [(stage["stage"], text) for stage in stages for text in stage.get("warnings") or ()],
        "fusion": view_fusion(report), "engines": [_engine(engine) for engine in report.get("engines") or ()],
        "configuration": _flat(model.get("config") or {}),
        "versions": _flat(report.get("versions") or {}), "machine": _flat(report.get("machine") or {}), "provenance": _provenance(report),
    }  # fmt: skip


def _facts(report: Report) -> list[tuple[str, str, Any]]:
    """(name, value, note) of what a reader asks first."""
    model, text, floor, stored = (report.get(key) or {} for key in ("model", "text", "floor", "checksums"))
    tally = counts(report)
    failed = f", {tally[False]} failed" if tally[False] else ""
    verified = f"{wording.number(stored['verified'])} stored checksums verified" if stored else "stored checksums not checked"
    name, kind = text.get("name") or wording.DASH, text.get("kind") or "text"
    return [
        ("Model", f"{wording.count(model.get('parameters'))} parameters", model.get("source")),
        ("Text", f"{wording.number(text.get('scored_tokens'))} tokens scored", name if kind == "text" or kind in name else f"{name}, {kind}"),
        ("Float16 floor", f"{wording.number(floor.get('mean_abs'))} mean abs", floor.get("reason") or floor.get("source")),
        ("Checks", f"{tally[True]} passed{failed}", verified),
        ("Took", wording.duration(report.get("seconds")), execution_line(report) or report.get("created")),
    ]


def _row(stage: Report) -> dict[str, Any]:
    """A stage of the table: its name, its verdict and one cell a metric."""
    named = {"name": stage["stage"], "backend": stage.get("backend"), "passed": stage.get("passed")}
    return named | {"cells": [_cell(stage, column) for column in METRICS]}


def _cell(stage: Report, column: Metric) -> dict[str, Any]:
    gate, layer = gate_of(stage, column), stage.get("worst_local_layer")
    note = f"layer {layer}" if column.key == "worst_local_ratio" and layer is not None else None
    cell = {"label": column.label, "missing": stage.get(column.key) is None, "value": wording.unbroken(value_text(stage, column))}
    cell |= {"note": note and wording.unbroken(note), "gate": None, "passed": None, "reason": "not measured"}
    if gate is None:
        return cell
    return cell | {"gate": wording.unbroken(gate_text(gate, column)), "passed": gate["passed"], "reason": gate.get("reason") or cell["reason"]}


def _charts(report: Report, stages: list[Report]) -> list[dict[str, Any]]:
    """The line charts that have something to show, each in two widths, with its numbers as a table."""
    floor, float16 = report.get("floor") or {}, report.get("float16") or {}
    own = (Series(FLOAT16, float16["hidden_errors"]),) if float16.get("hidden_errors") else ()
    hidden = LineChart("hidden", "Error carried from layer to layer", "layer", (*_series(stages, "hidden_errors"), *own), mark_worst=False)
    lines = _series(stages, "local_ratios")
    local = LineChart("local", "Error each layer adds", "layer", lines, _references(lines))
    floors = (Reference("float16 floor", floor["mean_abs"]),) if floor.get("mean_abs") is not None else ()
    decode = LineChart("decode", "Error by decode step", "step", _series(stages, "decode_errors"), floors, first=1, mark_worst=False)
    captions = {
        "local": "Error of a layer’s output, fed the reference’s hidden state, divided by the error of the same layer rounded to float16. "
        "A ratio of 1 is as good as rounding alone.",
        "hidden": "Error of the hidden state after each layer, as a share of its length, every operation rounded to float16. The line float16 is "
        "the reference rounded likewise: what a stage has above it is its own.",
        "decode": "Mean |logit − float32 reference| at each step of cached, teacher-forced decoding. A line that climbs would mean an error that "
        "the cache carries along.",
    }
    return [_chart(chart, captions[chart.key]) for chart in (local, hidden, decode) if chart.measured]


def _chart(chart: LineChart, caption: str) -> dict[str, Any]:
    rows = [(index + chart.first, [wording.number(_at(line, index)) for line in chart.series]) for index in range(chart.length)]
    return {
        "key": chart.key, "title": chart.title, "unit": chart.unit, "caption": caption + (" Logarithmic axis." if chart.scale().logarithmic else ""),
        "wide": Markup(chart.svg(WIDE)), "narrow": Markup(chart.svg(NARROW)), "rows": rows,
        "legend": [(Markup(swatch(style)), line.name) for style, line in enumerate(chart.series)],
    }  # fmt: skip


def _at(line: Series, index: int) -> float | None:
    return line.values[index] if index < len(line.values) else None


def _series(stages: Iterable[Report], key: str) -> tuple[Series, ...]:
    return tuple(Series(stage["stage"], stage[key], limit=_limit(stage, key)) for stage in stages if stage.get(key))


def _limit(stage: Report, key: str) -> float | None:
    """The limit that each value of a line must keep; decode steps have none."""
    limits = [check["limit"] for check in stage.get("checks") or () if check["check"] == "worst_local_ratio"] if key == "local_ratios" else []
    return limits[0] if limits else None


def _references(lines: Iterable[Series]) -> tuple[Reference, ...]:
    """The different limits of some lines, each drawn once."""
    return tuple(Reference("limit", limit) for limit in sorted({line.limit for line in lines if line.limit is not None}))


def _ranges(stages: list[Report]) -> list[dict[str, Any]]:
    return [
        {"name": stage["stage"], "tensor": stage.get("range_tensor"), "peak": peak, "bar": Markup(range_bar(peak)), "state": range_state(peak)}
        for stage in stages
        if (peak := stage.get("range_peak")) is not None
    ]


def _intervals(stages: list[Report]) -> list[dict[str, Any]]:
    """Perplexity by stage; all bars share one axis, from the smallest to the largest of values, limits and zero."""
    column = next(column for column in METRICS if column.key == "perplexity_increase_pct")
    rows = [(stage, gate_of(stage, column) or NO_GATE) for stage in stages if stage.get("perplexity") is not None]
    ends = [0.0, *(gate["limit"] for _, gate in rows if gate.get("limit") is not None)]
    for stage, _ in rows:
        value, error = (stage.get(key) or 0.0 for key in ("perplexity_increase_pct", "perplexity_se_pct"))
        ends += [value - 2 * error, value + 2 * error]
    span = (min(ends), max(ends)) if max(ends) > min(ends) else (0.0, 1.0)
    return [_interval(stage, gate, span) for stage, gate in rows]


def _interval(stage: Report, gate: Report, span: tuple[float, float]) -> dict[str, Any]:
    increase, error = stage.get("perplexity_increase_pct"), stage.get("perplexity_se_pct")
    bar = interval(increase, error, gate.get("limit"), span)
    texts = {"perplexity": wording.number(stage["perplexity"], digits=4), "increase": wording.plus_minus(increase, error)}
    return texts | {"name": stage["stage"], "gate": gate, "bar": Markup(bar)}


def _engine(engine: Report) -> dict[str, Any]:
    """A plan of the table, with its kernels (most frequent first) and profiles."""
    kernels = sorted((engine.get("kernels") or {}).items(), key=lambda item: (-item[1], item[0]))
    memory, audit = engine.get("peak_anonymous_mb"), engine.get("audit") or {}
    return {
        "file": engine["file"], "passed": audit.get("passed"), "kernels": kernels, "profiles": _flat(engine.get("profiles") or {}),
        "layers": layer_lines(engine.get("kernels_by_layer") or {}),
        "cells": [
            *((name.capitalize(), engine.get(name), "any") for name in ("precision", "target", "backend")),
            ("Size", wording.size(engine.get("bytes")), "n"), ("Bytes per weight", wording.number(engine.get("bytes_per_weight")), "n"),
            ("Built in", wording.duration(engine.get("build_s")), "n"), ("Peak memory", wording.size(memory and memory * 1e6), "n"),
        ],
    }  # fmt: skip


def _provenance(report: Report) -> list[tuple[str, str]]:
    model, text = report.get("model") or {}, report.get("text") or {}
    named = {"artifact": report.get("artifact"), "model fingerprint": model.get("fingerprint"), "model format": model.get("format")}
    graph = {key: value for key, value in (report.get("graph") or {}).items() if key != "hashes"}
    return _flat(named | {"text": text.get("sha256")}) + _flat(graph, "graph") + _flat(report.get("hashes") or {})


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """A nested record as (path, text) pairs; shapes stay on one line, records with a name go by it.

    ``[{"name": "decode", "input_ids": [[1, 1], [4, 1]]}]`` → ``[("decode input_ids", "1×1, 4×1")]``
    """
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        value = {_name(item, index): _nameless(item) for index, item in enumerate(value)}
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{path} {key}".strip())]
    return [(path, _plain(value))]


def _name(item: Any, index: int) -> str:
    return str(item["name"]) if isinstance(item, dict) and "name" in item else str(index)


def _nameless(item: Any) -> Any:
    return {key: value for key, value in item.items() if key != "name"} if isinstance(item, dict) else item


def _plain(value: Any) -> str:
    """A setting as it was written: no rounding, because it is not a measurement."""
    if isinstance(value, list | tuple):
        return ", ".join("×".join(map(_plain, item)) if isinstance(item, list | tuple) else _plain(item) for item in value)
    return wording.DASH if value is None else str(value)
