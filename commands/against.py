"""What ``validate --against`` names: transformers, another graph or artifact, or the reference's kept predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from artifact.errors import UsageError
from artifact.manifest import MANIFEST

TRANSFORMERS, TORCH = "transformers", "torch"
"""``torch`` is our reference, which every stage is held against anyway."""
HINT = "--against transformers | ARTIFACT FOLDER | FILE.onnx | FILE.safetensors of --save-reference"


@dataclass(frozen=True)
class Against:
    """What to hold a validation against; ``path`` is None of ``transformers``."""

    kind: Literal["transformers", "graph", "artifact", "kept"]
    path: Path | None = None


def read_against(text: str | None) -> Against | None:
    """What an option's text names; None is the reference alone. The words win over a folder of their name: ``./transformers`` is the folder.

    Raises:
        UsageError: nothing of that name, or a file of another kind.
    """
    if text in (None, TORCH):
        return None
    assert text is not None
    path = Path(text)
    if text == TRANSFORMERS:
        return Against("transformers")
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise UsageError(f"--against {text}: no artifact folder, it has no {MANIFEST}", hint=HINT)
        return Against("artifact", path)
    kinds: dict[str, Literal["graph", "kept"]] = {".onnx": "graph", ".safetensors": "kept"}
    if path.suffix not in kinds:
        raise UsageError(f"--against {text}: neither transformers, nor a folder, nor an .onnx or .safetensors file", hint=HINT)
    if not path.is_file():
        raise UsageError(f"--against {text}: there is no such file", hint=HINT)
    return Against(kinds[path.suffix], path)
