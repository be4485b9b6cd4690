"""What a narrowing found, as the report has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import onnx_ir as ir

from artifact.layout import MODULE_KEY
from graphs.diff import describe_node


@dataclass(frozen=True)
class Finding:
    """The node where a stage parts from the model.

    Attributes:
        kind: ``arithmetic`` (it computes something else), ``weight`` (it reads something else), ``rounding`` (its dtype can't hold it) or
            ``exporter`` (the model's own trace is not PyTorch's).
        layer: None outside the layers.
        call: the call in which it shows; None for a weight.
        node: the node.
        tensor: the value that is wrong, and the checkpoint's weight where it is one.
        error, allowed: of the tensor, relative; what the dtype explains.
        words: what is wrong with it.
        suspects: all nodes between the tensor and those before it that are right.
    """

    kind: str
    layer: int | None
    call: str | None
    node: ir.Node
    tensor: str
    error: float
    allowed: float
    words: str
    suspects: Sequence[ir.Node] = ()

    def as_json(self, hint: str) -> dict[str, Any]:
        """The report's entry; an error or a limit that is not finite is null."""
        inputs = [str(value.name) for value in self.node.inputs if value is not None]
        return {
            "kind": self.kind,
            "layer": self.layer,
            "call": self.call,
            "node": str(self.node.name or "?"),
            "op": self.node.op_type,
            "module": self.node.metadata_props.get(MODULE_KEY) or None,
            "inputs": inputs,
            "outputs": [str(value.name) for value in self.node.outputs if value.name],
            "tensor": self.tensor,
            "error": self.error if isfinite(self.error) else None,
            "allowed": self.allowed if isfinite(self.allowed) else None,
            "why": self.words,
            "suspects": [describe_node(node) for node in self.suspects],
            "hint": hint,
        }


UNREAD = "it can't be read of the graph, and the checkpoint's was taken in its place"


@dataclass
class Looked:
    """What was looked at, and what of it came nearest to a fault.

    Attributes:
        nearest: (share of what is allowed, what it is, error, allowed) of the tensor or weight with the largest share.
        unread: weights of the checkpoint that were not compared with the graph's.
    """

    layers: int = 0
    tensors: int = 0
    weights: int = 0
    calls: list[str] = field(default_factory=list)
    nearest: tuple[float, str, float, float] = (0.0, "", 0.0, 0.0)
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def missed(self, names: Sequence[str], why: str = UNREAD) -> None:
        """Weights that are held against nothing."""
        for name in names:
            self.note(f"{name} was not compared: {why}")
            self.unread += [name] if name not in self.unread else []

    def note(self, words: str) -> None:
        """Say it, once."""
        if words not in self.notes:
            self.notes.append(words)

    def see(self, what: str, share: float, error: float, allowed: float) -> None:
        """Count one comparison."""
        if share > self.nearest[0]:
            self.nearest = (share, what, error, allowed)

    def as_json(self) -> dict[str, Any]:
        """The report's ``looked_at``."""
        _, what, error, allowed = self.nearest
        nearest = {"what": what, "error": error if isfinite(error) else None, "allowed": allowed} if what else None
        return {"layers": self.layers, "tensors": self.tensors, "weights": self.weights, "calls": self.calls, "nearest": nearest, "notes": self.notes}
