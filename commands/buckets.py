"""build of a static cache in several capacities: one engine each, from the same weights files; a run takes the smallest that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from artifact.config import LlamaConfig
from artifact.engine_names import Bucket
from artifact.errors import EngineError, UsageError
from artifact.manifest import kv_cache_of, require_artifact
from artifact.progress import Progress, silent
from artifact.room import free_disk, gigabytes
from artifact.steps import Outcome, require
from commands.build import BuildOptions, build, why_to_build
from engines.build import STAGES
from engines.cache_form import longest
from engines.checks import all_passed

PARTS = ("parts", "parts_reason")
"""What a report says of one engine's split."""


def parse_capacities(text: str | None) -> tuple[int, ...]:
    """The capacities of ``512,1024,2048``, smallest first; none of None. ``512,`` is one of several, ``512`` is alone, and stands in no name.

    Raises:
        UsageError: anything but numbers of at least 2, each once.
    """
    if text is None:
        return ()
    words = [word.strip() for word in text.removesuffix(",").split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) >= 2 for word in words):
        raise UsageError(f"--capacity takes numbers of at least 2, separated by commas; got {text!r}", hint="--capacity 512,1024,2048,4096")
    if len({int(word) for word in words}) < len(words):
        raise UsageError(f"--capacity names a number twice: {text!r}")
    return tuple(sorted(Bucket(word) for word in words)) if "," in text else (int(text),)


def with_capacities(options: BuildOptions, capacities: tuple[int, ...]) -> BuildOptions:
    """Options of one engine, or of several."""
    buckets = tuple(one for one in capacities if isinstance(one, Bucket))
    return replace(options, buckets=buckets) if buckets or not capacities else replace(options, capacity=capacities[0])


def check_lengths(options: BuildOptions, kv_cache: str, config: LlamaConfig) -> None:
    """Refuse what the cache's form or the model's positions rule out, for every capacity.

    Raises:
        EngineError: a bound of the other cache form, or one that the model can't serve.
    """
    for capacity in options.buckets or (options.capacity,):
        length = longest(kv_cache, config, options.max_length, capacity)  # type: ignore[arg-type]
        if options.buckets and length > config.max_position_embeddings:
            raise EngineError(f"--capacity {capacity} is more than the model's {config.max_position_embeddings} positions", hint="leave it out")


def build_all(artifact: Path, precision: str, options: BuildOptions, *, force: bool = False, progress: Progress = silent) -> Outcome:
    """Build one engine, or one for every bucket: each a step of its own, done again only where something it depends on changed.

    Returns:
        As ``build``; of buckets the ``engines`` of all, and ``parts_by_capacity`` {capacity: {parts, parts_reason}} in the place of one's parts.

    Raises:
        EngineError: as ``build``; or the disk has no room for all that is still to be built.
    """
    if not options.buckets:
        return build(artifact, precision, options, force=force, progress=progress)
    model = require_artifact(artifact, "build", weights=True)["model"]
    check_lengths(options, kv_cache_of(model), LlamaConfig(**model["config"]))
    each = {capacity: replace(options, capacity=capacity, buckets=()) for capacity in options.buckets}
    _check_disk(artifact, precision, each, force=force)
    outcomes = [build(artifact, precision, one, force=force, progress=progress) for one in each.values()]
    report = {
        **{key: value for key, value in outcomes[0].report.items() if key not in PARTS},
        "parts_by_capacity": {str(capacity): {key: outcome.report[key] for key in PARTS} for capacity, outcome in zip(each, outcomes, strict=True)},
        "engines": [engine for outcome in outcomes for engine in outcome.report["engines"]],
        "passed": all_passed(outcome.report["passed"] for outcome in outcomes),
        "buckets": list(options.buckets),
    }
    return Outcome(report, "; ".join(dict.fromkeys(outcome.reason for outcome in outcomes if outcome.reason)))


def _check_disk(artifact: Path, precision: str, each: Mapping[Bucket, BuildOptions], *, force: bool) -> None:
    """Refuse what can't be finished: every bucket's plan holds all weights. An old plan goes when the new one is there, not before."""
    import onnx_ir as ir

    from engines.graph_weights import weights_bytes

    graph = require(artifact, f"{STAGES[precision]}.onnx")
    todo = [capacity for capacity, options in each.items() if force or why_to_build(artifact, precision, options)]
    replaced = [capacity for capacity in todo if (artifact / each[capacity].folder(precision)).is_dir()]
    at_once = len(todo) - len(replaced) + bool(replaced)
    needed = at_once * weights_bytes(ir.load(graph).graph) if todo else 0
    free = free_disk(artifact)
    if needed > free:
        again = f" ({len(replaced)} of them in an old one's place)" if replaced else ""
        raise EngineError(
            f"{len(todo)} plans{again} need about {gigabytes(needed)} of disk, {artifact} has {gigabytes(free)} free",
            hint="fewer numbers in --capacity, or free some",
        )
