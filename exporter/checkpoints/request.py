"""What a user asks to be opened: where the weights are, and what must hold of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from artifact.errors import CheckpointError, UsageError
from artifact.presets import PRESETS, repository

RANDOM = re.compile(r"random(:.*)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = frozenset({".gguf", ".safetensors", ".bin", ".pth", ".json", ".onnx", ".plan"})
"""What ends so is a file that is not there, and no model on the hub."""


SOURCES = "give a folder, a .gguf file, ORG/NAME on the hub, random[:SEED] or 'demo'"


@dataclass(frozen=True)
class CheckpointRequest:
    """The options that decide which model is read; recorded in the manifest, so that ``validate`` opens the same one again.

    Attributes:
        source: what ``--checkpoint`` said; None is the published model of ``size``.
        size: ``13b``, ``70b-chat``, ``llama1-7b`` …; with a source, the two must agree.
        revision: branch, tag or commit of a hub repository; None is its default branch.
        config: a config.json, for random weights of a shape that no size has.
        lora: folder of a PEFT adapter to merge into the weights.
    """

    source: str | None = None
    size: str | None = None
    revision: str | None = None
    config: Path | None = None
    lora: Path | None = None

    def as_record(self) -> dict[str, str]:
        """The options that were given, as the manifest keeps them; paths absolute."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: str(value.expanduser().resolve()) if isinstance(value, Path) else value for name, value in given.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CheckpointRequest:
        """The request that ``as_record`` wrote."""
        paths = {name: Path(record[name]) for name in ("config", "lora") if name in record}
        return cls(**{**record, **paths})

    @property
    def is_random(self) -> bool:
        """Whether weights are made up: ``random`` or ``random:SEED``."""
        return self.source is not None and RANDOM.fullmatch(self.source) is not None

    def check(self) -> None:
        """Refuse options that don't go together, before anything is opened.

        Raises:
            UsageError: names the option that is missing or too many.
        """
        if self.size is not None and self.size not in PRESETS:
            raise UsageError(f"--size {self.size!r} is not a published size", hint=f"one of: {' '.join(PRESETS)}")
        if self.config is not None and not self.is_random:
            raise UsageError("--config says the shape of random weights, and nothing else", hint="--checkpoint random --config FILE")
        if self.is_random and (self.size is None) == (self.config is None):
            raise UsageError(f"--checkpoint {self.source} needs a shape, and one only", hint="--size 7b, or --config FILE")
        of_hub = self.size is not None if self.source is None else hub_id(self.source) is not None
        if self.revision is not None and not of_hub:
            raise UsageError("--revision is of a model on the hub", hint="--size 7b or --checkpoint ORG/NAME goes with it")

    def repository(self) -> str | None:
        """The model on the hub that is meant; None where something else is.

        Raises:
            CheckpointError: a size that has none.
        """
        if self.source is not None:
            return hub_id(self.source)
        return repository(self.size) if self.size is not None else None


def local_path(source: str) -> Path:
    """The path that a text names, `~` expanded; there need be nothing.

    Raises:
        CheckpointError: a text that no file can be named by.
    """
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or in a folder that is closed to us; `~nobody`
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{source:.60}{'…' if len(source) > 60 else ''}: not a path that can be looked at: {reason}", hint=SOURCES) from error
    return path


def hub_id(source: str) -> str | None:
    """The text itself where it names a model on the hub: ``ORG/NAME``, and nothing of that name is here."""
    if not _HUB_ID.fullmatch(source) or ".." in source or Path(source).suffix.lower() in _FILES or local_path(source).exists():
        return None
    return source
