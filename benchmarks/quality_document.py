"""The document of benchmarks/quantization_quality.py, from its rows: tables, which limits hold, and what the figures do not say."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quality_texts import TEXTS

Found = Mapping[str, Any]
"""What ``Judge.describe`` says of a row."""
PERCENT = 100
INT8_KL, INT8_KL_AIM, INT8_INCREASE = 0.003, 0.002, 0.3
SMOOTHQUANT_INCREASE, SMOOTHQUANT_SHARE = 1.0, 0.8
INT4_OF_PLAIN = 0.4
COLUMNS = ("perplexity, %", "mean KL", "99 % KL", "top-1", *(f"{name}, %" for name in TEXTS))


def document(
    table: Mapping[str, Found], tokens: tuple[int, int], placed: Found, sets: Mapping[str, tuple[int, float]], versions: Mapping[str, str]
) -> str:
    """The whole file.

    Args:
        table: name of a row → what was found, in the order of the tables.
        tokens: that were scored, and that static scales were calibrated on.
        placed: report of ``quantize --scheme int8-smoothquant``.
        sets: name of a row of the curve → its linears, and their part of the bytes.
        versions: tool → its version.
    """
    forms = [[name, *_cells(found)] for name, found in table.items() if name not in sets]
    zero = [["0 % (int8)", "0", *_cells(table["int8"])]]
    curve = [[f"{PERCENT * sets[name][1]:.1f} %", str(sets[name][0]), *_cells(table[name])] for name in reversed(list(sets))]
    parts = [
        _head(*tokens, table["int8"], versions),
        markdown(["", *COLUMNS], forms),
        "## Against the limits\n\n" + markdown(["limit", "measured", "holds"], _limits(table, placed)),
        _curve_head(placed),
        markdown(["of the weights", "linears", *COLUMNS], [*zero, *curve]),
        _doubts(),
    ]
    return "\n\n".join(parts) + "\n"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def _cells(found: Found) -> list[str]:
    whole = found["all"]
    kl = (f"{whole['mean_kl']:.4f}", f"{whole['p99_kl']:.3f}", f"{PERCENT * whole['top1_agreement']:.1f} %")
    return [_increase(whole), *kl, *(_increase(text) for text in found["texts"])]


def _increase(found: Found) -> str:
    return f"{found['perplexity_increase_pct']:+.2f} ± {found['perplexity_se_pct']:.2f}"


def _lower(found: Found) -> float:
    """Two standard errors below the increase."""
    lower: float = found["all"]["perplexity_increase_pct"] - 2 * found["all"]["perplexity_se_pct"]
    return lower


def _limits(table: Mapping[str, Found], placed: Found) -> list[list[str]]:
    int8, smooth, int4, plain = (table[name] for name in ("int8", "int8-smoothquant", "int4", "int4, plain rounding"))
    kl, share = int8["all"]["mean_kl"], placed["w8a8"]["share"]
    ratio = int4["all"]["perplexity_increase_pct"] / plain["all"]["perplexity_increase_pct"]
    lower, smoothed = _lower(int8), smooth["all"]["perplexity_increase_pct"]
    lines = [
        (f"int8: mean KL ≤ {INT8_KL}", f"{kl:.4f}", kl <= INT8_KL),
        (f"int8: mean KL ≤ {INT8_KL_AIM}, the aim", f"{kl:.4f}", kl <= INT8_KL_AIM),
        (f"int8: increase − 2 standard errors ≤ {INT8_INCREASE} %", f"{lower:+.2f} %", lower <= INT8_INCREASE),
        (f"int8-smoothquant: increase ≤ {SMOOTHQUANT_INCREASE:g} %", f"{_increase(smooth['all'])} %", smoothed <= SMOOTHQUANT_INCREASE),
        (f"int8-smoothquant: increase − 2 standard errors ≤ {SMOOTHQUANT_INCREASE:g} %", f"{_lower(smooth):+.2f} %", _lower(smooth) <= 1),
        (f"int8-smoothquant: ≥ {SMOOTHQUANT_SHARE:.0%} of the linear weights in W8A8", f"{share:.1%}", share >= SMOOTHQUANT_SHARE),
        (f"int4: increase ≤ {INT4_OF_PLAIN} × plain rounding's, same blocks", f"{ratio:.2f} ×", ratio <= INT4_OF_PLAIN),
    ]
    return [[limit, measured, "yes" if holds else "**no**"] for limit, measured, holds in lines]


def _head(tokens: int, static_tokens: int, int8: Found, versions: Mapping[str, str]) -> str:
    tools = ", ".join(f"{tool} {version}" for tool, version in versions.items())
    return f"""\
# What quantisation costs

Made by `python benchmarks/quantization_quality.py --tokens {tokens}` on {time.strftime("%d %B %Y")} ({tools}). SmolLM2-135M, {tokens:,} tokens of
three texts that nothing was calibrated, searched or placed on ({", ".join(TEXTS)}; `benchmarks/quality_texts.py`), windows of 512; float32's
perplexity is {int8["all"]["reference_perplexity"]:.2f}. Increases are of perplexity over float32, in per cent, ± one standard error, paired, of
blocks of 32 tokens drawn again; KL in nats, from float32. Whatever has static scales for activations is calibrated on the same
{static_tokens:,} tokens of the default calibration text, each tool's; int8 and int4 on 8,192. Ours are the graphs that `quantize`
writes by its defaults, run in ONNX Runtime; ModelOpt's is its own fake quantisation; naive
static W8A8 is every linear in INT8 by INT8 without smoothing, without exceptions and with weights rounded to the nearest
level. lm_head and the embedding are quantised by none."""


def _curve_head(placed: Found) -> str:
    measured = placed["placement"]["chosen"]
    found = f"{measured['increase_pct']:+.2f} ± {measured['increase_se_pct']:.2f} %, KL {measured['kl']:.4f}"
    return f"""\
## int8-smoothquant from 0 to 100 % of the weights

Sets of linears by what each was measured to cost alone, the cheapest by byte first, as placement takes them (`scores-int8-smoothquant.json`); what is
left out is weight-only INT8. Fake-quantised in PyTorch, rounded as the graph is. `quantize` chose {placed["w8a8"]["linears"]} linears, \
{placed["w8a8"]["share"]:.1%} of the weights, measured
{found} on {measured["tokens"]:,} tokens of {placed["placement"]["text"]}; the row `int8-smoothquant` above is that graph."""


def _doubts() -> str:
    return """\
## What this does not say

- One model, and a small one: SmolLM2-135M is the only trained model at hand. What a linear costs, and so what is left out, is another on every model;
  the method is the same.
- Texts are English, two of three are Python's own documentation. The default calibration text shares no line with them.
- Graphs ran in ONNX Runtime on a CPU, with float32 between the operators; an engine adds float16's own error, which is in the row `float16` as far as
  a CPU shows it. No plan has run on an A100.
- The limit on int8-smoothquant is held on the text where sets are measured; on others it is a result, not a promise: see the columns by text."""
