"""Integer products as an engine computes them, for strict mode: islands of Q/DQ (graphs/quantize/islands.py) become what their kernels do.

Before:  DequantizeLinear(QuantizeLinear(x)) ─ MatMul(Transpose(DequantizeLinear(levels [out, in], scale [out])))
After:   QuantizeLinear(x) ─ MatMulInteger(Transpose(levels)) ─ Cast(FLOAT) ─ Mul(scale · activation scale)

Levels are multiplied and summed in int32, exactly; the sum is rounded to float32 once, and once more by the product of both scales. Written as in
the graph, float32 rounds at every sum instead: the same model, but not the engine's numbers (plans of TensorRT-RTX 1.7.1; docs/adr/015).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from artifact.layout import MODULE_KEY
from graphs.fusions._values import producer
from validation.node_runner import load_constant


@dataclass(frozen=True)
class Island:
    """One product of a rounded input by a stored int8 weight."""

    product: ir.Node
    levels: ir.Value
    activation_scale: ir.Value
    transpose: ir.Node
    weight: ir.Node


def with_integer_products(model: ir.Model) -> ir.Model:
    """The model with every island rewritten, in a copy that shares its weights; the model itself where it has none."""
    if not any(read_island(node) for node in model.graph):
        return model
    model = model.clone()
    for island in [island for node in model.graph if (island := read_island(node)) is not None]:
        _rewrite(model.graph, island)
    return model


def read_island(node: ir.Node) -> Island | None:
    """The island whose product a node is; None for any other node."""
    if node.op_type != "MatMul":
        return None
    rounded = producer(node.inputs[0], "DequantizeLinear")
    quantize = producer(rounded.inputs[0], "QuantizeLinear") if rounded is not None else None
    transpose = producer(node.inputs[1], "Transpose")
    weight = producer(transpose.inputs[0], "DequantizeLinear") if transpose is not None else None
    if rounded is None or quantize is None or transpose is None or weight is None:
        return None
    levels, scale, stored = quantize.outputs[0], rounded.inputs[1], weight.inputs[0]
    if scale is None or stored is None or not stored.is_initializer():
        return None
    return Island(node, levels, scale, transpose, weight)


def _rewrite(graph: ir.Graph, island: Island) -> None:
    product, stored, scales = island.product, island.weight.inputs[0], island.weight.inputs[1]
    assert scales is not None
    both = np.asarray(load_constant(scales) * load_constant(island.activation_scale), np.float32)
    scale = ir.Value(name=f"{product.name}.scale", const_value=ir.tensor(both, name=f"{product.name}.scale"), type=ir.TensorType(ir.DataType.FLOAT))
    scale.shape = ir.Shape(both.shape)
    graph.initializers.add(scale)
    turned = ir.node("Transpose", [stored], {"perm": [1, 0]}, name=f"{product.name}.levels")
    summed = ir.node("MatMulInteger", [island.levels, turned.outputs[0]], name=f"{product.name}.integers")
    wide = ir.node("Cast", [summed.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{product.name}.wide")
    scaled = ir.node("Mul", [wide.outputs[0], scale], name=f"{product.name}.scaled")
    nodes = [turned, summed, wide, scaled]
    for node in nodes:
        node.metadata_props[MODULE_KEY] = product.metadata_props.get(MODULE_KEY, "")
        node.outputs[0].name = f"{node.name}.out"
    old = product.outputs[0]
    scaled.outputs[0].type, scaled.outputs[0].shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, product, [product], nodes, [old], [scaled.outputs[0]])
    for unused in (island.transpose, island.weight):
        if not unused.outputs[0].uses():
            graph.remove(unused, safe=True)
