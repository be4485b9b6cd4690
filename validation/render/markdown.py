"""The report as Markdown for the summary of a CI job: verdict, what failed, one table by stage, engines, what did not run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from validation.render.against import COLUMNS as AGAINST_COLUMNS
from validation.render.against import view_against
from validation.render.baseline import COLUMNS as BASELINE_COLUMNS
from validation.render.baseline import NUMBERS as BASELINE_NUMBERS
from validation.render.baseline import view_baseline
from validation.render.bisect import COLUMNS as BISECT_COLUMNS
from validation.render.bisect import view_bisect
from validation.render.budget import COLUMNS as BUDGET_COLUMNS
from validation.render.budget import view_budget
from validation.render.execution import execution_line
from validation.render.fusion import COLUMNS as FUSION_COLUMNS
from validation.render.fusion import view_fusion
from validation.render.gates import METRICS, Check, Metric, Report, counts, failing, gate_of, gate_text, value_text
from validation.render.quality import QualityTable, view_quality
from validation.render.sensitivity import COLUMNS as SENSITIVITY_COLUMNS
from validation.render.sensitivity import NUMERIC, view_sensitivity
from validation.render.wording import DASH, MARKS, cache_form, count, duration, label, limit, metric, number, shorten, size

ICONS = {True: "✅", False: "❌", None: "⚪"}

LONGEST_LAYER = 1000
"""Characters of one line of operators."""

# A character reference is text and never structure (CommonMark §2.5), in a table cell too, where a backslash is not enough everywhere.
# Underscores and tildes inside a word, hyphens and dots are plain text already.
_MARKUP = re.compile(r"[&<>|`*\[\]{}\\!#$@]|(?<!\w)_|_(?!\w)|~|:(?=//)|\.(?<=www\.)|^[-+=]|(?<=^\d)[.)]", re.IGNORECASE)


def escape(text: object, limit: int = 120) -> str:
    """A stranger's string as one line of plain Markdown text, at most ``limit`` characters."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", shorten(text, limit))


