"""``fuse --graph``: any decoder's graph → the same decoder in fused operators, with the report of what fired and what was refused."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from artifact.errors import FusionError
from artifact.progress import Progress, silent
from graphs.foreign.decoder import DecoderShape, fused_by_others, read_decoder
from graphs.foreign.prepare import Interface, merge, prepare
from graphs.foreign.save import save_graph
from graphs.foreign.source import open_graph
from graphs.fusions import foreign_attention, foreign_rms_norm, foreign_rotary, foreign_shape
from graphs.fusions._reading import Reader, apply_reader
from graphs.pipeline import FusionReport, RuleReport, check_complete
from graphs.rewriting import Refusal

TARGETS = ("tensorrt",)
NOT_PACKED = "not packed: the weights of linears that read one input are stored apart here, and packing them would write them all anew"


@dataclass(frozen=True)
class ForeignFusion:
    """One entry of the pipeline.

    Attributes:
        rule: name in the report, as for our own graphs.
        reader: the fusion file.
        whole: how many of ``operator`` a decoder of this shape has; None where only the graph can say.
        operator: what the rule makes; those that are there already, and are no candidates, are not expected again.
    """

    rule: str
    reader: Reader
    whole: Callable[[DecoderShape], int] | None
    operator: str

    def expected(self, model: ir.Model, shape: DecoderShape) -> int:
        """How often the rule must fire in this graph."""
        candidates = {node for node in model.graph if self.reader.is_candidate(node)}
        if self.whole is None:
            return len(candidates)
        there = sum(1 for node in model.graph if node.op_type == self.operator and node.domain == "" and node not in candidates)
        return self.whole(shape) - there


FUSIONS = (
    ForeignFusion("rms_norm", foreign_rms_norm, lambda shape: 2 * shape.num_hidden_layers + 1, "RMSNormalization"),
    ForeignFusion("rotary", foreign_rotary, lambda shape: 2 * shape.num_hidden_layers, "RotaryEmbedding"),
    ForeignFusion("attention", foreign_attention, lambda shape: shape.num_hidden_layers, "Attention"),
    ForeignFusion("constant_shape", foreign_shape, None, "Reshape"),
)
"""In this order: constant_shape after attention, which leaves no repeated heads."""


def fuse_graph(source: Path, out: Path, *, target: str = "tensorrt", allow_partial: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Fuse an ONNX file that this project did not make; its inputs and outputs keep their names, shapes and dtypes.

    Returns:
        What ``fuse`` reports of an artifact, and: source, out (None where nothing was to do), nothing_to_do (the reason, or ""), model (the shape
        that was read from the graph), opset_before, weights_bytes (copied).

    Raises:
        ParityMismatch: a rule fired another number of times than the model's shape says, and ``allow_partial`` is not given; nothing is written.
        FusionError: the file can't be read, is no decoder, or has no form in opset 23; or there is no such target.
    """
    if target not in TARGETS:
        raise FusionError(f"no fusions of foreign graphs for target {target!r}; there are: {', '.join(TARGETS)}")
    model = open_graph(source)
    others, opset = fused_by_others(model), model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if others:
        return _nothing_to_do(model, source, target, f"attention is {others} already: it was fused for another runtime")
    report, shape = fuse_foreign(model, target, progress)
    details = {"source": str(source), "opset_before": opset, "model": shape.as_json()}
    if not any(rule.fired or rule.expected for rule in report.rules):
        return report.as_json() | details | {"out": None, "weights_bytes": 0, "nothing_to_do": "every operator is in its fused form already"}
    if not allow_partial:
        check_complete(report)
    copied = save_graph(model, source, out, progress=progress)
    return report.as_json() | details | {"out": str(out), "weights_bytes": copied, "nothing_to_do": ""}


def fuse_foreign(model: ir.Model, target: str, progress: Progress = silent) -> tuple[FusionReport, DecoderShape]:
    """Fuse an opened graph in place; weights are neither read nor copied.

    Raises:
        FusionError: no decoder, or no form in opset 23.
    """
    start, nodes_before, ops_before = time.perf_counter(), model.graph.num_nodes(), _operators(model)
    interface = Interface(model)
    progress("reading the graph", 0, len(FUSIONS))
    prepare(model)
    shape = read_decoder(model)
    rules = []
    for done, fusion in enumerate(FUSIONS):
        progress(f"fusing {fusion.rule}", done, len(FUSIONS))
        expected = fusion.expected(model, shape)
        result = apply_reader(model, fusion.reader)
        rules.append(RuleReport(fusion.rule, result.fired, expected, result.refused))
    rules += [RuleReport(rule, 0, 0, refused) for rule, refused in _unpacked(model).items()]
    merge(model)
    interface.restore(model)
    common_passes.NameFixPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    seconds = round(time.perf_counter() - start, 3)
    return FusionReport(target, nodes_before, model.graph.num_nodes(), ops_before, _operators(model), rules, seconds), shape


def _unpacked(model: ir.Model) -> dict[str, list[Refusal]]:
    """The linears that read one input and stay apart, under the rule that packs them in our own graphs: three are q·k·v, two gate·up."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is not None and node.inputs[0].producer() is not None:
            readers.setdefault(node.inputs[0], []).append(node)
    kinds: dict[str, list[Refusal]] = {"pack_qkv": [], "pack_gate_up": []}
    for linears in readers.values():
        rule = {3: "pack_qkv", 2: "pack_gate_up"}.get(len(linears))
        if rule:
            kinds[rule].append(Refusal(linears[0].name or linears[0].op_type, NOT_PACKED))
    return kinds


def _nothing_to_do(model: ir.Model, source: Path, target: str, reason: str) -> dict[str, Any]:
    operators, nodes = _operators(model), model.graph.num_nodes()
    report = FusionReport(target, nodes, nodes, operators, operators, [], 0.0).as_json()
    details = {"source": str(source), "opset_before": model.opset_imports.get("", 0), "model": None}
    return report | details | {"out": None, "weights_bytes": 0, "nothing_to_do": reason}


def _operators(model: ir.Model) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in model.graph).items()))
