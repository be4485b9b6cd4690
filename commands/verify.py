"""inspect --verify: is every file still the one that was written, and every weight the checkpoint's?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifact.errors import ToolkitError
from artifact.hashing import sha256_of
from artifact.journal import unfinished_steps
from artifact.manifest import Manifest
from artifact.progress import Progress
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_request
from exporter.checkpoints.hub_cache import find_snapshot

Report = dict[str, Any]


def verify_artifact(folder: Path, manifest: Manifest, progress: Progress) -> Report:
    """Re-hash every recorded file, and compare every weight of every graph with the checkpoint.

    Returns:
        passed, verified (files), broken (reasons), not_verified (what could not be checked), audit (None without weights or a readable graph).
    """
    broken = [f"{step} is unfinished: give its command again" for step in unfinished_steps(folder)]
    outputs = {file: record["sha256"] for step in manifest["steps"].values() for file, record in step["outputs"].items()}
    for done, (file, sha256) in enumerate(outputs.items()):
        progress(f"hashing {file}", done, len(outputs))
        if not (folder / file).is_file():
            broken.append(f"{file} is missing")
        elif sha256_of(folder / file) != sha256:
            broken.append(f"{file} is not the file that was written")
    report: Report = {"verified": len(outputs), "broken": broken, "not_verified": [], "audit": None}
    if manifest["model"] is not None and manifest["model"].get("weights") != "none":
        report |= _audit(folder, manifest, outputs, broken, progress)
    return {"passed": not report["broken"] and (report["audit"] or {"passed": True})["passed"], **report}


def _audit(folder: Path, manifest: Manifest, outputs: dict[str, str], broken: list[str], progress: Progress) -> Report:
    """The weight audit; without a checkpoint, of what the graphs alone can say."""
    from exporter.audit import audit_artifact  # torch takes seconds to import

    checkpoint, reason = _reopen(manifest["model"])
    missing = [f"the weights were compared with nothing: {reason}"] if reason else []
    graphs = [file for file in outputs if file.endswith(".onnx") and "/" not in file and (folder / file).is_file()]
    try:
        return {"not_verified": missing, "audit": audit_artifact(folder, manifest["model"], graphs, checkpoint, progress=progress)}
    except ToolkitError as error:  # a graph that can't be read
        return {"broken": [*broken, str(error)], "not_verified": missing}


def _reopen(model: Report) -> tuple[Checkpoint | None, str]:
    """The checkpoint that the artifact was made from, or why it can't be had."""
    request = CheckpointRequest.from_record(model.get("request", {"source": model["source"]}))
    try:
        repository = request.repository()
        snapshot = find_snapshot(repository, request.revision) if repository is not None else None
        if repository is not None and (snapshot is None or snapshot.missing):
            return None, f"{repository} is not whole in this machine's cache, and a check downloads nothing"
        checkpoint = open_request(request)
    except ToolkitError as error:
        return None, str(error)
    if checkpoint.fingerprint != model["fingerprint"]:
        return None, f"{checkpoint.source} is another checkpoint now"
    return checkpoint, ""
