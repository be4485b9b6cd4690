"""What an interrupted step has finished: a visible file that makes the folder look unfinished, and lets the same command carry on.

`unfinished-<step>.json` is there from a step's first moment to the end of the step, which moves its entries into the manifest. A file is named in
it before its first byte, so that whatever the step left behind can be told from somebody's own files; and listed with its hash once it was synced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifact.calibration import CALIBRATIONS
from artifact.manifest import UNFINISHED, atomic_write, unchanged

Entry = dict[str, Any]
OUR_FOLDERS = ("weights", "engines", "reports")
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pth", ".pt")
"""What a checkpoint's weights end in; ours lie in ``OUR_FOLDERS``."""


def unfinished_steps(artifact: Path) -> list[str]:
    """Ids of the steps that were interrupted in this folder."""
    prefix, suffix = UNFINISHED.split("*")
    return sorted(path.name.removeprefix(prefix).removesuffix(suffix) for path in artifact.glob(UNFINISHED))


def is_ours(artifact: Path, file: str, *, in_place: bool = False) -> bool:
    """Whether a recorded name may be one of a step's files: inside the folder, and no checkpoint's; in its own folder that is all it may have."""
    if not (artifact / file).resolve().is_relative_to(artifact.resolve()):
        return False
    return (
        file in CALIBRATIONS or file.split("/", maxsplit=1)[0] in OUR_FOLDERS or (file.endswith(".onnx") if in_place else not file.endswith(WEIGHTS))
    )


@dataclass
class Journal:
    """The files that one step has finished so far.

    Attributes:
        wanted: options, versions, rules and inputs of the step; another step's files are not carried on with.
        files: path → size, mtime_ns, sha256, and what its writer knows about it.
        writing: paths that were begun and are not in ``files``.
    """

    artifact: Path
    step_id: str
    wanted: Mapping[str, Any]
    files: dict[str, Entry] = field(default_factory=dict)
    writing: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.artifact / UNFINISHED.replace("*", self.step_id)

    @classmethod
    def reopen(cls, artifact: Path, step_id: str, wanted: Mapping[str, Any], kept: set[str]) -> Journal:
        """Carry on with what an interrupted run of the same step wrote, or clear it away where it was another: all but the files ``kept``."""
        journal = cls(artifact, step_id, wanted)
        found = read_record(journal.path)
        same = found.wanted == json.loads(json.dumps(wanted))
        journal.files = {file: entry for file, entry in found.files.items() if same and unchanged(artifact / file, entry)}
        in_place = found.in_place or wanted["options"].get("weights") == "reference"
        for file in found.named - journal.files.keys() - kept:
            if is_ours(artifact, file, in_place=in_place):
                (artifact / file).unlink(missing_ok=True)
        return journal

    def begin(self, file: str | None = None) -> None:
        """Make the folder look unfinished before anything is done, and name a file before its first byte."""
        if file is not None:
            self.files.pop(file, None)
            self.writing.append(file)
        self._save()

    def add(self, file: str, entry: Entry) -> None:
        """A file is whole and synced."""
        self.files[file] = entry
        self.writing.remove(file)
        self._save()

    def end(self, *, failed: bool = False) -> None:
        """The step is done, or failed: then what is finished stays for the next try."""
        if not (failed and self.files):
            self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        record = {"step": self.step_id, "wanted": self.wanted, "files": self.files, "writing": self.writing}
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Record:
    """What lies in a journal's file; empty where it can't be read."""

    wanted: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Entry] = field(default_factory=dict)
    writing: tuple[str, ...] = ()

    @property
    def in_place(self) -> bool:
        """Whether the step worked in a checkpoint's own folder."""
        return bool(self.wanted.get("options", {}).get("weights") == "reference")

    @property
    def named(self) -> set[str]:
        """Every file that the step has begun."""
        return {*self.files, *self.writing}


def read_record(path: Path) -> Record:
    """What a journal says."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Record(dict(record["wanted"]), dict(record["files"]), tuple(record.get("writing", ())))
    except (OSError, ValueError, TypeError, KeyError):
        return Record()  # none, or no journal of ours
