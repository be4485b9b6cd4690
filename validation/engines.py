"""Plans in the report: what their builds and audits recorded, and why they were not run here."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from artifact.engine_names import whole_graph
from artifact.errors import ValidationError
from engines.device import Device
from engines.runnable import why_not_here

RECORDS = "engines/*/build.json"
NOT_ASKED = "plans run on their GPU alone, with --device cuda"


def engine_entries(artifact: Path) -> list[dict[str, Any]]:
    """The ``engines`` entries of every ``build.json``, each with the folder it lies in.

    Raises:
        ValidationError: a record can't be read.
    """
    entries = []
    for path in sorted(artifact.glob(RECORDS)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = [{"file": entry["file"], **entry, "folder": path.parent.name} for entry in record["engines"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValidationError(f"{path} can't be read: {error!r}", hint="build the engine again") from error
        entries += found
    return entries


def whole_engines(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The entries of each engine: one, or its parts in their order."""
    engines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        engines[entry["folder"] if "part" in entry else entry["file"]].append(entry)
    return [sorted(parts, key=lambda entry: entry.get("part", 0)) for parts in engines.values()]


def split_engines(
    artifact: Path, engines: list[dict[str, Any]], device: Device | str | None, stages: Collection[str] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The engines that can run here, and for each of the others the reason.

    Args:
        artifact: the folder.
        engines: of ``engine_entries``.
        device: this machine's GPU; the reason why there is none; None where plans are not to be run.
        stages: graphs that are checked; None is all.

    Returns:
        The runnable ones by the entry of their first plan, with ``plans``: the entries of all its parts.
    """
    runnable, others = [], []
    for plans in whole_engines(engines):
        engine = {**plans[0], "plans": plans}
        if isinstance(device, Device):
            reason = next((why for plan in plans if (why := why_not_here(artifact, plan, device))), None)
        else:
            reason = f"{device or NOT_ASKED}; {_graph_instead(engine.get('graph', 'graph'), stages)}"
        if reason is None:
            runnable.append(engine)
        else:
            others.append({"stage": f"engine {engine['folder']}", "reason": reason})
    return runnable, others


def _graph_instead(graph: str, stages: Collection[str] | None) -> str:
    """What is said of a plan's graph in its place; ``graph`` is its file, or that of its first part."""
    whole = whole_graph(graph)
    asked = stages is None or whole.removesuffix(".onnx") in stages
    return "the plan's ONNX graph was checked instead" if asked else f"nor was its graph {whole} asked for"
