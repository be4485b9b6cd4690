"""Narrow a stage's error to the node: what the layers share, then the layer that left its band (or all in turn), then what follows them.

One layer of the graph and of its trusted counterpart is in memory at a time, so that it works for a streamed stage as for a whole one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import ToolkitError
from artifact.layout import EMBEDDING
from artifact.manifest import read_manifest
from artifact.progress import Progress
from exporter.weights import ROTARY_COS, ROTARY_SIN
from graphs.partition import cut_shared, part_boundaries
from validation.bisect.edges import Edge, edge_probe
from validation.bisect.finding import Finding, Looked
from validation.bisect.float16 import rounding_fault
from validation.bisect.hints import made_by
from validation.bisect.layer import arithmetic_fault, make_pair, weight_fault
from validation.bisect.probes import Probe, make_probes
from validation.bisect.promoted import in_float32
from validation.bisect.shared import exact_tables, run_shared, shared_fault, table_faults
from validation.bisect.subject import Subject
from validation.bisect.trusted import Trusted
from validation.bisect.weights import stored_as
from validation.oracle import Oracle

Array = NDArray[Any]


def narrow(oracle: Oracle, graph: Path, entry: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Look for the node where a stage parts from the model.

    Args:
        oracle: the reference's hidden states and caches.
        graph: the stage's.
        entry: of the stage in the report: its first layer beyond the band is looked at first.
        progress: told the layer.

    Returns:
        The report's ``bisect``: found (null: nothing to narrow), complete (false: it could not be looked at whole, ``words`` say why),
        looked_at, words and seconds.
    """
    start, looked = time.perf_counter(), Looked()
    try:
        finding = next(_faults(oracle, graph, entry, looked, progress), None)
    except ToolkitError as error:
        return _entry(None, looked, f"not narrowed: {error}", start) | {"complete": False}
    found = None if finding is None else finding.as_json(made_by(finding.node, graph.stem, read_manifest(oracle.artifact)))
    return _entry(found, looked, _nothing(looked) if found is None else _words(found), start)


def _entry(found: dict[str, Any] | None, looked: Looked, words: str, start: float) -> dict[str, Any]:
    seconds = round(time.perf_counter() - start, 2)
    return {"found": found, "complete": not looked.unread, "looked_at": looked.as_json(), "words": words, "seconds": seconds}


def open_subject(oracle: Oracle, graph: Path, progress: Progress, looked: Looked | None = None) -> Subject:
    """A stage's graph and its trusted counterpart."""
    model = ir.load(graph)
    part_boundaries(model)
    trusted = Trusted(oracle.config, oracle.dtype, oracle.kv_cache, progress)
    tables = exact_tables(oracle) | _tables(model)
    cut = in_float32(cut_shared(model))
    cuts = cut, trusted.shared(tables, _stored(cut, EMBEDDING))
    return Subject(model, trusted, oracle, looked or Looked(), graph.stem.startswith("int8-smoothquant"), cuts, tables)


def _stored(cut: ir.Model, name: str) -> ir.TensorProtocol | None:
    """A constant of a cut, which stays where it lies."""
    return cut.graph.initializers[name].const_value if name in cut.graph.initializers else None


def _faults(oracle: Oracle, graph: Path, entry: dict[str, Any], looked: Looked, progress: Progress) -> Iterator[Finding]:
    subject = open_subject(oracle, graph, progress, looked)
    probes = [*make_probes(oracle), *_failed_edges(oracle, entry)]
    looked.calls = [probe.label for probe in probes]
    yield from table_faults(subject.model, oracle, looked)
    yield from filter(None, (shared_of(subject, probe) for probe in probes))
    for layer in _order(entry, oracle.config.num_hidden_layers):
        what = "what follows the layers" if layer is None else f"layer {layer}"
        progress(f"{graph.stem}: narrowing, {what}", layer or 0, oracle.config.num_hidden_layers)
        yield from _faults_of(subject, layer, probes)
        looked.layers += layer is not None
    yield from _roundings(subject, probes, entry)


def _faults_of(subject: Subject, layer: int | None, probes: list[Probe]) -> Iterator[Finding]:
    """Of one layer, or of what follows them; its weights are gone when it has been looked through."""
    with closing(make_pair(subject, layer)) as pair:
        if (fault := weight_fault(subject, pair)) is not None:
            yield fault
        yield from filter(None, (arithmetic_fault(subject, pair, probe) for probe in probes))


def _failed_edges(oracle: Oracle, entry: dict[str, Any]) -> list[Probe]:
    """The edges of the profiles at which a stage is wrong, where they were looked at."""
    failed = [edge for edge in (entry.get("edges") or {"of": ()})["of"] if edge["passed"] is False]
    return [edge_probe(oracle, Edge(edge["profile"], edge["batch"], edge["new_tokens"], edge["past"])) for edge in failed]


def shared_of(subject: Subject, probe: Probe) -> Finding | None:
    """Run what the layers share in a call, the graph's and the trusted one's, and compare; layers read it then."""
    oracle, (cut, counterpart) = subject.oracle, subject.cuts
    ours, theirs = run_shared(cut, probe, oracle), run_shared(counterpart, probe, oracle)
    subject.shared[probe.name] = ours, theirs
    return shared_fault(subject.cuts, ours, theirs, probe, subject.looked)


def _tables(model: ir.Model) -> dict[str, Array]:
    """The rotary tables that the graph reads, float32."""
    return {name: weight.array.astype(np.float32) for name, weight in stored_as(model, (ROTARY_COS, ROTARY_SIN))}


def _order(entry: dict[str, Any], layers: int) -> list[int | None]:
    """The layer that left its band first, then all others, then what follows them."""
    first = entry.get("first_layer_outside")
    named = [] if first is None else [first]
    return [*named, *(layer for layer in range(layers) if layer != first), None]


def _roundings(subject: Subject, probes: list[Probe], entry: dict[str, Any]) -> Iterator[Finding]:
    """Where float16 loses something, in the layer that the measurements name."""
    layer = entry.get("first_layer_outside")
    layer = entry.get("worst_local_layer") if layer is None else layer
    if subject.oracle.dtype == "fp16" and layer is not None:
        with closing(make_pair(subject, layer)) as pair:
            yield from filter(None, (rounding_fault(subject, pair, probe) for probe in probes))


def _words(found: dict[str, Any]) -> str:
    where = "outside the layers" if found["layer"] is None else f"layer {found['layer']}"
    error = "not finite" if found["error"] is None else f"{found['error']:.3g}"
    allowed = "no limit" if found["allowed"] is None else f"allowed {found['allowed']:.2g}"
    measured = f"{found['tensor']} is off by {error} ({allowed})"
    call = f" in {found['call']}" if found["call"] else ""
    return f"{where}: {found['node']} ({found['op']}){call}: {measured}; {found['why']}; made by {found['hint']}"


def _nothing(looked: Looked) -> str:
    count = f"{looked.tensors:,} tensors and {looked.weights:,} weights of {looked.layers} layers in {len(looked.calls)} calls"
    _, what, error, allowed = looked.nearest
    nearest = f", the nearest {what} with {error:.2g} of {allowed:.2g}" if what else ""
    if looked.unread:
        unread = f"{len(looked.unread)} weights were not compared, {looked.unread[0]} first"
        return f"not narrowed whole: {unread}; {count} are what their dtype explains{nearest}"
    return f"nothing to narrow: {count} are what their dtype explains{nearest}"
