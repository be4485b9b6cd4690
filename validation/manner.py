"""How a validation is carried out, beyond what it is about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Manner:
    """How stages are run and looked at.

    Attributes:
        streamed: whether graphs are run one layer at a time; None is where they would take too much of the memory (residency.py).
        bisect: whether stages are narrowed to the node where they part from the model.
        edges: whether stages are tried at the edges of their plans' profiles.
    """

    streamed: bool | None = None
    bisect: bool = False
    edges: bool = False


DEFAULT = Manner()
