"""How a step is carried out: found up to date, or done and recorded.

A step is up to date when its options, tool versions, rules (the source files that decide its result) and inputs are those recorded, and its
outputs are still the files it wrote. Whatever differs is named; only what depends on it is done again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from artifact.changed import require_unchanged, written_digest
from artifact.errors import ArtifactError
from artifact.hashing import sha256_of
from artifact.journal import Entry, Journal, is_ours
from artifact.manifest import FINGERPRINT, Manifest, atomic_write, fingerprint, locked, read_manifest, unchanged, write_manifest
from artifact.passport import with_passports
from artifact.progress import Progress, silent
from artifact.stale import hashes_of, stale_maker
from artifact.step_kinds import MADE_BY, STEPS

Report = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class StepContext:
    """What a step's work gets: the folder, a way to write into it, and someone to tell how far it is."""

    artifact: Path
    progress: Progress = silent
    journal: Journal | None = None
    outputs: dict[str, Entry] = field(default_factory=dict)

    @contextmanager
    def write(self, relative: str) -> Iterator[Path]:
        """Give a temporary path; on success the file is synced, renamed to ``relative`` and recorded."""
        with self.write_hashed(relative) as (temporary, _):
            yield temporary

    @contextmanager
    def write_hashed(self, relative: str) -> Iterator[tuple[Path, Entry]]:
        """As ``write``, for a writer that knows what it wrote: it puts ``sha256`` and what else it knows into the entry."""
        known: Entry = {}
        if self.journal is not None:
            self.journal.begin(relative)
        with atomic_write(self.artifact / relative) as temporary:
            yield temporary, known
        entry = fingerprint(self.artifact / relative, known.get("sha256"))
        self.outputs[relative] = entry
        if self.journal is not None:
            self.journal.add(relative, known | entry)

    def finished(self, relative: str) -> Entry | None:
        """The entry of a file that an interrupted run of this step has finished; the file is then an output, and need not be written."""
        entry = self.journal.files.get(relative) if self.journal is not None else None
        if entry is not None:
            self.outputs[relative] = {key: entry[key] for key in FINGERPRINT}
        return entry


@dataclass(frozen=True)
class Outcome:
    """A step's report, and why it was done: an empty reason means it was up to date."""

    report: Report
    reason: str

    @property
    def up_to_date(self) -> bool:
        """Whether nothing had to be done."""
        return not self.reason


