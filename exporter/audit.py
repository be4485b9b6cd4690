"""Weight audit: is every initializer of every graph what the checkpoint holds, and is nothing else stored?

same dtype      the stored bytes are the checkpoint's
converted       they are what converting the checkpoint's values gives again, bit for bit
packed          q·k·v and gate·up: the members' bytes one after the other
int8            every dequantised value is within half a scale of the checkpoint's

Nothing is held in memory but blocks. What differs is described by norm and correlation, and by what it is instead, where that can be told.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from artifact.census import GraphWeight, graph_weights, take_census
from artifact.config import LlamaConfig
from artifact.errors import ToolkitError
from artifact.io_spec import Dtype
from artifact.layout import PACKED, layer_of
from artifact.progress import Progress, silent
from artifact.tensor_file import StoredTensor
from exporter.blocks import STORED_DTYPES, joined_rows, tensor_blocks
from exporter.checkpoints import Checkpoint
from exporter.diagnosis import describe
from exporter.stored_rows import read_rows
from exporter.weights import ROTARY_COS, ROTARY_SIN, rotary_blocks

Report = dict[str, Any]
COMPLETE = ("traced", "fused", "int8")
"""Stages whose every initializer is known, and which use every weight; another scheme may change what it likes."""
LEVELS, SCALE = "_int8", "_scale"
ROTARY = (ROTARY_COS, ROTARY_SIN)


def audit_artifact(
    artifact: Path,
    model: Report,
    graphs: Iterable[str],
    checkpoint: Checkpoint | None,
    *,
    written: Mapping[str, StoredTensor] | None = None,
    progress: Progress = silent,
) -> Report:
    """Check all graphs of an artifact.

    Args:
        artifact: the folder.
        model: the manifest's description.
        graphs: files in the folder.
        checkpoint: what the weights came from; None where it is gone.
        written: where each weight was compared when it was written; then no byte is read, and a graph must point at those places. None: read all.
        progress: told what is read.

    Returns:
        passed, compared, not_compared, failed [{graph, tensor, reason}], bytes_by_dtype, duplicated_bytes, orphaned_bytes.
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
        auditor = Auditor(artifact, checkpoint, dtype, {weight.name: weight for weight in every}, written)
        distinct = {(weight.name, weight.file, weight.offset): weight for weight in every}
        broken = {(graph, name) for graph, name, _ in failed}
        for done, weight in enumerate(distinct.values()):
            progress(f"comparing {weight.file}", done, len(distinct))
            if (weight.graph, weight.name) in broken:
                continue
            verdict = auditor.judge(weight)
            compared, skipped = compared + (verdict is not None), skipped + (verdict is None)
            if verdict:
                failed.append((weight.graph, weight.name, verdict))
    return {
        "passed": not failed,
        "compared": compared,
        "not_compared": len(every) if checkpoint is None else skipped,
        "failed": [{"graph": graph, "tensor": name, "reason": reason} for graph, name, reason in failed],
        **{key: value for key, value in asdict(census).items() if key != "problems"},
    }


@dataclass
class Auditor:
    """Compares weights with a checkpoint; ``by_name`` finds the scale that belongs to a quantised weight."""

    artifact: Path
    checkpoint: Checkpoint
    dtype: Dtype
    by_name: dict[str, GraphWeight]
    written: Mapping[str, StoredTensor] | None

    def judge(self, weight: GraphWeight) -> str | None:
        """Empty where the weight is the checkpoint's, why not where it is not, None where there is nothing to compare it with."""
        base = weight.name.removesuffix(LEVELS).removesuffix(SCALE)
        parts = (weight.name,) if weight.name in ROTARY else members(base, self.checkpoint)
        if not parts:
            known = stage_of(weight.graph) in COMPLETE and not weight.inside
            return "is no weight of the checkpoint" if known else None
        if weight.inside:
            return "lies inside the graph, not in weights/"
        if weight.name == base + SCALE:
            return ""  # judged with its levels
        try:
            return self._compare(weight, base, parts)
        except ToolkitError as error:
            return str(error)

    def _compare(self, weight: GraphWeight, base: str, parts: tuple[str, ...]) -> str:
        if self.written is not None:
            places = [self.written[part] for part in parts if part in self.written]
            ends = (places[0].file, places[0].offset, sum(place.length for place in places)) if len(places) == len(parts) else None
            return "" if ends == (weight.file, weight.offset, weight.length) else "does not lie where it was written"
        if weight.name != base:
            return self._within_scale(weight, base, parts)
        return "" if self._equal(weight, parts) else describe(self.artifact, weight, self.checkpoint, parts)

    def _equal(self, weight: GraphWeight, parts: tuple[str, ...]) -> bool:
        descriptor = os.open(self.artifact / weight.file, os.O_RDONLY)
        try:
            return same_bytes(descriptor, weight.offset, self._expected(weight, parts))
        finally:
            os.close(descriptor)

    def _expected(self, weight: GraphWeight, parts: tuple[str, ...]) -> Iterator[memoryview]:
        if weight.name in ROTARY:
            yield list(rotary_blocks(self.checkpoint.config, self.dtype))[ROTARY.index(weight.name)]
            return
        for name in parts:
            yield from tensor_blocks(self.checkpoint, StoredTensor(name, "", weight.dtype, self.checkpoint.shapes[name], 0, 0), self.dtype)

    def _within_scale(self, weight: GraphWeight, base: str, parts: tuple[str, ...]) -> str:
        """Half a scale, and what float32 loses in the comparison."""
        scale = read_rows(self.artifact, self.by_name[base + SCALE], 0, weight.shape[0]).astype(np.float32)
        start, worst = 0, 0.0
        for rows in joined_rows(self.checkpoint, parts):
            stop = start + rows.shape[0]
            step = scale[start:stop, None]
            error = np.abs(read_rows(self.artifact, weight, start, stop) * step - rows.to(torch.float32).numpy())
            worst, start = max(worst, float((error / step).max())), stop
        return "" if worst <= 0.5 + 1e-3 else f"a dequantised value is {worst:.3g} scales from the checkpoint's; half a scale is the limit"


def stage_of(graph: str) -> str:
    """`fused` for fused.onnx and fused-engine.onnx."""
    return graph.removesuffix(".onnx").removesuffix("-engine")


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
    held = {part for weight in weights for part in members(weight.name.removesuffix(LEVELS), checkpoint)}
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
