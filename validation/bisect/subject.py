"""What is narrowed: a stage's graph, its trusted counterpart and what both are compared by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from validation.bisect.finding import Looked
from validation.bisect.trusted import Trusted
from validation.oracle import Oracle

Array = NDArray[Any]


@dataclass(frozen=True)
class Subject:
    """A graph and its trusted counterpart.

    Attributes:
        model: the stage's graph, its layers' boundaries parted.
        smoothed: whether its weights were smoothed, so that they are the checkpoint's up to factors.
        cuts: what layers share, in float32: the graph's and the trusted one's.
        tables: the rotary tables that it reads, float32.
        shared: call → every value that its shared cut computes, and every one that the trusted one does, by name.
    """

    model: ir.Model
    trusted: Trusted
    oracle: Oracle
    looked: Looked
    smoothed: bool
    cuts: tuple[ir.Model, ir.Model]
    tables: dict[str, Array]
    shared: dict[str, tuple[dict[str, Array], dict[str, Array]]] = field(default_factory=dict)
