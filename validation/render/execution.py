"""How the graphs were run, in one line."""

from __future__ import annotations

from validation.render.gates import Report

MODES = {"streamed": "one layer at a time", "whole": "loaded whole"}


def execution_line(report: Report) -> str | None:
    """``graphs run one layer at a time: 27.0 GB of weights in float32, …``; None where the report does not say."""
    execution = report.get("execution")
    if not execution:
        return None
    resumed = f"; measured before an interruption: {', '.join(execution['resumed'])}" if execution.get("resumed") else ""
    return f"graphs run {MODES.get(execution['mode'], execution['mode'])}: {execution['reason']}{resumed}"