def run_step(
    artifact: Path,
    step_id: str,
    options: Mapping[str, Any],
    work: Callable[[StepContext], Report],
    *,
    inputs: tuple[str, ...] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Carry out one step, or find it up to date.

    Args:
        artifact: the folder.
        step_id: a name of ``STEPS``, with a variant after it where there are several.
        options: whatever decides the result beside files; JSON values.
        work: does it, writes through the context and returns the report.
        inputs: patterns beside those of the step's kind.
        force: do it even where it is up to date.
        progress: told what is being done.

    Raises:
        ArtifactError: an input is missing or was changed by hand (the hint says which command makes it), or another run holds the folder.
    """
    with locked(artifact):
        manifest = read_manifest(artifact)
        wanted = _wanted(artifact, manifest, step_id, options, inputs)
        reason = "forced" if force else _why_stale(artifact, manifest["steps"].get(step_id), wanted)
        recorded = {file for step in manifest["steps"].values() for file in step["outputs"]}
        journal = Journal.reopen(artifact, step_id, wanted, recorded)
        if not reason:
            journal.end()
            return Outcome(manifest["steps"][step_id]["report"], "")
        start = time.perf_counter()
        step = StepContext(artifact, progress, journal)
        journal.begin()
        try:
            report = work(step)
        except BaseException:
            journal.end(failed=True)
            raise
        seconds = round(time.perf_counter() - start, 3)
        manifest = read_manifest(artifact)  # the work may have described the model
        remove_stale(artifact, manifest, step_id, step.outputs)
        manifest["steps"][step_id] = {**wanted, "outputs": step.outputs, "seconds": seconds, "report": report}
        write_manifest(artifact, with_passports(artifact, manifest))
        journal.end()
        return Outcome(report, reason)


def why_to_do(artifact: Path, step_id: str, options: Mapping[str, Any], inputs: tuple[str, ...] = ()) -> str:
    """Why ``run_step`` would do a step now; empty where it is up to date. Arguments and errors as there; nothing is written."""
    manifest = read_manifest(artifact)
    return _why_stale(artifact, manifest["steps"].get(step_id), _wanted(artifact, manifest, step_id, options, inputs))


def require(artifact: Path, file: str, *, changed_too: bool = False) -> Path:
    """A file of the artifact that an earlier step makes; ``changed_too``: by hand, since.

    Raises:
        ArtifactError: it is not there, is stale or was changed; the hint is the command that makes it.
    """
    path = artifact / file
    if not path.is_file():
        raise ArtifactError(f"{artifact} has no {file}", hint=MADE_BY.get(file, MADE_BY["traced.onnx"]).format(artifact=artifact))
    manifest = read_manifest(artifact)
    stale = stale_maker(artifact, manifest, file)
    if stale is not None:
        raise ArtifactError(f"{path} is stale: {stale.step} made it from another {stale.file}", hint=stale.command)
    if not changed_too:
        require_unchanged(artifact, manifest, file)
    return path


def _wanted(artifact: Path, manifest: Manifest, step_id: str, options: Mapping[str, Any], inputs: tuple[str, ...]) -> dict[str, Any]:
    """What decides a step's result, as it is now."""
    kind = STEPS[step_id.split("-", maxsplit=1)[0]]
    return {
        "options": dict(options),
        "versions": _versions(kind.packages),
        "rules": rules_hash(kind.rules),
        "inputs": _input_hashes(artifact, manifest, (*inputs, *kind.inputs), refuse_changed=not kind.judges),
    }


def _why_stale(artifact: Path, record: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    if record is None:
        return "not done yet"
    for key in ("options", "versions", "rules", "inputs"):
        if record[key] != wanted[key]:
            return f"{key} changed{_difference(record[key], wanted[key])}"
    changed = [file for file, recorded in record["outputs"].items() if not unchanged(artifact / file, recorded)]
    return f"{changed[0]} is missing or was changed" if changed else ""


def _difference(old: object, new: object) -> str:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return f": {', '.join(keys[:3])}"


def _input_hashes(artifact: Path, manifest: Manifest, patterns: tuple[str, ...], *, refuse_changed: bool) -> dict[str, str]:
    spent = {file: sha256 for step in manifest["steps"].values() for file, sha256 in step.get("spent", {}).items()}
    if patterns and patterns[0] not in spent:
        require(artifact, patterns[0], changed_too=not refuse_changed)
    known = require_unchanged if refuse_changed else written_digest
    hashes = {file: sha256 for file, sha256 in spent.items() if file in patterns}
    for path in sorted({path for pattern in patterns for path in artifact.glob(pattern) if path.is_file()}):
        file = path.relative_to(artifact).as_posix()
        hashes[file] = known(artifact, manifest, file) or sha256_of(path)
    return hashes


def remove_stale(artifact: Path, manifest: Manifest, step_id: str, outputs: Mapping[str, Any]) -> None:
    """Files that this step wrote before, and neither it nor another step writes now, would look as if they belonged."""
    others = {file for name, step in manifest["steps"].items() if name != step_id for file in step["outputs"]}
    in_place = (manifest["model"] or {}).get("weights") == "reference"
    for file in hashes_of(manifest["steps"].get(step_id, {"outputs": {}})):
        if file not in outputs and file not in others and is_ours(artifact, file, in_place=in_place):
            (artifact / file).unlink(missing_ok=True)


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def rules_hash(patterns: tuple[str, ...]) -> str:
    """SHA-256 of the source files that decide a result; patterns from the project's root."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
