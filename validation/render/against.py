"""What the reference or the stages were held against with ``--against``, as people read it."""

from __future__ import annotations

from dataclasses import dataclass

from validation.render.gates import Check, Report
from validation.render.wording import DASH, WORDS, label, limit, metric, number, plus_minus

Row = tuple[bool | None, tuple[str, ...]]
COLUMNS = ("Check", "Value", "Must be", "Where", "Why")
TRANSFORMERS = "transformers"
TITLES = {TRANSFORMERS: "The reference against transformers", "kept": "Against kept predictions", "graph": "Against another graph"}


@dataclass(frozen=True)
class AgainstView:
    """A heading, lines of text, and (passed, cells of ``COLUMNS``) of each check."""

    title: str
    passed: bool | None
    lines: list[str]
    rows: list[Row]


def view_against(report: Report) -> AgainstView | None:
    """What to show; None where nothing was held against anything else."""
    found = report.get("against")
    if not found:
        return None
    entry = found.get("entry") or {}
    rows = [(check["passed"], _cells(check)) for check in entry.get("checks") or ()]
    lines = {TRANSFORMERS: lambda: _numbers(entry), "kept": lambda: _kept(found["file"]), "graph": lambda: _pairs(found)}
    return AgainstView(TITLES[found["kind"]], found["passed"], [_said(found), *lines[found["kind"]]()], rows)


def _said(found: Report) -> str:
    """``passed: transformers 5.23.0 …, of the checkpoint's own config.json, weights as stored``."""
    of = f", of {found['config']}" if "config" in found else ""
    of += f", weights {found['weights']}" if "weights" in found else ""
    return f"{WORDS[found['passed']]}: {found['name']}{of}"


def _kept(file: Report) -> list[str]:
    """What the divergence is made of."""
    bound = f"the {number(file['top_k'])} best tokens of {number(file['positions'])} positions, the others lumped into one, give a lower bound"
    rest = f"the others hold {number(file['rest_mass'], digits=2)} of the probability; {file['drawn']} drawn of them estimate the rest without bias"
    return [bound, rest, f"{number(file['bytes_per_position'])} bytes a position"]


def _pairs(found: Report) -> list[str]:
    """One line a pair."""
    lines = []
    for pair in found["pairs"]:
        layers = pair["layers"]
        if "missing" in layers:
            told = f"layers not compared: {layers['missing']}"
        elif layers["worst"] is None:
            told = "every layer gives the same, bit for bit"
        else:
            first = "no layer" if layers["first"] is None else f"layer {layers['first']} is the first that"
            size = number(layers["layers"][layers["worst"]])
            told = f"{first} differs by more than rounding, layer {layers['worst']} most, by {size} of its size"
        lines.append(f"{pair['stage']} with {pair['with']}: {told}")
        lines += [f"{pair['stage']}, {left['scenario']}: left out: {left['reason']}" for left in pair["left_out"]]
    return lines


def _numbers(entry: Report) -> list[str]:
    """Logits, text and layers in one line each, as far as they were measured."""
    lines = [
        f"{one['scenario']}, {number(one['positions'])} positions: logits differ by {number(one['mean_abs'])}, at most {number(one['max_abs'])}"
        for one in entry.get("scenarios") or ()
    ]
    if entry.get("quality"):
        increase = plus_minus(entry["perplexity_increase_pct"], entry["perplexity_se_pct"])
        top1 = metric("top1_agreement", entry["top1_agreement"])
        lines.append(f"text: mean KL {number(entry['mean_kl'])}, perplexity {increase}, same best token {top1}")
    if errors := entry.get("hidden_errors"):
        known = [error for error in errors if error is not None]
        span = f"{number(min(known))} to {number(max(known))}" if known else DASH
        lines.append(f"hidden state after each of {len(errors)} layers: relative error {span}")
    return lines


def _cells(check: Check) -> tuple[str, ...]:
    name = check["check"]
    value = metric(name, check["value"], against=check["limit"])
    return label(name), value, limit(name, check), str(check.get("where") or DASH), str(check.get("reason") or DASH)
