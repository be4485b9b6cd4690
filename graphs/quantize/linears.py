"""The linears of a graph, and the sites where their inputs are measured: q·k·v read one input, gate and up read one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from artifact.layout import PACKED, layer_of, layer_prefix
from graphs.fusions._reading import through
from graphs.fusions._values import producer

PACKED_OF = {member: packed for packed, members in PACKED.items() for member in members}

MOST_CASTS = 2
"""Between a product and its bias."""


@dataclass(frozen=True)
class Linear:
    """A MatMul by a transposed constant weight [out, in]."""

    matmul: ir.Node
    transpose: ir.Node
    weight: ir.Value

    @property
    def name(self) -> str:
        """The weight's name without `.weight`: the module path."""
        return str(self.weight.name).removesuffix(".weight")


def find_linears(graph: ir.Graph) -> Iterator[Linear]:
    """Every MatMul whose second operand is a transposed initializer, cast or not, in topological order."""
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        transpose = producer(through(node.inputs[1], "Cast"), "Transpose")
        if transpose is None:
            continue
        weight = transpose.inputs[0]
        if weight is not None and weight.is_initializer():
            yield Linear(node, transpose, weight)


def bias_of(linear: Linear) -> ir.Value | None:
    """The vector that is added to a linear's output, whatever its name, cast or not in between; None where there is none."""
    value = linear.matmul.outputs[0]
    for _ in range(MOST_CASTS + 1):
        readers = [node for node, _ in value.uses()]
        added = next((node for node in readers if node.op_type == "Add"), None)
        if added is not None:
            vectors = [through(operand, "Cast") for operand in added.inputs if operand is not None and operand is not value]
            return next((one for one in vectors if one is not None and one.is_initializer() and one.shape is not None and len(one.shape) == 1), None)
        if len(readers) != 1 or readers[0].op_type != "Cast":
            return None
        value = readers[0].outputs[0]
    return None


def site_of(module: str) -> str:
    """The site whose input a linear reads, named by the packed projection: `…layers.3.self_attn.k_proj` → `…layers.3.self_attn.qkv_proj`."""
    layer = layer_of(module)
    if layer is None:
        return module
    name = module.removeprefix(prefix := f"{layer_prefix(layer)}.")
    return prefix + PACKED_OF.get(name, name)
