"""Whether a graph is loaded whole or run one layer at a time, and why; how near the numbers are to each other, docs/adr/020 says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from artifact.config import LlamaConfig
from artifact.layout import parameter_count
from artifact.room import WHOLE_BESIDES, fits_whole, free_memory


@dataclass(frozen=True)
class Residency:
    """How graphs are run.

    Attributes:
        streamed: one layer at a time.
        reason: why so.
    """

    streamed: bool
    reason: str

    def as_report(self) -> dict[str, Any]:
        """The report's ``execution``: mode and reason."""
        return {"mode": "streamed" if self.streamed else "whole", "reason": self.reason}


WHOLE = Residency(False, "graphs are loaded whole")


def choose_residency(config: LlamaConfig, asked: bool | None = None) -> Residency:
    """What was asked for, or what the free memory allows.

    Args:
        config: its weights, each a float32 in ONNX Runtime whatever the graph stores.
        asked: True for layer by layer, False for whole.
    """
    if asked is not None:
        return Residency(asked, "asked for")
    needed, free = 4 * parameter_count(config), free_memory()
    streamed = not fits_whole(needed, free)
    relation = "more than" if streamed else "within"
    share = f"a quarter of the {free / 1e9:.1f} GB that are free, {WHOLE_BESIDES / 1e9:.0f} GB aside"
    return Residency(streamed, f"{needed / 1e9:.1f} GB of weights in float32, {relation} {share}")