def render_markdown(report: Report) -> str:
    """Markdown with GitHub tables; strings are escaped, so that a name can't break a table or bring in HTML."""
    blocks = [
        _head(report),
        _failing(report),
        _against(report),
        _baseline(report),
        _stages(report),
        _bisect(report),
        _budget(report),
        _quality(report),
    ]
    blocks += [_sensitivity(report), _warnings(report), _fusion(report), _engines(report), _not_run(report), _foot(report)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(report: Report) -> str:
    model, text, floor = (report.get(key) or {} for key in ("model", "text", "floor"))
    tally = counts(report)
    facts = [
        f"**{escape(model.get('name'))}** ({count(model.get('parameters'))} parameters, {escape(model.get('dtype'))}, {escape(cache_form(report))})",
        f"text {escape(text.get('name'))}, {number(text.get('scored_tokens'))} scored tokens",
        f"float16 floor {number(floor.get('mean_abs'))}" + (f" ({escape(floor['reason'])})" if floor.get("reason") else ""),
        f"{tally[True]} checks passed, {tally[False]} failed",
    ]
    if line := execution_line(report):
        facts.append(escape(line))
    if graph := report.get("graph"):
        facts.append(f"judged as {escape(graph['precision'])}: {escape(graph['precision_found'])}")
    return f"## {ICONS[report.get('passed')]} Parity {escape(report.get('verdict'))}\n\n{escape(report.get('headline'))}\n\n" + " · ".join(facts)


def _failing(report: Report) -> str:
    rows = [(escape(group), *_failing_cells(check)) for group, check in failing(report)]
    return _section("Failing checks", _table(("Stage", "Check", "Where", "Value", "Must be", "Why"), rows)) if rows else ""


def _failing_cells(check: Check) -> tuple[str, ...]:
    name = check["check"]
    value = metric(name, check.get("value"), against=check.get("limit"))
    texts = (escape(label(name)), escape(check.get("where") or DASH))
    return (*texts, _safe(value, check.get("value")), _safe(limit(name, check), check.get("limit")), escape(check.get("reason") or DASH))


def _against(report: Report) -> str:
    view = view_against(report)
    if view is None:
        return ""
    first, *lines = (escape(line, LONGEST_LAYER) for line in view.lines)
    rows = [(f"{MARKS[passed]} {name}", value, wanted, *map(escape, others)) for passed, (name, value, wanted, *others) in view.rows]
    said = "\n".join((f"{MARKS[view.passed]} {first}", "", *(f"- {line}" for line in lines)))
    return _section(view.title, f"{said}\n\n{_table(AGAINST_COLUMNS, rows)}" if rows else said)


def _baseline(report: Report) -> str:
    view = view_baseline(report)
    if view is None:
        return ""
    rows = [(f"{MARKS[passed]} {escape(name)}", *_plain_numbers(cells)) for passed, (name, *cells) in view.rows]
    notes = "\n".join(f"- {escape(note)}" for note in view.notes)
    table = _table(BASELINE_COLUMNS, rows) if rows else ""
    return _section("Against the baseline", "\n\n".join(filter(None, (f"{MARKS[view.passed]} {escape(view.summary, LONGEST_LAYER)}", table, notes))))


def _plain_numbers(cells: Sequence[str]) -> tuple[str, ...]:
    """The cells of a baseline's row after its first; numbers stay readable in the source."""
    return tuple(cell if index in BASELINE_NUMBERS else escape(cell) for index, cell in enumerate(cells, start=1))


def _safe(text: str, source: object) -> str:
    """A written value: numbers of ours stay readable in the source, a stranger's string is escaped."""
    return escape(text) if isinstance(source, str) else text


def _stages(report: Report) -> str:
    rows = [_stage(stage) for stage in report.get("stages") or ()]
    if not rows:
        return _section("Stages", "No stage ran.")
    return _section("Stages", _table(("Stage", *(column.label for column in METRICS)), rows, right_from=1))


def _stage(stage: Report) -> tuple[str, ...]:
    return (f"{MARKS[stage.get('passed')]} **{escape(stage['stage'])}**", *(_cell(stage, column) for column in METRICS))


def _cell(stage: Report, column: Metric) -> str:
    gate, value = gate_of(stage, column), _safe(value_text(stage, column), stage.get(column.key))
    if gate is None:
        return value
    text = gate_text(gate, column)
    return f"{value} {MARKS[gate['passed']]} {escape(text) if column.key == 'mean_kl' else _safe(text, gate.get('limit'))}"


def _bisect(report: Report) -> str:
    view = view_bisect(report)
    if view is None:
        return ""
    table = _table(BISECT_COLUMNS, [tuple(escape(cell, LONGEST_LAYER) for cell in cells) for cells in view.rows]) if view.rows else ""
    lines = "\n".join(f"- **{escape(stage)}**: {escape(text, LONGEST_LAYER)}" for stage, text in view.lines)
    return _section("Narrowed to the node", "\n\n".join(filter(None, (table, lines))))


def _budget(report: Report) -> str:
    view = view_budget(report)
    if view is None:
        return ""
    rows = [(escape(stage), *(_safe(text, None) for text in cells)) for stage, *cells in view.rows]
    return _section("Error budget", f"{escape(view.how, LONGEST_LAYER)}\n\n{_table(BUDGET_COLUMNS, rows)}")


def _quality(report: Report) -> str:
    view = view_quality(report)
    if view is None:
        return ""
    said = "\n".join(f"- **{escape(stage)}**: {escape(text, LONGEST_LAYER)}" for stage, text in view.words)
    tables = [_quality_table(view.columns, table) for table in view.tables]
    return _section("Quality", "\n\n".join([said, *tables, escape(view.how, LONGEST_LAYER)]))


def _quality_table(columns: Sequence[str], table: QualityTable) -> str:
    rows = [(name, *(_safe("; ".join((cell.value, *cell.notes)), None) for cell in cells)) for name, cells in table.rows]
    return f"{escape(table.caption)}\n\n" + _table(("Measure", *map(escape, columns)), rows, right_from=1)


def _sensitivity(report: Report) -> str:
    """What stands out by scheme, and the linears that were kept; the others are in the JSON and on the page."""
    blocks = []
    for view in view_sensitivity(report):
        kept = [tuple(cell if index in NUMERIC else escape(cell) for index, cell in enumerate(cells)) for is_kept, cells in view.rows if is_kept]
        blocks += [escape(view.summary, LONGEST_LAYER), *([_table(SENSITIVITY_COLUMNS, kept)] if kept else [])]
    return _section("Sensitivity", "\n\n".join(blocks)) if blocks else ""


def _fusion(report: Report) -> str:
    view = view_fusion(report)
    if view is None:
        return ""
    rows = [(f"{MARKS[passed]} {escape(name)}", *map(escape, cells)) for passed, (name, *cells) in view.rules]
    layers = "\n".join(f"- {escape(line, LONGEST_LAYER)}" for line in view.layers)
    return _section("Fusion", "\n\n".join(filter(None, (escape(view.summary), _table(FUSION_COLUMNS, rows) if rows else "", layers))))


def _engines(report: Report) -> str:
    rows = [_engine(engine) for engine in report.get("engines") or ()]
    columns = ("Plan", "Precision", "Target", "Size", "Bytes per weight", "Built in", "Audit")
    return _section("Engines", _table(columns, rows)) if rows else ""


def _engine(engine: Report) -> tuple[str, ...]:
    audit: dict[str, Any] = engine.get("audit") or {}
    names = ("file", "precision", "target")
    numbers = (size(engine.get("bytes")), number(engine.get("bytes_per_weight")), duration(engine.get("build_s")))
    return (*(escape(engine.get(name) or DASH) for name in names), *numbers, MARKS[audit.get("passed")])


def _warnings(report: Report) -> str:
    entries = [f"- **{escape(stage['stage'])}**: {escape(text)}" for stage in report.get("stages") or () for text in stage.get("warnings") or ()]
    return _section("Warnings", "\n".join(entries)) if entries else ""


def _not_run(report: Report) -> str:
    entries = [f"- **{escape(entry['stage'])}**: {escape(entry['reason'])}" for entry in report.get("not_run") or ()]
    return _section("Not run", "\n".join(entries)) if entries else ""


def _foot(report: Report) -> str:
    return f"{MARKS[True]} passed · {MARKS[False]} failed · {DASH} not measured · {escape(report.get('created'))} · {duration(report.get('seconds'))}"


def _section(title: str, body: str) -> str:
    return f"### {title}\n\n{body}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right_from: int = 99) -> str:
    rule = ["---:" if index >= right_from else "---" for index in range(len(columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))
