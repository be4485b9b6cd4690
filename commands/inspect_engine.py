"""What `inspect` says of engines: the passport, whether its files still belong together, and why a plan can't run here, before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifact.errors import ArtifactError
from artifact.hashing import sha256_of
from artifact.manifest import Manifest, fingerprint, read_manifest
from artifact.passport import RECORD, passports_of
from engines import device as devices
from engines.runnable import foreign_files, obstacles, why_not_here

Report = dict[str, Any]
KIND = "TensorRT plan"


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
    foreign = [*foreign_files(artifact, entry), *_unlike_record(artifact, record)]
    reasons = [*dict.fromkeys((*obstacles(artifact, entry, devices.find_device()), *foreign))]
    return named | {
        "passed": not foreign,
        "words": foreign[0] if foreign else "plan, graph and record belong together",
        "as_built": sha256_of(path) == entry["plan_sha256"],
        "runs_here": not reasons,
        "why_not_here": reasons,
        "passport": _passport(artifact, path.parent.name),
        **{key: value for key, value in entry.items() if key != "file"},
    }


def _home(path: Path, entry: Report) -> tuple[Path, Report]:
    """The artifact that a plan lies in; of one that has left it, its own folder, with no graph to hold it against."""
    artifact = path.resolve().parents[2]
    if (artifact / entry["file"]).resolve() == path.resolve():
        return artifact, entry
    return path.resolve().parent, entry | {"file": path.name, "graph_sha256": None}


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
    try:
        found: list[Report] = json.loads(record.read_text(encoding="utf-8"))["engines"]
        return [entry | {"file": entry["file"], "plan_sha256": entry["plan_sha256"]} for entry in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{record} can't be read: {error!r}", hint="build the engine again") from error


def _unlike_record(artifact: Path, record: Path) -> list[str]:
    """Whether the record itself is the one that the build wrote, as the manifest says; a plan may have left its artifact."""
    file = record.resolve().relative_to(artifact).as_posix()
    outputs = [step["outputs"] for step in read_manifest(artifact)["steps"].values() if file in step["outputs"]]
    if not outputs or outputs[-1][file]["sha256"] == sha256_of(record):
        return []
    return [f"{file} is not the record that the build wrote"]


def _passport(artifact: Path, folder: str) -> Report | None:
    return passports_of(artifact, read_manifest(artifact)).get(folder)
