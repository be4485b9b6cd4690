"""What a user asks to be opened: where the weights are, and what must hold of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


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
