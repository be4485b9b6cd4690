"""Which stages were made with a text that they are scored on.

Calibrated on it, perplexity there is what rounding was fitted to, and proves nothing. Placed on it, its limit chose the linears that are quantised:
it holds there by choice, and is proven where another text, that nothing was chosen on, holds it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from artifact.hashing import sha256_of
from validation.text import DEFAULT_TEXTS

STEP = "quantize-"


def calibrated_stages(manifest: Mapping[str, Any], stages: Iterable[str], texts: Sequence[Path] | None) -> list[list[str]]:
    """For each text the stages that were calibrated on it.

    Args:
        manifest: of the artifact.
        stages: that are measured.
        texts: that are scored; None is the committed ones.
    """
    return _stages_of("calibration", manifest, stages, _hashes(texts))


def placed_stages(manifest: Mapping[str, Any], stages: Iterable[str], texts: Sequence[Path] | None) -> list[list[str]]:
    """For each text the stages whose quantised linears were chosen on it."""
    return _stages_of("placement", manifest, stages, _hashes(texts))


def mark(texts: Sequence[Mapping[str, Any]], key: str, found: Sequence[list[str]]) -> list[dict[str, Any]]:
    """The report's texts, each with its stages under a key where there are any; ids that are no text have none."""
    return [{**text, **({key: names} if names else {})} for text, names in zip(texts, [*found, *[[]] * len(texts)], strict=False)]


def mark_all(
    texts: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], stages: Sequence[str], files: Sequence[Path] | None
) -> list[dict[str, Any]]:
    """The report's texts with ``calibrated_stages`` and ``placed_stages``."""
    marked = mark(texts, "calibrated_stages", calibrated_stages(manifest, stages, files))
    return mark(marked, "placed_stages", placed_stages(manifest, stages, files))


def mark_hashes(texts: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], stages: Sequence[str]) -> list[dict[str, Any]]:
    """As ``mark_all``, of texts that are known by their hash alone."""
    digests = [str(text["sha256"]) for text in texts]
    marked = mark(texts, "calibrated_stages", _stages_of("calibration", manifest, stages, digests))
    return mark(marked, "placed_stages", _stages_of("placement", manifest, stages, digests))


def why_no_proof(texts: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of the first text that stages were calibrated on, or of stages that were placed on every text; None where there are none."""
    for text in texts:
        if names := text.get("calibrated_stages"):
            return f"{', '.join(names)} calibrated on {text['name']}, and perplexity there is no proof"
    placed = [set(text.get("placed_stages", ())) for text in texts]
    if everywhere := sorted(set.intersection(*placed)) if placed else []:
        return f"{', '.join(everywhere)} placed on {texts[0]['name']}, and scored on no other text"
    return None


def _hashes(texts: Sequence[Path] | None) -> list[str]:
    return [sha256_of(path) for path in texts or DEFAULT_TEXTS]


def _stages_of(made_with: str, manifest: Mapping[str, Any], stages: Iterable[str], hashes: Sequence[str]) -> list[list[str]]:
    used = {stage: _text_of(manifest, stage, made_with) for stage in stages}
    return [[stage for stage, digest in used.items() if digest == one] for one in hashes]


def _text_of(manifest: Mapping[str, Any], stage: str, made_with: str) -> str | None:
    report: Mapping[str, Any] = manifest["steps"].get(STEP + stage, {}).get("report") or {}
    digest: str | None = (report.get(made_with) or {}).get("sha256")
    return digest
