"""How a value of the report is written for a person: three significant digits, % for shares, a dash for what was not measured.

Every string of the report may come from a stranger (model names, tensor names, texts); `clean` takes out what no output format can carry.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import floor, isfinite, log10
from typing import Any

from markupsafe import Markup, escape

DASH = "–"
"""Stands where a number is null: not measured, not applicable or not finite."""

MARKS = {True: "✓", False: "✗", None: "—"}
"""Passed, failed, no gate."""

WORDS = {True: "passed", False: "failed", None: "not judged"}

COMPARISONS = {"<=": "≤", ">=": "≥", "==": "=", "!=": "≠"}

SHARES = frozenset({"range_peak", "top1_agreement", "top5_agreement"})
"""Metrics stored as a fraction (of 65504, of all positions) and shown in per cent."""

SPACE = "\N{NARROW NO-BREAK SPACE}"

# C0/C1 controls but tab and newline, lone surrogates, the non-characters XML forbids, and the marks that reorder text on screen.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def clean(text: object) -> str:
    """Text without control characters, lone surrogates and bidirectional overrides; tabs and newlines stay."""
    return _UNPRINTABLE.sub("", str(text))


def shorten(text: object, limit: int = 120) -> str:
    """One line of clean text of at most ``limit`` characters, the middle left out, because names differ at both ends."""
    line = " ".join(clean(text).split())
    half = (limit - 1) // 2
    return line if len(line) <= limit else f"{line[:half]}…{line[-half:]}"


def significant(value: float, digits: int = 3) -> str:
    """``0.004567`` → ``0.00457``, ``24265.2`` → ``24,265``, ``1.2e-07`` → ``1.20e-7``; whole numbers in full."""
    if value == 0 or (isinstance(value, int) and abs(value) < 10**15):
        return f"{value:,.0f}"
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = floor(log10(abs(rounded)))
    if magnitude < -4 or magnitude >= 9:  # beyond these a reader counts zeros
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def number(value: Any, *, against: Any = None, digits: int = 3) -> str:
    """Three significant digits (or ``digits``), or as many more as show on which side of ``against`` the value lies (1.0004 is not 1.00 ≤ 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DASH if value is None else clean(value)
    if not isfinite(value):
        return DASH
    shown = significant(value, digits)
    if not isinstance(against, int | float) or isinstance(against, bool) or value == against:
        return shown
    return next((text for text in (significant(value, more) for more in range(digits, 18)) if _differs(text, against)), shown)


def _differs(text: str, against: float) -> bool:
    return float(text.replace(",", "")) != against


def trimmed(value: Any) -> str:
    """A limit, without the zeros that carry nothing: ``1.00`` → ``1``, ``0.0100`` → ``0.01``, ``1.00e-4`` → ``1e-4``."""
    mantissa, mark, exponent = number(value, against=None).partition("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + mark + exponent


def metric(name: str, value: Any, *, against: Any = None) -> str:
    """A value in the unit of its metric: shares and ``*_pct`` in per cent (the latter signed), others plain."""
    if not _is_number(value):
        return number(value)
    if name in SHARES:
        return f"{number(value * 100, against=_scaled(against, 1.0))}{SPACE}%"
    if name.endswith("_pct"):
        return f"{'+' if value > 0 else ''}{number(value, against=against).replace('-', '−')}{SPACE}%"
    return number(value, against=against)


def plus_minus(value: Any, error: Any) -> str:
    """A percentage with its standard error (two digits), both to the same place: ``+0.291 ± 0.041 %``."""
    if not (_is_number(value) and _is_number(error) and error > 0):
        return metric("_pct", value)
    places = max(0, 1 - floor(log10(float(f"{error:.1e}"))))
    return f"{value:+.{places}f} ± {error:.{places}f}{SPACE}%".replace("-", "−")


def places(value: Any, error: Any) -> str:
    """A percentage to the place of a standard error: what ``plus_minus`` writes of it."""
    return (
        metric("_pct", value)
        if not (_is_number(value) and _is_number(error) and error > 0)
        else plus_minus(value, error).split(" ± ")[0] + f"{SPACE}%"
    )


def limit(name: str, check: dict[str, Any]) -> str:
    """The gate of a check: ``≤ 1.25``; ``no limit`` for what is only shown."""
    value = check.get("limit")
    if value is None:
        return "no limit"
    sign = COMPARISONS.get(check.get("comparison", "<="), clean(check.get("comparison", "<=")))
    if not _is_number(value):
        return f"{sign} {clean(value)}"
    unit = f"{SPACE}%" if name in SHARES or name.endswith("_pct") else ""
    return f"{sign} {trimmed(value * 100 if name in SHARES else value)}{unit}"


def breakable(path: object) -> Markup:
    """A path or tensor name that may break after its dots, slashes and underscores."""
    return Markup(re.sub(r"(?<=[./_])", "<wbr>", str(escape(clean(path)))))


def unbroken(text: str) -> str:
    """The text, with breaks only before a sign or a word: a number stays with what stands before it."""
    return re.sub(r" (?=[\d–−])", "\N{NO-BREAK SPACE}", text)


def size(count: Any) -> str:
    """Bytes in decimal units: ``269000000`` → ``269 MB``."""
    if not _is_number(count):
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{significant(count / scale)}{SPACE}{unit}"
    return f"{count:,.0f}{SPACE}B"


def duration(seconds: Any) -> str:
    """``0.42`` → ``0.42 s``, ``192`` → ``3 min 12 s``."""
    if not _is_number(seconds):
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}{SPACE}min {rest}{SPACE}s" if minutes else f"{significant(round(float(seconds), 2))}{SPACE}s"


def count(value: Any) -> str:
    """A number of parameters as people say it: ``134515008`` → ``135 M``."""
    if not _is_number(value):
        return DASH
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{significant(value / scale)}{SPACE}{unit}"
    return number(value)


def cache_form(report: Mapping[str, Any]) -> str:
    """``dynamic cache``, ``static cache of 328 slots``; a dash where the report does not say."""
    cache = report.get("cache")
    if not cache:
        return DASH
    slots = f" of {number(cache['capacity'])} slots" if cache.get("capacity") is not None else ""
    return f"{clean(cache.get('form'))} cache{slots}"


def label(name: object) -> str:
    """``worst_local_ratio`` → ``worst local ratio``; ``_pct`` is said by the unit."""
    return clean(name).removesuffix("_pct").replace("_", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _scaled(value: Any, otherwise: float) -> float:
    return 100.0 * (value if _is_number(value) else otherwise)
