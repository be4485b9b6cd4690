"""Write the parts of an engine graph, one file each, and prove that they are the graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from artifact.errors import EngineError, UsageError
from artifact.io_spec import part_inputs, part_outputs
from engines.engine_entry import EngineModel
from graphs.parts import cut_part, interface_differs, parts_differ

AUTO = "auto"


def parse_parts(text: str) -> int | None:
    """``--parts``: a number, or None for ``auto``.

    Raises:
        UsageError: neither.
    """
    if text == AUTO:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--parts takes a number of plans or {AUTO}, got {text!r}", hint="--parts auto")
    return int(text)


def write_part_graphs(graph: Path, model: EngineModel, files: Sequence[Path]) -> None:
    """Cut an engine graph at the layers of its engine.

    Args:
        graph: the whole.
        model: the engine; its ``cut`` says which layers go where.
        files: a path for each part, in the graph's folder.

    Raises:
        FusionError: the graph can't be cut there.
        EngineError: a part's interface is not io_spec's, or the parts joined are not the graph; nothing is built from them.
    """
    whole = ir.load(graph)
    parts = [cut_part(whole, layers) for layers in model.cut.layers]
    for layers, part in zip(model.cut.layers, parts, strict=True):
        specs = (spec(model.config, model.dtype, model.kv_cache, layers) for spec in (part_inputs, part_outputs))
        if strange := interface_differs(part, *specs):
            raise EngineError(f"{graph.name}: the part of layers {layers[0]} to {layers[1]} has or lacks {', '.join(strange[:3])}")
    if different := parts_differ(whole, parts):
        raise EngineError(f"{graph.name}: its parts, joined, compute {different[0]} otherwise ({len(different)} outputs or weights differ)")
    for part, file in zip(parts, files, strict=True):
        ir.save(part, file)
