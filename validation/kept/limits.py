"""What a stage must hold where it is judged by the reference's kept predictions alone: what the table has for texts, and the worst part."""

from __future__ import annotations

from collections.abc import Mapping

from validation.part_kl import PART
from validation.side import Side
from validation.tolerances import LIMITS, NO_FLOOR, TEXT_CHECKS, Kind, Limit
from validation.watched import fault_limits

FEW = "nats, the worst of each row's prompt, chunk or steps: twice what the text may have, because they are few positions; int8 measures 0.004"
TEXT_LIMITS: Mapping[Kind, float] = {row.kind: row.limit for row in LIMITS if row.check == "mean_kl" and row.kind.startswith("int")}
ROWS = (
    Limit("float32", "mean_kl", "<=", 1e-6, "nats; float32 kernels measure 1e-11"),
    Limit("float32", PART, "<=", 1e-6, "nats; float32 kernels measure 1e-11"),
    Limit("float16", PART, "<=", 1e-3, "nats, the worst of each row's prompt, chunk or steps; float16 graphs measure 2e-5"),
    *(Limit(kind, PART, "<=", 2 * limit, FEW) for kind, limit in TEXT_LIMITS.items()),
)


def kept_limits(side: Side, *, streamed: bool) -> list[Limit]:
    """The rows of a graph; for int4, which has no limit for quality, those that every graph must hold alone."""
    asked = [row for row in (*LIMITS, *NO_FLOOR, *ROWS) if row.kind == side.kind]
    return [*(row for row in asked if row.check in (*TEXT_CHECKS, PART)), *fault_limits(side.kind, [side], streamed=streamed)]
