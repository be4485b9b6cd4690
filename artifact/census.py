"""Where every weight of every graph lies, and what the bytes of ``weights/`` are there for: dtypes, bytes held twice, bytes nobody points into."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import onnx_ir as ir

from artifact.errors import ArtifactError
from artifact.graph_file import load_graph
from artifact.tensor_file import ITEM_BYTES, read_checksums

WORDS = {ir.DataType.FLOAT16: "F16", ir.DataType.FLOAT: "F32", ir.DataType.INT8: "I8", ir.DataType.UINT8: "U8", ir.DataType.INT4: "I4"}
"""ONNX dtype → safetensors' word; of four bits, which it has no word for, our own."""
STORED_AS = {"I4": "U8"}
"""Word of a graph's weight → of the tensor in the file, where that is another one: two levels share a byte."""
BYTES = {**ITEM_BYTES, "I4": 0.5}
ISLAND_SCALE = ".weight_scale"
"""Float32 in an artifact of any dtype where the product of two int8 operands is scaled (graphs/quantize/islands.py)."""
INLINE_BYTES = 1024
"""Initializers inside a graph up to this size are constants, not weights."""
LISTS = "weights/*checksums.json"


@dataclass(frozen=True)
class GraphWeight:
    """One initializer of one graph: its bytes are ``length`` from ``offset`` of ``file``; ``file`` is the graph itself where they are inside."""

    graph: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int

    @property
    def inside(self) -> bool:
        """Whether the graph holds the bytes itself."""
        return self.file == self.graph


@dataclass
class Census:
    """What the bytes are there for.

    Attributes:
        bytes_by_dtype: of the weights that graphs use, each byte once.
        duplicated_bytes: of matrices stored once more than needed.
        orphaned_bytes: of ``weights/`` that no graph points into.
        problems: (graph or file, tensor or None, reason) of what must not be.
    """

    bytes_by_dtype: dict[str, int] = field(default_factory=dict)
    duplicated_bytes: int = 0
    orphaned_bytes: int = 0
    problems: list[tuple[str, str | None, str]] = field(default_factory=list)


def graph_weights(artifact: Path, graph: str) -> list[GraphWeight]:
    """Every initializer of a graph that is a weight; values are not read."""
    found = []
    for value in load_graph(artifact / graph).graph.initializers.values():
        tensor, name = value.const_value, str(value.name)
        if tensor is None:
            continue
        dtype, shape = WORDS.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            file = Path(tensor.location).as_posix()
            length = tensor.length if tensor.length is not None else tensor.nbytes
            found.append(GraphWeight(graph, name, dtype, shape, file, tensor.offset or 0, length))
        elif tensor.nbytes > INLINE_BYTES:
            found.append(GraphWeight(graph, name, dtype, shape, graph, 0, tensor.nbytes))
    return found


def take_census(artifact: Path, weights: Iterable[GraphWeight], dtype: str, *, tied: bool, files: Collection[str] | None = None) -> Census:
    """Count bytes, and find what is not as an artifact of this dtype must be.

    Args:
        artifact: the folder.
        weights: of all its graphs.
        dtype: safetensors' word for the artifact's floats.
        tied: whether lm_head is the embedding, which is then stored once.
        files: of ``weights/``, to account for; None is all.
    """
    census, live = Census(), defaultdict[str, list[tuple[int, int]]](list)
    spans: dict[tuple[str, int, int], str] = {}
    for weight in weights:
        if (reason := _misplaced(artifact, weight, dtype)) is not None:
            census.problems.append((weight.graph, weight.name, reason))
        live[weight.file].append((weight.offset, weight.offset + weight.length))
        spans[weight.file, weight.offset, weight.length] = weight.dtype
    for file in {file for file, _, _ in spans}:
        for word in set(spans.values()):
            size = _union([(at, at + length) for (name, at, length), kind in spans.items() if (name, kind) == (file, word)])
            census.bytes_by_dtype[word] = census.bytes_by_dtype.get(word, 0) + size
    census.bytes_by_dtype = {word: size for word, size in sorted(census.bytes_by_dtype.items()) if size}
    census.duplicated_bytes = _duplicated(artifact)
    if tied and census.duplicated_bytes:
        census.problems.append(("weights", None, f"{census.duplicated_bytes:,} bytes of matrices are stored twice; tied weights are stored once"))
    for path in sorted((artifact / "weights").glob("*")):
        file = path.relative_to(artifact).as_posix()
        orphaned = _orphaned(path, live.get(file, [])) if files is None or file in files else 0
        census.orphaned_bytes += orphaned
        if orphaned:
            reason = f"{orphaned:,} of {path.stat().st_size:,} bytes belong to no weight of any graph"
            census.problems.append((file, None, reason))
    return census


def _misplaced(artifact: Path, weight: GraphWeight, dtype: str) -> str | None:
    """Why a weight can't be what its graph says."""
    if weight.inside:
        return None
    exact = weight.name.endswith(ISLAND_SCALE) and weight.dtype == "F32"
    if weight.dtype not in BYTES or (weight.dtype.startswith("F") and weight.dtype != dtype and not exact):
        return f"is {weight.dtype} in an artifact of {dtype}"
    if (needed := int(prod(weight.shape) * BYTES[weight.dtype])) != weight.length:
        return f"{weight.dtype} {list(weight.shape)} takes {needed:,} bytes; the graph points at {weight.length:,}"
    path = artifact / weight.file
    if not path.is_file() or not path.resolve().is_relative_to(artifact.resolve()):
        return f"{weight.file} is not in the artifact"
    if weight.offset + weight.length > path.stat().st_size:
        return f"ends at byte {weight.offset + weight.length:,} of {weight.file}, which has {path.stat().st_size:,}"
    stored = {word for begin, end, word in _entries(path) if begin < weight.offset + weight.length and weight.offset < end}
    return (
        None
        if stored == {STORED_AS.get(weight.dtype, weight.dtype)}
        else f"is {weight.dtype} in the graph and {', '.join(sorted(stored)) or 'nothing'} in {weight.file}"
    )


def _entries(path: Path) -> list[tuple[int, int, str]]:
    """Begin, end and dtype of every tensor that a safetensors header lists; none where it can't be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        entries = [(*entry["data_offsets"], entry["dtype"]) for name, entry in header.items() if name != "__metadata__"]
        return [(8 + length + begin, 8 + length + end, dtype) for begin, end, dtype in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _orphaned(path: Path, live: list[tuple[int, int]]) -> int:
    """Bytes behind the header that are outside of every live span."""
    if path.match(LISTS.split("/")[1]):
        return 0
    begins = [begin for begin, _, _ in _entries(path)]
    return path.stat().st_size - (min(begins) if begins else 0) - _union(live)


def _union(spans: list[tuple[int, int]]) -> int:
    total = reached = 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _duplicated(artifact: Path) -> int:
    """Bytes of matrices whose SHA-256 another one has already."""
    matrices: Counter[tuple[str, int]] = Counter()
    for path in artifact.glob(LISTS):
        try:
            listed = read_checksums(artifact, path.relative_to(artifact).as_posix()).values()
        except ArtifactError:
            continue  # its own hash says that it is damaged
        matrices.update((tensor.blake3, tensor.length) for tensor in listed if len(tensor.shape) > 1)
    return sum((count - 1) * length for (_, length), count in matrices.items())
