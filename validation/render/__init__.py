"""The parity report for its four readers: JSON for programs, Markdown for a job summary, JUnit for CI, one HTML page for people.

Every renderer is a pure function of the report dict; only `write_reports` touches files.
"""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

from artifact.steps import StepContext
from validation.render.gates import Report
from validation.render.html import render_html
from validation.render.junit import render_junit
from validation.render.markdown import render_markdown

__all__ = ["render_all", "render_html", "render_json", "render_junit", "render_markdown", "write_reports"]

KEYS = (
    "schema", "schema_id", "created", "artifact", "passed", "verdict", "headline", "baseline", "against", "seconds", "model", "cache", "execution",
    "text", "texts", "floor", "float16", "stages", "error_budget", "not_run", "fusion", "sensitivity", "engines", "checksums", "tolerances",
    "versions", "machine", "hashes", "seconds_by_part",
)  # fmt: skip
"""Top-level keys as they stand in the file, the verdict first; others follow by name, so that two reports differ only where they differ."""


def write_reports(step: StepContext, report: Report) -> None:
    """Write ``reports/parity.{json,md,html,xml}``; all four are rendered before the first is written.

    Raises:
        ValueError: a number of the report is NaN or infinite.
    """
    for suffix, text in render_all(report).items():
        with step.write(f"reports/parity.{suffix}") as path:
            path.write_text(text, encoding="utf-8", newline="\n")


def render_all(report: Report) -> dict[str, str]:
    """Suffix of the file → its text.

    Raises:
        ValueError: a number of the report is NaN or infinite.
    """
    return {"json": render_json(report), "md": render_markdown(report), "html": render_html(report), "xml": render_junit(report)}


def render_json(report: Report) -> str:
    """The report as ASCII JSON, indented by 1.

    Raises:
        ValueError: a number is NaN or infinite; the message says where it stands.
    """
    if found := _not_finite(report, "report"):
        raise ValueError(f"{found}: a report holds finite numbers or null")
    known = {key: report[key] for key in KEYS if key in report}
    others = {key: report[key] for key in sorted(report) if key not in known}
    return json.dumps(known | others, indent=1, allow_nan=False) + "\n"


def _not_finite(value: Any, path: str) -> str | None:
    """``report.stages[1].mean_kl is nan`` for the first number that JSON can't hold."""
    if isinstance(value, float):
        return None if isfinite(value) else f"{path} is {value}"
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = [(f"{path}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    return next((found for found in (_not_finite(item, where) for where, item in items) if found), None)
