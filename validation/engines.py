"""Plans in the report: what their builds and audits recorded, and why they were not run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifact.errors import ValidationError
from engines.device import Device
from engines.runnable import why_not_here

RECORDS = "engines/*/build.json"
NOT_ASKED = "plans run on their GPU alone, with --device cuda; the plan's ONNX graph was checked instead"


def engine_entries(artifact: Path) -> list[dict[str, Any]]:
    """The ``engines`` entries of every ``build.json``, each with the folder it lies in.

    Raises:
        ValidationError: a record can't be read.
    """
    entries = []
    for path in sorted(artifact.glob(RECORDS)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = [{"file": entry["file"], **entry, "folder": path.parent.name} for entry in record["engines"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValidationError(f"{path} can't be read: {error!r}", hint="build the engine again") from error
        entries += found
    return entries


def split_engines(artifact: Path, engines: list[dict[str, Any]], device: Device | str | None) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The plans that can run here, and for each of the others the reason.

    Args:
        artifact: the folder.
        engines: of ``engine_entries``.
        device: this machine's GPU; the reason why there is none; None where plans are not to be run.
    """
    runnable, others = [], []
    for engine in engines:
        if isinstance(device, Device):
            reason = why_not_here(artifact, engine, device)
        else:
            reason = f"{device}; the plan's ONNX graph was checked instead" if device else NOT_ASKED
        if reason is None:
            runnable.append(engine)
        else:
            others.append({"stage": f"engine {engine['folder']}", "reason": reason})
    return runnable, others
