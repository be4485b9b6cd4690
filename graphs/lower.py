"""``--min-tensorrt``: write what a TensorRT release lacks in operators that it takes, and lower the opset to one that its parser knows.

An operator that the release takes stays. The numbers stay those of the traced graph: what is written is the form that the fusions started from.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from artifact.errors import FusionError
from graphs.lowering import attention, rms_norm, rotary
from graphs.tensorrt_releases import LATER, RELEASES, check_release, first_release, takes

LOWERINGS: tuple[ModuleType, ...] = (rms_norm, rotary, attention)
OLD_OPSET, OLD_IR_VERSION = 19, 9
"""Of ONNX 1.14, which the parser has had since TensorRT 9.0; float16 scales of DequantizeLinear are of opset 19."""
FUSED_OPSET_FROM = LATER["Attention"]
"""The first release with an operator of opset 23."""


def lower_to(model: ir.Model, release: str) -> dict[str, int]:
    """Lower a fused graph in place; weights are neither read nor copied.

    Returns:
        Operator → how many nodes of it were written in others.

    Raises:
        UsageError: an unknown release.
        FusionError: a node that no operator of that release, or of its opset, can stand for.
    """
    check_release(release)
    lowered: Counter[str] = Counter()
    for lowering in LOWERINGS:
        if takes(release, lowering.OPERATOR):
            continue
        for node in [node for node in model.graph if node.op_type == lowering.OPERATOR and node.domain == ""]:
            lowering.lower(model.graph, node)
            lowered[lowering.OPERATOR] += 1
    common_passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    _check_taken(model, release)
    if RELEASES.index(release) < RELEASES.index(FUSED_OPSET_FROM):
        _lower_opset(model, release)
    return dict(lowered)


def _check_taken(model: ir.Model, release: str) -> None:
    for node in model.graph:
        first = first_release(node.op_type, node.domain)
        if first is None or RELEASES.index(first) > RELEASES.index(release):
            why = "no known release takes it" if first is None else f"TensorRT {first} is the first that takes it"
            raise FusionError(
                f"{node.name} ({node.op_type}) can't be built by TensorRT {release}: {why}, and it has no older form here",
                hint=f"--min-tensorrt {first}" if first else "fuse without --min-tensorrt; TensorRT needs a plug-in for it",
            )


def _lower_opset(model: ir.Model, release: str) -> None:
    """Say that the graph is of an older opset, after a look that every node is there in the same form."""
    if model.opset_imports.get("", 0) <= OLD_OPSET:
        return
    for node in model.graph:
        try:
            schema = onnx.defs.get_schema(node.op_type, OLD_OPSET, "")
        except onnx.defs.SchemaError as error:
            raise _newer(node, release) from error
        if node.attributes.keys() - schema.attributes.keys() or len(node.inputs) > schema.max_input:
            raise _newer(node, release)
    model.opset_imports[""] = OLD_OPSET
    model.ir_version = min(model.ir_version, OLD_IR_VERSION)


def _newer(node: ir.Node, release: str) -> FusionError:
    return FusionError(f"{node.name} ({node.op_type}) has no such form in opset {OLD_OPSET}, which TensorRT {release} knows")
