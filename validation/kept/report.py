"""``validate --against FILE.safetensors``: stages or a graph judged by the reference's kept predictions; no checkpoint is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifact.errors import ValidationError
from artifact.progress import Progress
from engines.device import Device
from validation import calibrated_on, perplexity
from validation.comparison import Subject, comparison_report, folder_of, write_comparison
from validation.kept.file import HINT, Kept, describe_kept
from validation.kept.judge import make_oracle, measure_side
from validation.kept.limits import kept_limits
from validation.kept.plan import with_plans
from validation.limit_rows import rows
from validation.parity import first_mismatch, overall, quality_unproven, verdict

WHY = "not measured: stages are judged by divergence from kept predictions of the float32 reference"
Report = dict[str, Any]


def require_same_model(model: Mapping[str, Any], kept: Kept, path: Path) -> None:
    """Refuse predictions of another checkpoint.

    Raises:
        ValidationError: the fingerprints differ; the message says both models.
    """
    if model["fingerprint"] != kept.model["fingerprint"]:
        there = f"{kept.model['name']} ({str(kept.model['fingerprint'])[:12]})"
        here = f"{model['name']} ({str(model['fingerprint'])[:12]})"
        raise ValidationError(f"{path} holds predictions of another checkpoint: there {there}, here {here}", hint=HINT)


def judge_by_kept(subject: Subject, path: Path, kept: Kept, *, out: Path | None, progress: Progress, device: Device | str | None = None) -> Report:
    """Measure a subject and write ``parity.{json,md,html,xml}``.

    Args:
        subject: of the same checkpoint as the file.
        path: the file, for the report.
        kept: what it holds.
        out: folder of the reports; None is beside the subject's own.
        progress: told what is being done.
        device: the GPU that an artifact's plans are run on; the reason why there is none; None where plans are not to be run.

    Returns:
        The report; ``passed`` is False where anything does not match.
    """
    oracle, plans = make_oracle(kept), None
    if device is not None:
        subject, plans = with_plans(subject, device)
    entries = [measure_side(oracle, side, streamed=subject.streamed, progress=progress) for side in subject.sides]
    limits = [row for side in subject.sides for row in rows(side.name, kept_limits(side, streamed=subject.streamed))]
    if plans is not None:
        entries += plans.measure(oracle, progress)
        limits += plans.limits()
    file = describe_kept(path, kept)
    name = f"{path.name}: the float32 reference of {kept.model['name']}, {file['top_k']} best tokens of each position"
    report = comparison_report(subject, _texts(subject, kept), entries, {"kind": "kept", "name": name, "file": file}, limits, WHY)
    report["passed"] = overall(report | {"against": None})
    report["against"]["passed"] = report["passed"]
    report["verdict"] = verdict(report)
    report["headline"] = _headline(report, kept)
    return write_comparison(report, folder_of(subject, path.stem, out))


def _texts(subject: Subject, kept: Kept) -> Report:
    """The report's ``text`` and ``texts``."""
    counts = perplexity.scored_of(kept.windows) or [0]
    each = [{key: text[key] for key in ("name", "sha256", "kind")} | {"scored_tokens": count} for text, count in zip(kept.texts, counts, strict=True)]
    size = min(perplexity.WINDOW, kept.config.max_position_embeddings)
    windows = {"window": size, "stride": perplexity.stride_of(size), "bos": kept.texts[0]["bos"]} if kept.windows else {}
    whole = each[0] | {"name": ", ".join(text["name"] for text in each), "scored_tokens": sum(counts)} | windows
    stages = [side.name for side in subject.sides]
    return {"text": whole, "texts": calibrated_on.mark_hashes(each, subject.manifest, stages) if subject.manifest else each}


def _headline(report: Report, kept: Kept) -> str:
    if mismatch := first_mismatch(report | {"against": None}):
        return mismatch
    names = ", ".join(stage["stage"] for stage in report["stages"])
    if report["passed"] is None:
        return f"{names}: measured, not judged"
    unproven = quality_unproven(report, random_weights=kept.model["format"] == "random")
    proven = f"structure proven, quality not: {unproven}" if unproven else "divergence and perplexity proven"
    return f"{proven} for {names} by kept predictions; float16, caches and single layers are judged with the checkpoint alone"
