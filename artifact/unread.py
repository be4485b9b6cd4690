"""Files of steps that nothing needs any more: taken back with their step, or deleted while the step stays done."""

from __future__ import annotations

from pathlib import Path

from artifact.manifest import locked, read_manifest, write_manifest
from artifact.passport import with_passports
from artifact.stale import hashes_of
from artifact.steps import remove_stale


def forget_step(artifact: Path, step_id: str) -> None:
    """Take back a step whose files no recorded step reads any more: its files, and what is recorded of it."""
    with locked(artifact):
        manifest = read_manifest(artifact)
        files = hashes_of(manifest["steps"].get(step_id, {"outputs": {}}))
        if files and not any(file in step["inputs"] for step in manifest["steps"].values() for file in files):
            remove_stale(artifact, manifest, step_id, {})
            del manifest["steps"][step_id]
            write_manifest(artifact, with_passports(artifact, manifest))


def spend_step(artifact: Path, step_id: str) -> dict[str, int]:
    """Delete a step's files that no step to come will read where nothing changes; it stays done, and its readers up to date.

    Returns:
        File → bytes that were freed.
    """
    with locked(artifact):
        manifest = read_manifest(artifact)
        step = manifest["steps"].get(step_id)
        if step is None:
            return {}
        if step["outputs"]:
            step["spent"], step["outputs"] = hashes_of(step), {}
            write_manifest(artifact, with_passports(artifact, manifest))
        spent = step.get("spent", ())
        there = {file: (artifact / file).stat().st_size for file in spent if (artifact / file).is_file()}  # what an interrupted run left too
        remove_stale(artifact, manifest, step_id, {})
        return {file: size for file, size in there.items() if not (artifact / file).exists()}


def is_spent(artifact: Path, step_id: str) -> bool:
    """Whether a step's files were deleted since it was done."""
    return "spent" in read_manifest(artifact)["steps"].get(step_id, {})
