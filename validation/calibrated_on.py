"""Which stages were calibrated on a text that they are scored on: perplexity there is what rounding was fitted to, and proves nothing."""

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
    used = {stage: _text_of(manifest, stage) for stage in stages}
    hashes = [sha256_of(path) for path in texts or DEFAULT_TEXTS]
    return [[stage for stage, calibrated in used.items() if calibrated == one] for one in hashes]


def mark(texts: Sequence[Mapping[str, Any]], found: Sequence[list[str]]) -> list[dict[str, Any]]:
    """The report's texts, each with its ``calibrated_stages`` where there are any; ids that are no text have none."""
    return [{**text, **({"calibrated_stages": names} if names else {})} for text, names in zip(texts, [*found, *[[]] * len(texts)], strict=False)]


def why_no_proof(texts: Iterable[Mapping[str, Any]]) -> str | None:
    """What to say of the first text that stages were calibrated on; None where there is none."""
    for text in texts:
        if names := text.get("calibrated_stages"):
            return f"{', '.join(names)} calibrated on {text['name']}, and perplexity there is no proof"
    return None


def _text_of(manifest: Mapping[str, Any], stage: str) -> str | None:
    report: Mapping[str, Any] = manifest["steps"].get(STEP + stage, {}).get("report") or {}
    digest: str | None = (report.get("calibration") or {}).get("sha256")
    return digest
