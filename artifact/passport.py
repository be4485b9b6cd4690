"""The passport of an engine, in ``manifest.json``: checkpoint → graphs → plans by their hashes, what they were made with, and the verdict.

It is made of what the steps recorded, so it can't say more than they did. It binds what belongs together: one look tells whether it still does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from artifact.manifest import Manifest
from artifact.passport_verdict import engine_verdict
from artifact.stale import hashes_of, stale_steps

Passport = dict[str, Any]
PASSPORTS = "passports"
RECORD = "build.json"
CHECKPOINT = ("name", "source", "revision", "format", "fingerprint", "dtype", "kv_cache")
ENGINE = (
    *("precision", "target", "compute_capability", "backend", "tensorrt_version"),
    *("max_batch", "max_length", "capacity", "kv_cache", "profiles", "flags"),
)
CONTENT = (
    *("precision", "compute_capability", "tensorrt_version", "bytes", "bytes_per_weight", "network_layers", "graph_sha256"),
    *("profiles", "flags", "kernels_by_profile", "kernels_by_layer"),
)
"""What of ``build.json`` is the same in every build of one graph."""
PLAN_BYTES = {
    "tensorrt-rtx": "another build gives the same size, constants and kernels; its tables of inputs and outputs, at the head and behind the program, "
    "are in another order (at most 0.2 % of the bytes measured): content_sha256 is of what is the same"
}
"""Backend → what of a plan is the same in every build, and what is not (docs/reproducibility.md)."""
PLAN = ("file", "bytes", "plan_sha256", "graph", "graph_sha256", "part", "layers")


def with_passports(artifact: Path, manifest: Manifest) -> Manifest:
    """The manifest with a passport for each engine that its steps recorded; without engines, as it is."""
    others = {key: value for key, value in manifest.items() if key != PASSPORTS}
    made = make_passports(artifact, manifest)
    return others | {PASSPORTS: made} if made else others


def passports_of(artifact: Path, manifest: Manifest) -> dict[str, Passport]:
    """The recorded passports; those of an artifact from before there were any are made of its steps."""
    found: dict[str, Passport] | None = manifest.get(PASSPORTS)
    return make_passports(artifact, manifest) if found is None else found


def make_passports(artifact: Path, manifest: Manifest) -> dict[str, Passport]:
    """Engine (its folder in ``engines/``) → its passport, from what the steps recorded."""
    steps: Mapping[str, Any] = manifest["steps"]
    stale = stale_steps(artifact, manifest)
    made = {}
    for step_id, step in steps.items():
        for record in (file for file in step["outputs"] if file.endswith(f"/{RECORD}")):
            entries = (step["report"] or {}).get("engines") or []
            if entries:
                folder = record.split("/")[-2]
                why_stale = stale[step_id].words if step_id in stale else None
                made[folder] = _passport(manifest, folder, step_id, entries) | {"stale": why_stale}
    return made


def _passport(manifest: Manifest, folder: str, step_id: str, entries: list[dict[str, Any]]) -> Passport:
    steps, first = manifest["steps"], entries[0]
    chain = list(_lineage(steps, step_id))
    graphs = {file: record["sha256"] for name in chain for file, record in steps[name]["outputs"].items() if file.endswith(".onnx")}
    return {
        "checkpoint": {key: manifest["model"][key] for key in CHECKPOINT if key in manifest["model"]},
        "graphs": graphs,
        "weights_sha256": _weights_hash(steps, chain),
        "plans": [{key: entry[key] for key in PLAN if key in entry} | {"content_sha256": content_hash(entry)} for entry in entries],
        **{key: first[key] for key in ENGINE if key in first},
        "plan_bytes": PLAN_BYTES.get(first["backend"], "not measured: whether another build gives the same bytes"),
        "tools": {name: steps[name]["versions"] for name in chain},
        "made_by": {name: steps[name]["options"] for name in chain},
        "parity": engine_verdict(steps.get("validate"), folder, graphs, entries),
    }


def content_hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 of what two builds of one graph have in common, where their plans' own bytes differ (docs/reproducibility.md)."""
    return hashlib.sha256(json.dumps({key: entry.get(key) for key in CONTENT}, sort_keys=True).encode()).hexdigest()


def _lineage(steps: Mapping[str, Any], step_id: str) -> Iterator[str]:
    """The steps from the export to this one: each whose output the next one read."""
    found, wanted = [step_id], set(steps[step_id]["inputs"])
    for _ in steps:
        makers = [name for name, step in steps.items() if name not in found and name != "validate" and wanted & hashes_of(step).keys()]
        found = [*makers, *found]
        wanted = {file for name in makers for file in steps[name]["inputs"]}
    yield from (name for name in steps if name in found)


def _weights_hash(steps: Mapping[str, Any], chain: list[str]) -> str:
    """SHA-256 of the list of every weights file's hash: one word for all weights that the chain wrote."""
    written = {file: record["sha256"] for name in chain for file, record in steps[name]["outputs"].items() if file.startswith("weights/")}
    return hashlib.sha256("".join(f"{file} {sha256}\n" for file, sha256 in sorted(written.items())).encode()).hexdigest()
