"""The limits as the report has them: the rows that judged what was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from artifact.engine_names import is_engine
from artifact.io_spec import Dtype, KvCache
from validation import tolerances


def table(
    stages: list[str], dtype: Dtype, *, has_floor: bool, kv_cache: KvCache = "dynamic", streamed: bool = False, asked_for: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows that judge some stages, for the report."""
    kinds = {stage: kind for stage in stages if (kind := tolerances.kind_of(stage, dtype)) is not None}
    asked: dict[str, Any] = {"has_floor": has_floor, "kv_cache": kv_cache, "streamed": streamed}
    limits = {stage: tolerances.limits_of(kind, **asked) for stage, kind in kinds.items()}
    for stage in (stage for stage in limits if not is_engine(stage)):
        limits[stage] += [tolerances.asked_limit(kinds[stage], check) for check in asked_for]
    return [row for stage, found in limits.items() for row in rows(stage, found)]


def plan_rows(engine: Mapping[str, Any], *, kv_cache: KvCache) -> list[dict[str, Any]]:
    """The rows that judge a plan that was run, for the report; ``engine`` is its entry in ``build.json``, with its folder."""
    return rows(plan_stage(engine), tolerances.limits_of(tolerances.plan_kind(engine["precision"]), kv_cache=kv_cache))


def plan_stage(engine: Mapping[str, Any]) -> str:
    """What a plan is called as a stage of the report."""
    return f"engine {engine['folder']}"


def rows(stage: str, limits: list[tolerances.Limit]) -> list[dict[str, Any]]:
    """Some limits as the report has them."""
    return [{"stage": stage, "check": row.check, "limit": row.limit, "comparison": row.comparison, "reason": row.reason} for row in limits]
