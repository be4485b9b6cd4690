"""Stored bytes are the bytes that were written: every tensor, every header, every graph. Checked before anything is measured.

A flipped bit can be smaller than float16's own noise, so no measurement would show it; a hash does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifact.errors import ArtifactError
from artifact.hashing import hash_span, sha256_of, tensor_digest
from artifact.manifest import Manifest
from artifact.progress import Progress, silent
from artifact.stale import command_of
from artifact.tensor_file import CHECKSUMS, StoredTensor, plan_tensors, read_checksums

LISTS = "weights/*checksums.json"
OWN_STEP = "validate"


@dataclass
class ChecksumReport:
    """What was verified, and what is not what was written.

    Attributes:
        verified: tensors and files that are.
        failed: file, tensor (None for a whole file), expected, got; where a step is stale also the step, and as hint the command that redoes it.
    """

    verified: int = 0
    failed: list[dict[str, str | None]] = field(default_factory=list)

    def as_report(self) -> dict[str, Any]:
        """verified, failed and passed."""
        return {"verified": self.verified, "failed": self.failed, "passed": not self.failed}

    def record(self, file: str, tensor: str | None, expected: str, got: str) -> None:
        """Count one comparison."""
        if expected == got:
            self.verified += 1
        else:
            self.failed.append({"file": file, "tensor": tensor, "expected": expected, "got": got})


def verify_checksums(artifact: Path, manifest: Manifest, progress: Progress = silent) -> ChecksumReport:
    """Hash every stored tensor and every recorded file again.

    Args:
        artifact: the folder.
        manifest: its manifest: which files the steps wrote, and their SHA-256.
        progress: told which file is read.

    Raises:
        ArtifactError: there is no list of tensors.
    """
    report = ChecksumReport()
    lists = sorted({CHECKSUMS, *(path.relative_to(artifact).as_posix() for path in artifact.glob(LISTS))})
    by_file: dict[str, list[StoredTensor]] = defaultdict(list)
    for name in lists:
        for tensor in _read_list(artifact, name, report):
            by_file[tensor.file].append(tensor)
    for done, (file, tensors) in enumerate(by_file.items()):
        progress(f"checking {file}", done, len(by_file))
        _verify_weights(artifact, file, tensors, report)
    for file, hashes in _recorded(manifest).items():
        if file not in by_file:
            _verify_file(artifact, file, hashes, report)
    _verify_lineage(artifact, manifest, report)
    for path in sorted(artifact.glob("*.onnx")):
        if path.name not in _recorded(manifest):
            report.record(path.name, None, "recorded in manifest.json", "not recorded by any step")
    return report


def _verify_lineage(artifact: Path, manifest: Manifest, report: ChecksumReport) -> None:
    """Every step read the files that are there now: an engine of yesterday's weights is not an engine of this model."""
    recorded = _recorded(manifest)
    for name, step in manifest["steps"].items():
        for file, sha256 in step["inputs"].items() if name != OWN_STEP else ():
            now = recorded.get(file, {sha256})
            if sha256 in now:
                report.record(file, None, sha256, sha256)
            else:
                stale = {"file": file, "tensor": None, "expected": f"{sha256}, which {name} was made from", "got": min(now)}
                report.failed.append(stale | {"step": name, "hint": command_of(artifact, name, step["options"])})


def _read_list(artifact: Path, name: str, report: ChecksumReport) -> list[StoredTensor]:
    try:
        return list(read_checksums(artifact, name).values())
    except ArtifactError as error:
        if not (artifact / name).exists():
            raise
        report.record(name, None, "a list of tensors", str(error))
        return []


def _verify_weights(artifact: Path, file: str, tensors: list[StoredTensor], report: ChecksumReport) -> None:
    """Tensor by tensor; and in files that this toolkit wrote, the header against the one that these tensors give."""
    path = artifact / file
    if not path.is_file() or not path.resolve().is_relative_to(artifact.resolve()):
        report.record(file, None, f"{len(tensors)} tensors", "missing")
        return
    if not file.startswith("weights/"):  # the checkpoint's own file, used where it lies
        with path.open("rb") as stream:
            for tensor in tensors:
                report.record(file, tensor.name, tensor.blake3, hash_span(stream, tensor.offset, tensor.length))
        return
    try:
        header, planned = plan_tensors(file, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    except KeyError as error:
        report.record(file, None, "a known dtype", str(error))
        return
    with path.open("rb") as stream:
        report.record(file, None, tensor_digest().update(header).hexdigest(), hash_span(stream, 0, len(header)))
        for tensor, place in zip(tensors, planned, strict=True):
            if (tensor.offset, tensor.length) != (place.offset, place.length):
                report.record(file, tensor.name, f"bytes {place.offset} + {place.length}", f"bytes {tensor.offset} + {tensor.length}")
                continue
            report.record(file, tensor.name, tensor.blake3, hash_span(stream, tensor.offset, tensor.length))
        end = planned[-1].offset + planned[-1].length
        if path.stat().st_size != end:
            report.record(file, None, f"{end} bytes", f"{path.stat().st_size} bytes")


def _verify_file(artifact: Path, file: str, hashes: set[str], report: ChecksumReport) -> None:
    path = artifact / file
    got = sha256_of(path) if path.is_file() else "missing"
    report.record(file, None, got if got in hashes else sorted(hashes)[0], got)


def _recorded(manifest: Mapping[str, Any]) -> dict[str, set[str]]:
    """File → the hashes that steps recorded for it (two builds may write one engine graph), without this step's own reports."""
    recorded: dict[str, set[str]] = defaultdict(set)
    for file, sha256 in _outputs(manifest):
        recorded[file].add(sha256)
    return dict(recorded)


def _outputs(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, step in manifest["steps"].items():
        if name != OWN_STEP:
            yield from ((file, record["sha256"]) for file, record in step["outputs"].items())
