"""Stages that an interrupted validation has measured, for the run that carries on: at 13B a stage is many minutes.

They lie in ``reports/unfinished/`` and in the step's journal (artifact/journal.py), which holds what they depend on: options, texts, graphs, weights,
versions and sources. Where any of it differs the journal is another's, and nothing is taken from here. How a graph was run is chosen by the memory
that is free, which no option says: it is kept with each stage, and one that was run otherwise is measured again.
"""

from __future__ import annotations

import json
import zipfile
from typing import Any

import numpy as np

from artifact.steps import StepContext
from validation.measurement import LastRows
from validation.row_result import RowResult

FOLDER = "reports/unfinished"
ENTRY = "entry"
STREAMED = "streamed"
Measured = tuple[dict[str, Any], LastRows]


def keep_stage(step: StepContext, stage: str, measured: Measured, *, streamed: bool) -> None:
    """Keep an entry of the report and what the stage's engine graph must give; an entry that could not be run is no result."""
    entry, rows = measured
    if any(check["check"] == "runs" for check in entry["checks"]):
        return
    arrays: dict[str, Any] = {ENTRY: np.frombuffer(json.dumps(entry).encode(), np.uint8), STREAMED: np.asarray(streamed)}
    for name, of_scenario in rows.items():
        for index, row in enumerate(of_scenario):
            arrays |= {f"{name}/{index}/positions": row.positions, f"{name}/{index}/logits": row.logits}
    with step.write(_file(stage)) as path, path.open("wb") as file:
        np.savez(file, **arrays)


def kept_stage(step: StepContext, stage: str, *, streamed: bool) -> Measured | None:
    """What an interrupted run has kept of a stage that it ran in the same way; None where there is nothing, or it can't be read."""
    if step.finished(_file(stage)) is None:
        return None
    try:
        with np.load(step.artifact / _file(stage), allow_pickle=False) as file:
            if bool(file[STREAMED]) is not streamed:
                return None
            entry: dict[str, Any] = json.loads(file[ENTRY].tobytes())
            return entry, _rows({name: file[name] for name in file.files if name not in (ENTRY, STREAMED)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def forget_stages(step: StepContext) -> None:
    """Take away what was kept: the report is written."""
    for file in [file for file in step.outputs if file.startswith(f"{FOLDER}/")]:
        step.outputs.pop(file)
        (step.artifact / file).unlink(missing_ok=True)
    if (step.artifact / FOLDER).is_dir() and not any((step.artifact / FOLDER).iterdir()):
        (step.artifact / FOLDER).rmdir()


def _rows(arrays: dict[str, Any]) -> LastRows:
    rows: LastRows = {}
    for name in (name for name in arrays if name.endswith("/positions")):  # in the order in which they were written
        scenario, index, _ = name.split("/")
        rows.setdefault(scenario, []).append(RowResult(arrays[name], arrays[f"{scenario}/{index}/logits"]))
    return rows


def _file(stage: str) -> str:
    return f"{FOLDER}/{stage}.npz"
