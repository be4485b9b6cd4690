"""Every stage at the edges of its plans' profiles, as the report has it: an entry for each edge, and a check of the stage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
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
    tried = [Tried(edge, replace(subject, looked=Looked(), shared={})) for edge in edges if not edge.reason]
    for number, layer in enumerate(layers := [None, *dict.fromkeys((0, oracle.config.num_hidden_layers - 1))]):
        step.progress(f"{graph.stem}: edges of its profiles", number, len(layers))
        with nullcontext() if layer is None else closing(make_pair(subject, layer)) as pair:
            for one in tried:
                one.look(pair)
    done = {one.edge: one.as_json(broken) for one in tried}
    return [done.get(edge) or _entry(edge, None, edge.reason) for edge in edges]


@dataclass
class Tried:
    """An edge that is being tried: what the layers share, then one layer after the other, so that the weights of one are in memory."""

    edge: Edge
    subject: Subject
    found: Finding | None = None
    error: ToolkitError | None = None

    def look(self, pair: Pair | None) -> None:
        """At a layer; at what they share where it is None. Nothing more once something was found."""
        if self.found is not None or self.error is not None:
            return
        probe = edge_probe(self.subject.oracle, self.edge)
        try:
            self.found = shared_of(self.subject, probe) if pair is None else arithmetic_fault(self.subject, pair, probe)
        except ToolkitError as error:
            self.error = error

    def as_json(self, broken: Finding | None) -> dict[str, Any]:
        """The report's entry; ``broken`` is a table that is wrong everywhere."""
        if self.error is not None:
            return _entry(self.edge, False, str(self.error))
        found, looked = self.found or broken, self.subject.looked
        reason = None if found is None else f"{found.node.name} ({found.node.op_type}): {found.words}"
        return _entry(self.edge, found is None, reason) | {"tensors": looked.tensors, "nearest": looked.as_json()["nearest"]}


def _entry(edge: Edge, passed: bool | None, reason: str | None) -> dict[str, Any]:
    sizes = {"profile": edge.profile, "batch": edge.batch, "new_tokens": edge.new, "past": edge.past}
    return {"edge": edge.name, **sizes, "passed": passed, "reason": reason, "tensors": 0, "nearest": None}
