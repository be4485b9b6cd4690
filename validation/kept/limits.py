"""What a stage must hold where it is judged by the reference's kept predictions alone: what the table has for texts, and the worst part."""

from __future__ import annotations

from collections.abc import Mapping

from validation.part_kl import PART
from validation.side import Side
from validation.tolerances import LIMITS, NO_FLOOR, TEXT_CHECKS, Kind, Limit, plan_kind
from validation.watched import fault_limits

FEW = "nats, the worst of each row's prompt, chunk or steps: twice what the text may have, because they are few positions; int8 measures 0.004"
TEXT_LIMITS: Mapping[Kind, float] = {row.kind: row.limit for row in LIMITS if row.check == "mean_kl" and row.kind.startswith("int")}
LAST = "nats, the worst of each row's prompt, chunk or steps at the last position of a call: twice what the text may have, because they are few"
PLAN_LIMITS: Mapping[Kind, float] = {row.kind: row.limit for row in LIMITS if row.check == "mean_kl" and row.kind.startswith("plan")}
ROWS = (
    Limit("float32", "mean_kl", "<=", 1e-6, "nats; float32 kernels measure 1e-11"),
    Limit("float32", PART, "<=", 1e-6, "nats; float32 kernels measure 1e-11"),
    Limit("float16", PART, "<=", 1e-3, "nats, the worst of each row's prompt, chunk or steps; float16 graphs measure 2e-5"),
    *(Limit(kind, PART, "<=", 2 * limit, FEW) for kind, limit in TEXT_LIMITS.items()),
    Limit("plan-fp32", "mean_kl", "<=", 1e-6, "nats, every token of the text decoded on the GPU; float32 kernels on a CPU measure 1e-11"),
    Limit("plan-fp32", PART, "<=", 1e-6, "nats; float32 kernels on a CPU measure 1e-11"),
    *(Limit(kind, PART, "<=", 2 * limit, LAST) for kind, limit in PLAN_LIMITS.items()),
)


def kept_limits(side: Side, *, streamed: bool) -> list[Limit]:
    """The rows of a graph; for int4, which has no limit for quality, those that every graph must hold alone."""
    return [*_of_kind(side.kind), *fault_limits(side.kind, [side], streamed=streamed)]


def plan_limits(precision: str) -> list[Limit]:
    """The rows of a plan that is run on its GPU.

    Raises:
        ValidationError: there are none for this precision.
    """
    kind = plan_kind(precision)
    return [*_of_kind(kind), *fault_limits(kind, [], streamed=False)]


def _of_kind(kind: Kind) -> list[Limit]:
    return [row for row in (*LIMITS, *NO_FLOOR, *ROWS) if row.kind == kind and row.check in (*TEXT_CHECKS, PART)]
