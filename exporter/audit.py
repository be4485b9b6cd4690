"""Weight audit: is every initializer of every graph what the checkpoint holds, and is nothing else stored?

same dtype      the stored bytes are the checkpoint's
converted       they are what converting the checkpoint's values gives again, bit for bit
packed          q·k·v and gate·up: the members' bytes one after the other
int8            every scale is finite and positive, every dequantised value within half a scale of the checkpoint's in the artifact's dtype,
                or as many more as the rounding was free to take
int4, smoothed  shapes alone: a searched scale clips, and a smoothed weight is a multiple of the checkpoint's; validate judges their values

All of them, in every graph, have the checkpoint's shape. Nothing is held in memory but blocks. What differs is described by norm and correlation,
and by what it is instead, where that can be told.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from artifact.census import GraphWeight, graph_weights, take_census
from artifact.config import LlamaConfig
from artifact.engine_names import stage_of
from artifact.errors import ToolkitError
from artifact.io_spec import Dtype
from artifact.layout import PACKED, layer_of
from artifact.progress import Progress, silent
from artifact.tensor_file import StoredTensor
from exporter.blocks import STORED_DTYPES, convert, joined_rows, tensor_blocks
from exporter.checkpoints import Checkpoint
from exporter.diagnosis import describe
from exporter.stored_rows import read_columns, read_rows
from exporter.trace import TORCH_DTYPES
from exporter.weights import ROTARY, rotary_blocks, rotary_shape

Report = dict[str, Any]
COMPLETE = ("traced", "fused", "int8")
"""Stages whose every initializer is known, and which use every weight; another scheme may change what it likes."""
LEVELS, TURNED, BLOCK_LEVELS, SCALE, SMOOTHED = "_int8", "_int8_t", "_int4", "_scale", "_smoothed"
"""What follows a weight's name: levels [out, in], those of them that are stored [in, out], and so on."""
HALF = 0.5 + 1e-3


def audit_artifact(
    artifact: Path,
    model: Report,
    graphs: Iterable[str],
    checkpoint: Checkpoint | None,
    *,
    written: Mapping[str, StoredTensor] | None = None,
    reach: Mapping[str, int] | None = None,
    progress: Progress = silent,
) -> Report:
    """Check all graphs of an artifact.

    Args:
        artifact: the folder.
        model: the manifest's description.
        graphs: files in the folder.
        checkpoint: what the weights came from; None where it is gone.
        written: where each weight was compared when it was written; then no byte is read, and a graph must point at those places. None: read all.
        reach: stage → levels by which its rounding may be off the nearest one; 0 for all others.
        progress: told what is read.

    Returns:
        passed (None where nothing is wrong and there was no checkpoint to compare with), compared, not_compared, failed [{graph, tensor, reason}],
        bytes_by_dtype, duplicated_bytes, orphaned_bytes.
    """
    config, dtype = LlamaConfig(**model["config"]), model["dtype"]
    names = list(graphs)
    weights = {graph: graph_weights(artifact, graph) for graph in names}
    every = [weight for graph in names for weight in weights[graph]]
    files = None if written is None else {place.file for place in written.values()}
    census = take_census(artifact, every, STORED_DTYPES[dtype], tied=config.tie_word_embeddings, files=files)
    failed = list(census.problems)
    compared, skipped = 0, 0
    if checkpoint is not None:
        for graph in names:
            failed += [(graph, name, "is not in the graph") for name in _missing(graph, weights[graph], checkpoint, config)]
        auditor = Auditor(artifact, checkpoint, dtype, {(weight.graph, weight.name): weight for weight in every}, written, reach or {})
        broken, judged = {(graph, name) for graph, name, _ in failed}, set[Hashable]()
        for done, weight in enumerate(every):
            progress(f"comparing {weight.file}", done, len(every))
            key = auditor.what_is_judged(weight)
            if (weight.graph, weight.name) in broken or key in judged:
                continue
            judged.add(key)
            verdict = auditor.judge(weight)
            compared, skipped = compared + (verdict is not None), skipped + (verdict is None)
            if verdict:
                failed.append((weight.graph, weight.name, verdict))
    return {
        "passed": False if failed else True if checkpoint is not None else None,
        "compared": compared,
        "not_compared": len(every) if checkpoint is None else skipped,
        "failed": [{"graph": graph, "tensor": name, "reason": reason} for graph, name, reason in failed],
        **{key: value for key, value in asdict(census).items() if key != "problems"},
    }


