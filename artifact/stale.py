"""Which recorded steps were made from files that have been written anew since: what they wrote is of another model, or of an older form of it."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifact.manifest import Manifest

DONE_BY = {"calibrate": "quantize", "smoothing": "quantize", "sensitivity": "quantize"}
"""Step → the command that does it, where it is no command itself."""
NO_FLAGS = ("sha256", "text", "baseline", "stages")
"""Recorded options that are not given again: a hash stands for what was given, and a report on some stages proves nothing of the others."""


@dataclass(frozen=True)
class Stale:
    """A step that must be done again.

    Attributes:
        step: its id.
        file: the input that is another one now, or is stale itself.
        command: does the step again.
    """

    step: str
    file: str
    command: str

    @property
    def words(self) -> str:
        """``fuse is stale: it was made from another traced.onnx; python cli.py fuse ART``."""
        return f"{self.step} is stale: it was made from another {self.file}; {self.command}"


def stale_steps(artifact: Path, manifest: Manifest) -> dict[str, Stale]:
    """Step id → why it is stale, by what the manifest records; no file is read."""
    steps: Mapping[str, Mapping[str, Any]] = manifest["steps"]
    found: dict[str, Stale] = {}
    for _ in steps:  # what a stale step wrote makes its readers stale: as many rounds as there are steps are enough
        now = _current_hashes(steps, found)
        for name, step in steps.items():
            changed = next((file for file, sha256 in step["inputs"].items() if name not in found and sha256 not in now.get(file, {sha256})), None)
            if changed is not None:
                found[name] = Stale(name, changed, command_of(artifact, name, step["options"]))
    return found


def stale_maker(artifact: Path, manifest: Manifest, file: str) -> Stale | None:
    """Why a file is stale; None where a step that is not stale wrote it, or none did."""
    makers = [name for name, step in manifest["steps"].items() if file in step["outputs"]]
    stale = stale_steps(artifact, manifest)
    return stale[makers[0]] if makers and all(name in stale for name in makers) else None


def command_of(artifact: Path, step_id: str, options: Mapping[str, Any]) -> str:
    """The command that does a recorded step again: its options are those of the command line."""
    flags = [word for key, value in options.items() if key not in NO_FLAGS for word in _flag(f"--{key.replace('_', '-')}", value)]
    kind = step_id.split("-", maxsplit=1)[0]
    return shlex.join(["python", "cli.py", DONE_BY.get(kind, kind), str(artifact), *flags])


def _flag(flag: str, value: Any) -> list[str]:
    """``--max-batch 4``; ``--force`` where it is on; nothing of another step's options."""
    if value is None or value is False or isinstance(value, Mapping):
        return []
    if value is True:
        return [flag]
    return [flag, str(value)]


def hashes_of(step: Mapping[str, Any]) -> dict[str, str]:
    """File → the hash that a step recorded, of files that were deleted since (``spend_step``) too."""
    return {**step.get("spent", {}), **{file: record["sha256"] for file, record in step["outputs"].items()}}


def _current_hashes(steps: Mapping[str, Mapping[str, Any]], stale: Mapping[str, Stale]) -> dict[str, set[str]]:
    """File → the hashes that steps recorded for it (two builds may write one engine graph); none for what only stale steps wrote."""
    hashes: dict[str, set[str]] = defaultdict(set)
    for name, step in steps.items():
        for file, sha256 in hashes_of(step).items():
            hashes[file] |= set() if name in stale else {sha256}
    return dict(hashes)
