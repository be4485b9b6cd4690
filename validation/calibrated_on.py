"""Which stages were calibrated, or chosen, on a text that they are scored on: perplexity there is what they were fitted to, and proves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from artifact.hashing import sha256_of
from validation.text import DEFAULT_TEXTS

STEP = "quantize-"


def calibrated_stages(manifest: Mapping[str, Any], stages: Iterable[str], texts: Sequence[Path] | None) -> list[list[str]]:
    """For each text the stages that were calibrated on it, or whose linears were placed on it.

    Args:
        manifest: of the artifact.
        stages: that are measured.
        texts: that are scored; None is the committed ones.
    """
    used = {stage: _texts_of(manifest, stage) for stage in stages}
    hashes = [sha256_of(path) for path in texts or DEFAULT_TEXTS]
    return [[stage for stage, fitted in used.items() if one in fitted] for one in hashes]


def mark(texts: Sequence[Mapping[str, Any]], found: Sequence[list[str]]) -> list[dict[str, Any]]:
    """The report's texts, each with its ``calibrated_stages`` where there are any; ids that are no text have none."""
    return [{**text, **({"calibrated_stages": names} if names else {})} for text, names in zip(texts, [*found, *[[]] * len(texts)], strict=False)]


def why_no_proof(texts: Iterable[Mapping[str, Any]]) -> str | None:
    """What to say of the first text that stages were calibrated on; None where there is none."""
    for text in texts:
        if names := text.get("calibrated_stages"):
            return f"{', '.join(names)} calibrated or placed on {text['name']}, and perplexity there is no proof"
    return None


def _texts_of(manifest: Mapping[str, Any], stage: str) -> set[str]:
    """Hashes of what a stage was made by."""
    report: Mapping[str, Any] = manifest["steps"].get(STEP + stage, {}).get("report") or {}
    return {digest for part in ("calibration", "placement") if (digest := (report.get(part) or {}).get("sha256"))}
