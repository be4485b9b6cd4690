"""Every stage at the edges of its plans' profiles, as the report has it: an entry for each edge, and a check of the stage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from artifact.engine_names import is_engine
from artifact.errors import ToolkitError
from artifact.steps import StepContext
from validation import tolerances
from validation.bisect.edges import Edge, edge_probe, edges_of, profiles_of
from validation.bisect.finding import Finding, Looked
from validation.bisect.layer import Pair, arithmetic_fault, make_pair
from validation.bisect.narrow import open_subject, shared_of
from validation.bisect.shared import table_faults
from validation.bisect.subject import Subject
from validation.oracle import Oracle

Engines = Sequence[Mapping[str, Any]]


def measure_edges(step: StepContext, oracle: Oracle, stages: list[dict[str, Any]], engines: Engines) -> list[dict[str, Any]]:
    """The entries of the stages with their edges; an engine graph has its stage's layers, and nothing of its own here.

    Args:
        step: told how far it is.
        oracle: the reference's hidden states and caches.
        stages: entries of the report.
        engines: of every build.json; their profiles say where the edges are.
    """
    return [stage if is_engine(stage["stage"]) else _measured(step, oracle, stage, engines) for stage in stages]


def _measured(step: StepContext, oracle: Oracle, stage: dict[str, Any], engines: Engines) -> dict[str, Any]:
    start, name = time.perf_counter(), stage["stage"]
    profiles, source = profiles_of(oracle, name, engines)
    edges = edges_of(oracle, profiles)
    kind = tolerances.kind_of(name, oracle.dtype)
    assert kind is not None
    try:
        entries = _entries(oracle, oracle.artifact / f"{name}.onnx", edges, step)
        reason = None
    except ToolkitError as error:
        entries, reason = [_entry(edge, None, str(error)) for edge in edges], str(error)
    failed = [entry for entry in entries if entry["passed"] is False]
    ran = sum(entry["passed"] is not None for entry in entries)
    missing = None if ran else (reason or "no edge is small enough to be run here")
    where = failed[0]["edge"] if failed else None
    row = tolerances.asked_limit(kind, tolerances.EDGES)
    check = tolerances.judge(row, len(failed) if ran else None, where=where, missing=missing)
    said = {"reason": f"{failed[0]['edge']}: {failed[0]['reason']}" if failed else f"{ran} of {len(entries)} edges were run; {check['reason']}"}
    not_run = [f"not run, {entry['edge']}: {entry['reason']}" for entry in entries if entry["passed"] is None]
    return stage | {
        "edges": {"profiles": source, "of": entries},
        "checks": [*stage["checks"], check | said],
        "warnings": [*stage["warnings"], *not_run],
        "passed": False if failed else stage["passed"],
        "seconds_by_part": stage["seconds_by_part"] | {"edges": round(time.perf_counter() - start, 2)},
    }


def _entries(oracle: Oracle, graph: Path, edges: list[Edge], step: StepContext) -> list[dict[str, Any]]:
    """The first and the last layer at every edge: what depends on length and batch is spelled alike in all, and ``--bisect`` runs them all."""
    subject = open_subject(oracle, graph, step.progress)
    broken = next(table_faults(subject.model, oracle, Looked()), None)
    pairs = [make_pair(subject, layer) for layer in dict.fromkeys((0, oracle.config.num_hidden_layers - 1))]
    entries = []
    for number, edge in enumerate(edges):
        step.progress(f"{graph.stem}: {edge.name}", number, len(edges))
        entries.append(_entry(edge, None, edge.reason) if edge.reason else _at(subject, pairs, edge, broken))
    return entries


def _at(subject: Subject, pairs: list[Pair], edge: Edge, broken: Finding | None) -> dict[str, Any]:
    here = replace(subject, looked=Looked(), shared={})
    probe = edge_probe(subject.oracle, edge)
    try:
        found = shared_of(here, probe) or next(filter(None, (arithmetic_fault(here, pair, probe) for pair in pairs)), None) or broken
    except ToolkitError as error:
        return _entry(edge, False, str(error))
    reason = None if found is None else f"{found.node.name} ({found.node.op_type}): {found.words}"
    return _entry(edge, found is None, reason) | {"tensors": here.looked.tensors, "nearest": here.looked.as_json()["nearest"]}


def _entry(edge: Edge, passed: bool | None, reason: str | None) -> dict[str, Any]:
    sizes = {"profile": edge.profile, "batch": edge.batch, "new_tokens": edge.new, "past": edge.past}
    return {"edge": edge.name, **sizes, "passed": passed, "reason": reason, "tensors": 0, "nearest": None}
