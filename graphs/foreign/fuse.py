"""``fuse --graph``: any decoder's graph → the same decoder in fused operators, with the report of what fired and what was refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from artifact.errors import FusionError
from artifact.progress import Progress, silent
from graphs import contract
from graphs.cleanup import merge
from graphs.foreign.decoder import DecoderShape, fused_by_others, read_decoder
from graphs.foreign.prepare import Interface, prepare
from graphs.foreign.save import save_graph
from graphs.foreign.source import open_graph
from graphs.fusions import (
    accumulate,
    foreign_attention,
    foreign_group_query_attention,
    foreign_past_length,
    foreign_rms_norm,
    foreign_rotary,
    foreign_shape,
    skip_rms_norm,
)
from graphs.fusions._contrib import CONTRIB
from graphs.fusions._reading import through
from graphs.lower import lower_to
from graphs.passes import GROUPED_NOTE, Fusion, run_passes
from graphs.report import Before, FusionReport, RuleReport, check_complete
from graphs.rewriting import Refusal
from graphs.tensorrt_releases import check_release

NOT_PACKED = "not packed: the weights of linears that read one input are stored apart here, and packing them would write them all anew"


FORMS = (
    Fusion(
        "rms_norm",
        foreign_rms_norm,
        lambda shape: 2 * shape.num_hidden_layers + 1,
        requires=(contract.OPSET_23,),
        ensures=(contract.NORMS_IN_FLOAT32,),
        makes="RMSNormalization",
    ),
    Fusion(
        "rotary",
        foreign_rotary,
        lambda shape: 2 * shape.num_hidden_layers,
        requires=(contract.OPSET_23,),
        ensures=(contract.ROTATIONS_BY_TABLE,),
        makes="RotaryEmbedding",
    ),
    Fusion(
        "attention",
        foreign_attention,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.OPSET_23,),
        ensures=(contract.ATTENTION_PLAIN, contract.MASKS_BOOLEAN, contract.HEADS_UNREPEATED),
        makes="Attention",
    ),
    Fusion("constant_shape", foreign_shape, None, requires=(contract.HEADS_UNREPEATED,)),
)
"""``graphs.pipeline.FORMS`` in the spellings of other exporters; their values need not all be typed."""

PIPELINES = {
    "tensorrt": (*FORMS, Fusion("accumulate", accumulate, None, ensures=(contract.SUMS_IN_FLOAT32,))),
    "onnxruntime": (
        *FORMS,
        Fusion("group_query_attention", foreign_group_query_attention, lambda shape: shape.num_hidden_layers, merged=True, note=GROUPED_NOTE),
        Fusion("skip_rms_norm", skip_rms_norm, None, ensures=(contract.NORMS_IN_FLOAT32,), optional=True),
        Fusion("past_length", foreign_past_length, None, optional=True),
    ),
}
PACKING = {"tensorrt": ("pack_qkv", "pack_gate_up"), "onnxruntime": ("pack_rotated_qkv", "pack_sliced_gate_up")}
"""Target → the rules that pack three linears, and two, in our own graphs."""


def fuse_graph(
    source: Path,
    out: Path,
    *,
    target: str = "tensorrt",
    allow_partial: bool = False,
    min_tensorrt: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Fuse an ONNX file that this project did not make; its inputs and outputs keep their names, shapes and dtypes.

    Returns:
        What ``fuse`` reports of an artifact, and: source, out (None where nothing was to do), nothing_to_do (the reason, or ""), model (the shape
        that was read from the graph), opset_before, weights_bytes (copied).

    Raises:
        ParityMismatch: a rule fired another number of times than the model's shape says, and ``allow_partial`` is not given; nothing is written.
        FusionError: the file can't be read, is no decoder, or has no form in opset 23; or there is no such target;
            or ``min_tensorrt`` can't take what it holds.
        UsageError: there is no such release, or it is given for another target.
    """
    if target not in PIPELINES:
        raise FusionError(f"no fusions of foreign graphs for target {target!r}; there are: {', '.join(PIPELINES)}")
    if min_tensorrt is not None:
        check_release(min_tensorrt, target)
    model = open_graph(source)
    others, opset = fused_by_others(model), model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if others:
        whose = "ONNX Runtime" if others.startswith(CONTRIB) else "another runtime"
        return _nothing_to_do(model, source, target, f"attention is {others} already: it was fused for {whose}")
    report, shape = fuse_foreign(model, target, min_tensorrt, progress)
    details = {"source": str(source), "opset_before": opset, "model": shape.as_json()}
    if not report.lowered and not any(rule.fired or rule.expected for rule in report.rules):
        return report.as_json() | details | {"out": None, "weights_bytes": 0, "nothing_to_do": "every operator is in its fused form already"}
    if not allow_partial:
        check_complete(report)
    copied = save_graph(model, source, out, progress=progress)
    return report.as_json() | details | {"out": str(out), "weights_bytes": copied, "nothing_to_do": ""}


def fuse_foreign(model: ir.Model, target: str, min_tensorrt: str | None, progress: Progress = silent) -> tuple[FusionReport, DecoderShape]:
    """Fuse an opened graph in place; weights are neither read nor copied.

    Raises:
        FusionError: no decoder, or no form in opset 23.
    """
    before = Before.of(model)
    interface = Interface(model)
    progress("reading the graph", 0, len(PIPELINES[target]))
    prepare(model)
    shape = read_decoder(model)
    rules = run_passes(model, PIPELINES[target], shape, progress=progress)
    rules += [RuleReport(rule, 0, 0, refused) for rule, refused in zip(PACKING[target], _unpacked(model), strict=True)]
    lowered = {} if min_tensorrt is None else lower_to(model, min_tensorrt)
    merge(model)
    interface.restore(model)
    common_passes.NameFixPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    return replace(before.report(model, target, rules), min_tensorrt=min_tensorrt, lowered=lowered), shape


def _unpacked(model: ir.Model) -> tuple[list[Refusal], list[Refusal]]:
    """The linears that read one input and stay apart: three are q·k·v, two gate·up."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        read = through(node.inputs[0], "Cast") if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is not None else None
        if read is not None and read.producer() is not None:
            readers.setdefault(read, []).append(node)
    three, two = ([linears[0] for linears in readers.values() if len(linears) == count] for count in (3, 2))
    return _refused(three), _refused(two)


def _refused(linears: list[ir.Node]) -> list[Refusal]:
    return [Refusal(linear.name or linear.op_type, NOT_PACKED) for linear in linears]


def _nothing_to_do(model: ir.Model, source: Path, target: str, reason: str) -> dict[str, Any]:
    report = Before.of(model).report(model, target, []).as_json()
    details = {"source": str(source), "opset_before": model.opset_imports.get("", 0), "model": None}
    return report | details | {"out": None, "weights_bytes": 0, "nothing_to_do": reason}
