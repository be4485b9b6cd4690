"""What an interrupted step has finished: a visible file that makes the folder look unfinished, and lets the same command carry on.

`unfinished-<step>.json` is there from a step's first file to the end of the step, which moves its entries into the manifest. A power cut may lose
its last entries, and then their files are written again; what it lists was synced before it was listed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifact.manifest import UNFINISHED, atomic_write, unchanged

Entry = dict[str, Any]
OUR_FOLDERS = ("weights", "engines", "reports")


def unfinished_steps(artifact: Path) -> list[str]:
    """Ids of the steps that were interrupted in this folder."""
    prefix, suffix = UNFINISHED.split("*")
    return sorted(path.name.removeprefix(prefix).removesuffix(suffix) for path in artifact.glob(UNFINISHED))


def is_ours(artifact: Path, file: str, *, in_place: bool = False) -> bool:
    """Whether a recorded name may be one of a step's files: inside the folder, and in a checkpoint's own folder only where no checkpoint has any."""
    inside = (artifact / file).resolve().is_relative_to(artifact.resolve())
    return inside and (not in_place or file.endswith(".onnx") or file.split("/", maxsplit=1)[0] in OUR_FOLDERS)


@dataclass
class Journal:
    """The files that one step has finished so far.

    Attributes:
        wanted: options, versions, rules and inputs of the step; another step's files are not carried on with.
        files: path → size, mtime_ns, sha256, and what its writer knows about it.
    """

    artifact: Path
    step_id: str
    wanted: Mapping[str, Any]
    files: dict[str, Entry] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.artifact / UNFINISHED.replace("*", self.step_id)

    @classmethod
    def reopen(cls, artifact: Path, step_id: str, wanted: Mapping[str, Any], kept: set[str]) -> Journal:
        """Carry on with what an interrupted run of the same step wrote, or clear it away where it was another: all but the files ``kept``."""
        journal = cls(artifact, step_id, wanted)
        try:
            record = json.loads(journal.path.read_text(encoding="utf-8"))
            files, same = dict(record["files"]), record["wanted"] == json.loads(json.dumps(wanted))
        except (OSError, ValueError, TypeError, KeyError):
            files, same = {}, False  # none, or cut off by a power cut
        journal.files = {file: entry for file, entry in files.items() if same and unchanged(artifact / file, entry)}
        in_place = wanted["options"].get("weights") == "reference"
        for file in files.keys() - journal.files.keys() - kept:
            if is_ours(artifact, file, in_place=in_place):
                (artifact / file).unlink(missing_ok=True)
        return journal

    def begin(self) -> None:
        """Make the folder look unfinished before the first byte."""
        if not self.path.exists():
            self._save()

    def add(self, file: str, entry: Entry) -> None:
        """A file is whole and synced."""
        self.files[file] = entry
        self._save()

    def end(self, *, failed: bool = False) -> None:
        """The step is done, or failed: then what is finished stays for the next try."""
        if not (failed and self.files):
            self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        with atomic_write(self.path, durable=False) as temporary:
            temporary.write_text(json.dumps({"step": self.step_id, "wanted": self.wanted, "files": self.files}) + "\n", encoding="utf-8")
