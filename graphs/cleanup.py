"""Leave nothing behind: one copy of each small constant, no dead nodes or initializers, only our own metadata, names by module."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from artifact.layout import MODULE_KEY
from artifact.naming import name_by_module

SHARED_CONSTANT_BYTES = 256


def clean_up(model: ir.Model) -> None:
    """Finish a rewritten graph in place.

    Requires: nodes carry their module path, or none.
    Ensures: equal small constants are one initializer; every node leads to an output; every initializer is used; nodes are sorted, named by
    module and operator, and carry no metadata but the module. Weights are neither read nor renamed.
    """
    share_constants(model.graph)
    common_passes.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        module = node.metadata_props.get(MODULE_KEY, "")
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = module
    model.graph.sort()
    name_by_module(model)


def share_constants(graph: ir.Graph) -> None:
    """Let equal small constants be one; what is stored outside the graph stays as it is."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes > SHARED_CONSTANT_BYTES or value.is_graph_input():
            continue
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept, replace_graph_outputs=True)


def merge(model: ir.Model) -> None:
    """Let equal constants and equal computations be one, and drop what leads nowhere."""
    share_constants(model.graph)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
