"""Quality in a report: each measure in a row, float16's own and every stage in a column, and what of it is noise, in words; page and Markdown alike.

A number stands with its 95 % interval below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from validation.bootstrap import INSIDE
from validation.render.gates import Report
from validation.render.wording import DASH, metric, number, places, plus_minus, shorten

FLOAT16 = "float16"
Scope = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A number, and what stands below it: its interval, or whether it is noise."""

    value: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QualityTable:
    """One text, or all together: a caption, and rows of (measure, one cell a column)."""

    caption: str
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class QualityView:
    """What a page shows of quality.

    Attributes:
        columns: float16 where it was measured, then the stages.
        tables: all texts together where there are several, then each.
        words: (stage, what its numbers say).
        how: how tokens were scored.
    """

    columns: list[str]
    tables: list[QualityTable]
    words: list[tuple[str, str]]
    how: str

    @property
    def headers(self) -> list[str]:
        """The columns as the page's macro takes them: numbers, to the right."""
        return [f">{name}" for name in self.columns]


def view_quality(report: Report) -> QualityView | None:
    """The quality of the stages; None where no text was scored."""
    found = [
        (FLOAT16, (report.get("float16") or {}).get("quality")),
        *((stage["stage"], stage.get("quality")) for stage in report.get("stages") or ()),
    ]
    measured = [(name, quality) for name, quality in found if quality]
    if all(name == FLOAT16 for name, _ in measured):
        return None
    qualities = [quality for _, quality in measured]
    texts = [[quality["texts"][index] for quality in qualities] for index in range(len(qualities[0]["texts"]))]
    tables = [_table(str(scopes[0]["text"]), scopes) for scopes in texts]
    if len(texts) > 1:
        tables.insert(0, _table("All texts together", [quality["all"] for quality in qualities]))
    if any(quality.get("greedy") for quality in qualities):
        tables[0].rows.append(("Greedy tokens as float32’s", [_greedy(quality.get("greedy")) for quality in qualities]))
    words = [(name, describe(quality["all"])) for name, quality in measured if name != FLOAT16]
    return QualityView([shorten(name, 40) for name, _ in measured], tables, words, _how(report.get("text") or {}, qualities))


def describe(scope: Scope) -> str:
    """``perplexity +0.29 ± 0.12 %, beyond noise; mean KL 0.0049, above float16’s own, beyond noise; top-1 …``."""
    increase = plus_minus(scope["perplexity_increase_pct"], scope["perplexity_se_pct"])
    parts = [f"perplexity {increase}" + (f", {scope['perplexity_noise']}" if scope["perplexity_noise"] else "")]
    against = scope.get("against_float16") or {}
    for key, name in (("mean_kl", "mean KL"), ("top1_agreement", "top-1")):
        parts.append(f"{name} {metric(key, scope[key])}" + _beside_float16(against.get(key)))
    return "; ".join(parts)


def _beside_float16(difference: dict[str, Any] | None) -> str:
    """`` inside noise of float16’s own``, `` above float16’s own, beyond noise``."""
    if not difference or not difference["noise"]:
        return ""
    if difference["noise"] == INSIDE:
        return f", {INSIDE} of float16’s own"
    return f", {'above' if difference['value'] > 0 else 'below'} float16’s own, {difference['noise']}"


def _table(name: str, scopes: Sequence[Scope]) -> QualityTable:
    caption = f"{name}: {number(scopes[0]['tokens'])} tokens, perplexity of float32 {number(scopes[0]['reference_perplexity'], digits=4)}"
    return QualityTable(caption, [(label, [make(scope) for scope in scopes]) for label, make in ROWS])


def _increase(scope: Scope) -> Cell:
    notes = [_between(scope["perplexity_interval_pct"], lambda end: places(end, scope["perplexity_se_pct"])), scope["perplexity_noise"]]
    return Cell(plus_minus(scope["perplexity_increase_pct"], scope["perplexity_se_pct"]), tuple(filter(None, notes)))


def _plain(key: str) -> Callable[[Scope], Cell]:
    return lambda scope: Cell(metric(key, scope[key]))


def _with_interval(key: str, interval: str) -> Callable[[Scope], Cell]:
    return lambda scope: Cell(metric(key, scope[key]), (_between(scope[interval], lambda value: metric(key, value)),))


ROWS: tuple[tuple[str, Callable[[Scope], Cell]], ...] = (
    ("Perplexity", lambda scope: Cell(number(scope["perplexity"], digits=4))),
    ("Increase over float32", _increase),
    ("Mean KL", _with_interval("mean_kl", "kl_interval")),
    ("99th percentile KL", _plain("p99_kl")),
    ("Top-1", _with_interval("top1_agreement", "top1_interval")),
    ("Top-5", _plain("top5_agreement")),
)
"""Measure → cell."""


def _greedy(prompts: list[dict[str, Any]] | None) -> Cell:
    """``all 192``, or where the prompts first differ."""
    if not prompts:
        return Cell(DASH)
    places = [prompt["diverges_at"] for prompt in prompts]
    if all(place is None for place in places):
        return Cell("all", (f"of {len(prompts)} × {prompts[0]['tokens']}",))
    shown = ", ".join("none" if place is None else str(place + 1) for place in places)
    return Cell(f"{places.count(None)} of {len(places)} whole", (f"first differs at token {shown}",))


def _how(text: Report, qualities: Sequence[dict[str, Any]]) -> str:
    """Windows, BOS, intervals and prompts, in a sentence each."""
    window, stride = number(text.get("window")), number(text.get("stride"))
    start = "each begun with BOS" if text.get("bos") is not None else "without BOS, which this model’s tokenizer does not put first"
    lines = [f"Windows of {window} tokens that slide by {stride}, {start}: after a text’s first window every token has that much before it."]
    lines += ["Intervals hold 95 % of 2,000 draws of blocks of tokens; a difference whose interval holds zero is inside noise."]
    lines += ["Top-5: share of float32’s five best tokens that are among the five best."]
    missing = next((quality["greedy_missing"] for quality in qualities if quality.get("greedy_missing")), None)
    prompts = next((quality["greedy"] for quality in qualities if quality.get("greedy")), None)
    if prompts:
        lines.append(f"Greedy: {len(prompts)} fixed prompts, {prompts[0]['tokens']} tokens each, until the first that float32 would not say.")
    return " ".join([*lines, f"Greedy continuations were not compared: {missing}." if missing else ""]).strip()


def _between(ends: Sequence[Any], write: Callable[[Any], str]) -> str:
    return f"{write(ends[0])} to {write(ends[1])}"
