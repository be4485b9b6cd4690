"""What `inspect` says of engines: the passport, whether its files still belong together, and why a plan can't run here, before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from artifact.errors import ArtifactError
from artifact.hashing import sha256_of
from artifact.manifest import Manifest, fingerprint, read_manifest
from artifact.passport import RECORD, passports_of
from engines import device as devices
from engines.runnable import foreign_graph, foreign_plan, made_for_another, why_not_here

Report = dict[str, Any]
KIND = "TensorRT plan"
NEEDED = ("file", "plan_sha256", "backend", "tensorrt_version", "compute_capability", "target")
"""What is asked of every entry of a record."""


def inspect_plan(path: Path) -> Report:
    """A plan, by the record beside it.

    Raises:
        ArtifactError: it is not there, or its record can't be read.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is not there")
    named: Report = {"path": str(path), "kind": KIND}
    record = path.parent / RECORD
    if not record.is_file():
        return named | {"note": f"no {RECORD} beside it: made by another tool", "file": fingerprint(path)}
    entry = next((entry for entry in _entries(record) if Path(entry["file"]).name == path.name), None)
    if entry is None:
        return named | {"note": f"{RECORD} beside it does not name this file", "file": fingerprint(path)}
    artifact, entry = _home(path, entry)
    manifest = read_manifest(artifact)
    recorded = _recorded(artifact, manifest, record)
    other_plan, other_graph = foreign_plan(artifact, entry), foreign_graph(artifact, entry)
    foreign = [line for line in (other_plan, other_graph, _unlike_record(artifact, record, recorded)) if line]
    unseen = [*_unseen(artifact, entry, recorded)]
    reasons = [*foreign, *made_for_another(entry, devices.find_device())]
    together = f"plan is the one recorded; {'; '.join(unseen)}" if unseen else "plan, graph and record belong together"
    return named | {
        "passed": False if foreign else None if unseen else True,
        "words": foreign[0] if foreign else together,
        "as_built": other_plan is None,
        "runs_here": not reasons,
        "why_not_here": reasons,
        "passport": passports_of(artifact, manifest).get(path.parent.name),
        **{key: value for key, value in entry.items() if key != "file"},
    }


def _home(path: Path, entry: Report) -> tuple[Path, Report]:
    """The artifact that a plan lies in; of one that has left it, its own folder, with no graph to hold it against."""
    plan = path.resolve()
    if any((home / entry["file"]).resolve() == plan for home in plan.parents[2:3]):
        return plan.parents[2], entry
    return plan.parent, entry | {"file": path.name, "graph_sha256": None}


def _unseen(artifact: Path, entry: Report, recorded: str | None) -> Iterator[str]:
    """What could not be held against the record, and against what the record could not be."""
    if entry.get("graph_sha256") is None or not (artifact / entry["graph"]).is_file():
        yield "its graph is not here"
    if recorded is None:
        yield f"no manifest names its {RECORD}"


def describe_engines(artifact: Path, manifest: Manifest) -> dict[str, Report]:
    """Engine → its passport, in short: what it is, the verdict on it, and why it can't run here."""
    device = devices.find_device()
    described: dict[str, Report] = {}
    for folder, passport in passports_of(artifact, manifest).items():
        record = artifact / "engines" / folder / RECORD
        entries = _entries(record) if record.is_file() else []
        reasons = [reason for entry in entries if (reason := why_not_here(artifact, entry, device))]
        stale = [passport["stale"]] if passport.get("stale") else []
        described[folder] = {
            "plans": ", ".join(f"{plan['file']} {plan['plan_sha256'][:12]}…" for plan in passport["plans"]),
            "of": f"{passport['checkpoint']['name']}, {passport['precision']}, for {passport['target']} ({passport['compute_capability']})",
            "built_by": f"{passport['backend']} {passport['tensorrt_version']}",
            "parity": passport["parity"]["words"],
            "why_not_here": "; ".join([*stale, *reasons[:1]] if entries else [f"engines/{folder}/{RECORD} is not there"]) or None,
        }
    return described


def _entries(record: Path) -> list[Report]:
    """The entries of a ``build.json``, each with all that is asked of it."""
    try:
        found: list[Report] = json.loads(record.read_text(encoding="utf-8"))["engines"]
        return [entry | {key: entry[key] for key in NEEDED} for entry in found]
    except (ValueError, KeyError, TypeError) as error:
        lacking = f"an engine in it lacks {error}" if isinstance(error, KeyError) and error.args[0] in NEEDED else f"{error!r}"
        raise ArtifactError(f"{record} can't be read: {lacking}", hint="build the engine again") from error


def _recorded(artifact: Path, manifest: Manifest, record: Path) -> str | None:
    """SHA-256 of a record as the manifest has it; None where no step wrote it, or a plan has left its artifact."""
    file = record.resolve().relative_to(artifact).as_posix()
    hashes = [step["outputs"][file]["sha256"] for step in manifest["steps"].values() if file in step["outputs"]]
    return hashes[-1] if hashes else None


def _unlike_record(artifact: Path, record: Path, recorded: str | None) -> str | None:
    """Why the record itself is not the one that the build wrote, as the manifest says."""
    if recorded in (None, sha256_of(record)):
        return None
    return f"{record.resolve().relative_to(artifact).as_posix()} is not the record that the build wrote"
