"""Names of nodes, values and small constants, made from module paths: every graph of an artifact is named by the same scheme."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from artifact.layout import MODULE_KEY


def name_by_module(model: ir.Model) -> None:
    """Name nodes and values by module and operator (`model.layers.3.self_attn.q_proj.MatMul`): readable, and the same every time."""
    outputs = set(model.graph.outputs)
    _name_constants(model.graph)
    seen: Counter[str] = Counter()
    for node in model.graph:
        base = ".".join(filter(None, (node.metadata_props.get(MODULE_KEY), node.op_type)))
        seen[base] += 1
        node.name = base if seen[base] == 1 else f"{base}_{seen[base]}"
        for index, value in enumerate(node.outputs):
            if value not in outputs and value.name != "":  # an empty name is an output left out
                value.name = f"{node.name}.{index}" if len(node.outputs) > 1 else node.name


def _name_constants(graph: ir.Graph) -> None:
    """Number the small constants in the order of their first use; weights keep their names."""
    used = {value: None for node in graph for value in node.inputs if value is not None and value.const_value is not None}
    constants = [value for value in used if value.is_initializer() and not _is_weight(value)]
    for prefix in ("renaming", "constant"):  # twice, so that a new name never meets an old one
        for index, value in enumerate(constants):
            value.name = f"{prefix}_{index}"


def _is_weight(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor) or (value.name or "").endswith(".weight")
