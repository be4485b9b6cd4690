"""Plans in the report: what their builds and audits recorded, and why they were not run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifact.errors import ValidationError
from validation.machine import GPU_DEVICE

RECORDS = "engines/*/build.json"
NO_GPU = "no GPU: a plan runs on its target alone; its ONNX graph was checked instead"
NOT_YET = "plans are not run by this version; the plan's ONNX graph was checked instead"


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


def plans_not_run(engines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One line for each folder of plans."""
    reason = NOT_YET if GPU_DEVICE.exists() else NO_GPU
    return [{"stage": f"engine {folder}", "reason": reason} for folder in dict.fromkeys(engine["folder"] for engine in engines)]