@dataclass
class Auditor:
    """Compares weights with a checkpoint; ``by_name``, by graph and name, finds the scale that belongs to a quantised weight."""

    artifact: Path
    checkpoint: Checkpoint
    dtype: Dtype
    by_name: dict[tuple[str, str], GraphWeight]
    written: Mapping[str, StoredTensor] | None
    reach: Mapping[str, int]

    def what_is_judged(self, weight: GraphWeight) -> Hashable:
        """Equal for weights of two graphs where one verdict is both's: all that they declare, and their scale."""
        scale = self._scale_of(weight)
        return stage_of(weight.graph) in COMPLETE, replace(weight, graph=""), scale and replace(scale, graph="")

    def judge(self, weight: GraphWeight) -> str | None:
        """Empty where the weight is the checkpoint's, why not where it is not, None where there is nothing to compare it with."""
        base = base_of(weight.name)
        parts = (weight.name,) if weight.name in ROTARY else members(base, self.checkpoint)
        if not parts:
            known = stage_of(weight.graph) in COMPLETE and not weight.inside
            return "is no weight of the checkpoint" if known else None
        if weight.inside:
            return "lies inside the graph, not in weights/"
        shape = self._shape(base, parts)
        in_blocks = (weight.graph, base + BLOCK_LEVELS) in self.by_name
        if weight.name == base + SCALE:
            shape = (shape[0], *weight.shape[1:]) if in_blocks else shape[:1]  # its values are judged with its levels
        elif weight.name == base + TURNED:
            shape = shape[::-1]
        if weight.shape != shape:
            return f"is {list(weight.shape)} in the graph and {list(shape)} in the checkpoint"
        if weight.name == base + SCALE:
            of = (base + LEVELS, base + TURNED)
            return "" if in_blocks or any((weight.graph, name) in self.by_name for name in of) else "is a scale of nothing"
        return self._values(weight, base, parts)

    def _values(self, weight: GraphWeight, base: str, parts: tuple[str, ...]) -> str | None:
        """What ``judge`` says of a weight of the right shape."""
        levels = weight.name in (base + LEVELS, base + TURNED)
        if weight.name in (base + BLOCK_LEVELS, base + SMOOTHED) or (levels and weight.graph in self._smoothed):
            return None
        try:
            return self._compare(weight, base, parts)
        except ToolkitError as error:
            return str(error)

    @cached_property
    def _smoothed(self) -> frozenset[str]:
        """Graphs in which something is folded into weights."""
        return frozenset(graph for graph, name in self.by_name if name.endswith(SMOOTHED))

    def _shape(self, base: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        """What a weight made of these must have: the rows of all of them."""
        if base in ROTARY:
            return rotary_shape(self.checkpoint.config)
        shapes = [self.checkpoint.shapes[part] for part in parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _scale_of(self, weight: GraphWeight) -> GraphWeight | None:
        return self.by_name.get((weight.graph, base_of(weight.name) + SCALE)) if weight.name.endswith((LEVELS, TURNED)) else None

    def _compare(self, weight: GraphWeight, base: str, parts: tuple[str, ...]) -> str:
        if self.written is not None:
            places = [self.written[part] for part in parts if part in self.written]
            ends = (places[0].file, places[0].offset, sum(place.length for place in places)) if len(places) == len(parts) else None
            return "" if ends == (weight.file, weight.offset, weight.length) else "does not lie where it was written"
        if weight.name != base:
            return self._within_scale(weight, parts)
        return "" if self._equal(weight, parts) else describe(self.artifact, weight, self.checkpoint, parts)

    def _equal(self, weight: GraphWeight, parts: tuple[str, ...]) -> bool:
        descriptor = os.open(self.artifact / weight.file, os.O_RDONLY)
        try:
            return same_bytes(descriptor, weight.offset, self._expected(weight, parts))
        finally:
            os.close(descriptor)

    def _expected(self, weight: GraphWeight, parts: tuple[str, ...]) -> Iterator[memoryview]:
        if weight.name in ROTARY:
            yield from rotary_blocks(self.checkpoint.config, self.dtype, weight.name)
            return
        for name in parts:
            yield from tensor_blocks(self.checkpoint, StoredTensor(name, "", weight.dtype, self.checkpoint.shapes[name], 0, 0), self.dtype)

    def _within_scale(self, weight: GraphWeight, parts: tuple[str, ...]) -> str:
        """Half a scale of the weight in the artifact's dtype and those of its reach, and what float32 loses in comparing; NaN anywhere fails."""
        place = self._scale_of(weight)
        turned = weight.name.endswith(TURNED)
        if place is None or place.shape != (weight.shape[-1:] if turned else weight.shape[:1]):
            return f"has {'no scale' if place is None else f'a scale of {list(place.shape)}'}"
        scale = read_rows(self.artifact, place, 0, place.shape[0]).astype(np.float32)
        read = read_columns if turned else read_rows
        if not np.all(np.isfinite(scale) & (scale > 0)):
            return f"{int(np.sum(~(np.isfinite(scale) & (scale > 0))))} of {scale.size} scales are not finite and positive"
        start, worst = 0, 0.0
        for rows in joined_rows(self.checkpoint, parts):
            stop = start + rows.shape[0]
            step = scale[start:stop, None]
            error = np.abs(read(self.artifact, weight, start, stop) * step - convert(rows, TORCH_DTYPES[self.dtype]).to(torch.float32).numpy())
            worst, start = float(np.maximum(worst, (error / step).max())), stop  # np.maximum keeps NaN
        reach = self.reach.get(stage_of(weight.graph), 0)
        limit = f"{reach + 0.5:.3g} scales are" if reach else "half a scale is"
        return "" if worst <= HALF + reach else f"a dequantised value is {worst:.3g} scales from the checkpoint's; {limit} the limit"


def base_of(name: str) -> str:
    """The name of the weight that a tensor was made of, or is the scale of."""
    for suffix in (LEVELS, TURNED, BLOCK_LEVELS, SCALE, SMOOTHED):
        name = name.removesuffix(suffix)
    return name


def members(name: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The checkpoint's weights whose rows a weight of a graph holds, in order: itself, or those that were packed."""
    if name in checkpoint.shapes:
        return (name,)
    for (packed, parts), kind in product(PACKED.items(), (".weight", ".bias")):
        if name.endswith(packed + kind):
            prefix = name.removesuffix(packed + kind)
            return tuple(f"{prefix}{part}{kind}" for part in parts)
    return ()


def _missing(graph: str, weights: list[GraphWeight], checkpoint: Checkpoint, config: LlamaConfig) -> list[str]:
    """Weights of the checkpoint that a graph does not hold, where it must hold all."""
    if stage_of(graph) not in COMPLETE:
        return []
    held = {part for weight in weights for part in members(weight.name.removesuffix(LEVELS).removesuffix(TURNED), checkpoint)}
    return [name for name in checkpoint.shapes if name not in held and (layer_of(name) or 0) < config.num_hidden_layers]


def same_bytes(descriptor: int, offset: int, expected: Iterable[memoryview]) -> bool:
    """Whether the bytes from ``offset`` on are these."""
    same, buffer = True, bytearray()
    for block in expected:
        if len(buffer) != block.nbytes:
            buffer = bytearray(block.nbytes)
        same = os.preadv(descriptor, [buffer], offset) == block.nbytes and buffer == block and same
        offset += block.nbytes
    return same
