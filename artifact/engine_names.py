"""What an engine's graph and folder are called: by stage, and where a static cache is built in several sizes by the size.

``fused-engine.onnx`` and ``engines/a100-80gb-fp16/``; of a bucket ``fused-engine-c1024.onnx`` and ``engines/a100-80gb-fp16-c1024/``. A graph whose
decode multiplies by a vector says so, ``fused-engine-gemv.onnx``: engines of either form may stand in one artifact, for GPUs that differ.
"""

from __future__ import annotations

import re

GEMV = "-gemv"
_ENGINE = re.compile(rf"(?P<stage>.+)-engine(?P<gemv>{GEMV})?(?:-c(?P<capacity>\d+))?")
_PART = re.compile(r"-layers-\d+-\d+$")


class Bucket(int):
    """A static cache's capacity that is one of several, and so stands in the names of its engine."""


def engine_graph(stage: str, capacity: int | None = None, *, gemv: bool = False) -> str:
    """File of the graph that is built from a stage."""
    return f"{stage}-engine{GEMV * gemv}{_suffix(capacity)}.onnx"


def part_graph_name(graph: str, layers: tuple[int, int]) -> str:
    """File of one part of an engine's graph: `fused-engine-layers-00-19.onnx`; an engine that is cut elsewhere has files of its own."""
    first, last = layers
    return f"{graph.removesuffix('.onnx')}-layers-{first:02}-{last:02}.onnx"


def plan_file(folder: str, part: int) -> str:
    """A plan of an engine, in its folder."""
    return f"{folder}/part-{part:02}.plan"


def is_part(name: str) -> bool:
    """Whether a graph (its name without ``.onnx``) is a part of an engine's."""
    return _PART.search(name) is not None and is_engine(_PART.sub("", name))


def engine_folder(target: str, precision: str, capacity: int | None = None) -> str:
    """Folder of an engine, in the artifact."""
    return f"engines/{target}-{precision}{_suffix(capacity)}"


def is_engine(name: str) -> bool:
    """Whether a graph (its name without ``.onnx``) is an engine's."""
    return _ENGINE.fullmatch(name) is not None


def stage_of(name: str) -> str:
    """The stage that an engine's graph (its name, or its file) was made from; any other graph is its own."""
    match = _ENGINE.fullmatch(name.removesuffix(".onnx"))
    return match["stage"] if match else name.removesuffix(".onnx")


def built_from(graph: str) -> str:
    """The stage that an engine, or one part of it, was built from, by the file of its graph: ``fused-engine-layers-00-19.onnx`` → fused."""
    return stage_of(_PART.sub("", graph.removesuffix(".onnx")))


def whole_graph(graph: str) -> str:
    """File of the graph that a part was cut from, by the part's: ``fused-engine.onnx``; any other graph is its own."""
    return f"{_PART.sub('', graph.removesuffix('.onnx'))}.onnx"


def bucket_of(name: str) -> int:
    """Capacity of a bucket's graph; 0 of any other."""
    match = _ENGINE.fullmatch(name)
    return int(match["capacity"] or 0) if match else 0


def has_gemv(name: str) -> bool:
    """Whether a graph (its name without ``.onnx``) is an engine's whose decode multiplies by a vector."""
    match = _ENGINE.fullmatch(name)
    return match is not None and match["gemv"] is not None


def _suffix(capacity: int | None) -> str:
    return f"-c{int(capacity)}" if isinstance(capacity, Bucket) else ""
