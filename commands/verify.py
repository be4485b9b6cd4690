"""inspect --verify: is every file still the one that was written, and every weight the checkpoint's?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from artifact.census import LISTS
from artifact.errors import ToolkitError
from artifact.hashing import hash_span, sha256_of
from artifact.journal import unfinished_steps
from artifact.manifest import Manifest
from artifact.progress import Progress
from artifact.tensor_file import StoredTensor, read_checksums
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_request
from exporter.checkpoints.hub_cache import find_snapshot

Report = dict[str, Any]


def verify_artifact(folder: Path, manifest: Manifest, progress: Progress) -> Report:
    """Re-hash every recorded file and every listed tensor, and compare every weight of every graph with the checkpoint.

    Returns:
        passed (None where nothing is broken and not all could be checked), words (the verdict), checked (files), verified (files that are as they
        were written), broken (reasons), not_verified (what could not be checked), audit (None without weights or a readable graph).
    """
    broken = [f"{step} is unfinished: give its command again" for step in unfinished_steps(folder)]
    outputs = {file: record["sha256"] for step in manifest["steps"].values() for file, record in step["outputs"].items()}
    faults: dict[str, list[str]] = {}
    for done, (file, sha256) in enumerate(outputs.items()):
        progress(f"hashing {file}", done, len(outputs))
        faults[file] = _changed_file(folder, file, sha256)
    lent = _lent_files(folder, outputs, broken)
    for done, (file, tensors) in enumerate(lent.items()):
        progress(f"hashing {file}", done, len(lent))
        faults[file] = _changed_tensors(folder, file, tensors)
    broken += [fault for found in faults.values() for fault in found]
    report: Report = {"checked": len(faults), "verified": sum(not found for found in faults.values())}
    report |= {"broken": broken, "not_verified": [], "audit": None}
    if manifest["model"] is not None and manifest["model"].get("weights") == "none":
        report["not_verified"] = ["the weights were compared with nothing: this folder holds the graph alone (--weights none)"]
    elif manifest["model"] is not None:
        report |= _audit(folder, manifest, outputs, broken, progress)
    failed = bool(report["broken"]) or (report["audit"] or {"passed": True})["passed"] is False
    return {"passed": False if failed else None if report["not_verified"] else True, "words": _in_words(report), **report}


def _in_words(report: Report) -> str:
    """``37 of 38 files are as they were written; weights/… is missing and 1 more``."""
    audit = report["audit"] or {"compared": 0, "failed": []}
    faults = [*report["broken"], *(f"{fault['tensor']} in {fault['graph']} {fault['reason']}" for fault in audit["failed"])]
    said = [f"{report['verified']} of {report['checked']} files are as they were written"]
    if audit["compared"]:
        said.append(f"{audit['compared']} weights were compared with the checkpoint")
    if faults:
        said.append(faults[0] + (f" and {len(faults) - 1} more" if len(faults) > 1 else ""))
    return "; ".join([*said, *report["not_verified"]])


def _changed_file(folder: Path, file: str, sha256: str) -> list[str]:
    if not (folder / file).is_file():
        return [f"{file} is missing"]
    return [] if sha256_of(folder / file) == sha256 else [f"{file} is not the file that was written"]


def _lent_files(folder: Path, outputs: dict[str, str], broken: list[str]) -> dict[str, list[StoredTensor]]:
    """File → its listed tensors, of the files that no step wrote: a checkpoint's shards, used where they lie. Of ours, the file's hash is theirs."""
    lent: dict[str, list[StoredTensor]] = defaultdict(list)
    for path in sorted(folder.glob(LISTS)):
        try:
            for tensor in read_checksums(folder, path.relative_to(folder).as_posix()).values():
                if tensor.file not in outputs:
                    lent[tensor.file].append(tensor)
        except ToolkitError as error:
            broken.append(str(error))
    return dict(lent)


def _changed_tensors(folder: Path, file: str, tensors: list[StoredTensor]) -> list[str]:
    path = folder / file
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return [f"{file} is missing"]
    with path.open("rb") as stream:
        changed = [tensor.name for tensor in tensors if hash_span(stream, tensor.offset, tensor.length) != tensor.blake3]
    return [f"{file}: {name} is not what was exported" for name in changed]


def _audit(folder: Path, manifest: Manifest, outputs: dict[str, str], broken: list[str], progress: Progress) -> Report:
    """The weight audit; without a checkpoint, of what the graphs alone can say."""
    from exporter.audit import audit_artifact  # torch takes seconds to import

    own = manifest["model"].get("weights") == "reference"
    checkpoint, reason = _reopen(manifest["model"], folder if own else None)
    if reason and own:
        return {"broken": [*broken, f"the checkpoint in this folder can't be used: {reason}"]}
    missing = [f"the weights were compared with nothing: {reason}"] if reason else []
    graphs = [file for file in outputs if file.endswith(".onnx") and "/" not in file and (folder / file).is_file()]
    try:
        audit = audit_artifact(folder, manifest["model"], graphs, checkpoint, reach=_reach(manifest), progress=progress)
        return {"not_verified": missing, "audit": audit}
    except ToolkitError as error:  # a graph that can't be read
        return {"broken": [*broken, str(error)], "not_verified": missing}


def _reach(manifest: Manifest) -> dict[str, int]:
    """Stage → levels by which its weights may be off the nearest ones, as the report of its quantisation says."""
    reports = {step_id.removeprefix("quantize-"): step["report"] for step_id, step in manifest["steps"].items() if step_id.startswith("quantize-")}
    return {stage: report.get("reach", 0) for stage, report in reports.items()}


def _reopen(model: Report, own: Path | None) -> tuple[Checkpoint | None, str]:
    """The checkpoint that the artifact was made from, or why it can't be had; ``own``: the folder that is both."""
    request = CheckpointRequest.from_record(model.get("request", {"source": model["source"]}))
    if own is not None:
        request = replace(request, source=str(own), revision=None)
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
