"""Shapes of every value of a graph, measured: shape inference at three sets of input sizes, one of them large and one the smallest there is.

Exporters leave shapes out, or name one axis in three ways; what a Reshape or an Expand does is then hidden behind a dozen nodes of arithmetic. With
numbers for the inputs' sizes that arithmetic can be done, and a size is known by how it changes from set to set: the same in all is a constant;
(7, 100003, 1) is a number of new tokens. No weight is read.
Letters: B batch, S new tokens, P past, T = P + S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from artifact.errors import FusionError
from artifact.io_spec import BATCH, PAST, SEQUENCE, TOTAL

PROBES: tuple[Mapping[str, int], ...] = (
    {BATCH: 3, SEQUENCE: 7, PAST: 13, TOTAL: 20},
    {BATCH: 5, SEQUENCE: 100_003, PAST: 200_017, TOTAL: 300_020},  # beyond any limit that a graph may clamp a length to
    {BATCH: 1, SEQUENCE: 1, PAST: 0, TOTAL: 1},  # where a graph may ask whether there is a past, or more than one token
)
AXES = {tuple(sizes[axis] for sizes in PROBES): axis for axis in PROBES[0]}
SMALL = 64
"""Elements up to which a value is computed, not only its shape."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Measured:
    """A value at one set of sizes: its type, and its elements if they are few and follow from sizes and constants alone."""

    type: onnx.TypeProto
    data: Array | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Sizes, None where inference found none."""
        tensor = self.type.tensor_type
        sizes = [axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim]
        return None if not tensor.HasField("shape") or None in sizes else tuple(size for size in sizes if size is not None)


def measure(model: ir.Model) -> None:
    """Give every value its shape and dtype, dynamic axes under the contract's names; what follows from constants alone becomes a constant.

    Requires: the graph's inputs are those of a decoder (``name_axes``).
    Ensures: a size that two axes share has one name, wherever it came from; an axis that is neither constant nor B, S, P or T stays unknown.
    """
    evaluations = [_evaluate(model, probe) for probe in PROBES]
    for node in list(model.graph):
        for value in node.outputs:
            found = [evaluation[value] for evaluation in evaluations if value in evaluation]
            if len(found) != len(PROBES):
                continue
            value.type = ir.TensorType(ir.DataType(found[0].type.tensor_type.elem_type))
            shapes = [one.shape for one in found if one.shape is not None]
            if len(shapes) == len(PROBES):
                value.shape = ir.Shape([_axis(measured) for measured in zip(*shapes, strict=True)])
            _keep_constant(model.graph, value, [one.data for one in found])


def name_axes(model: ir.Model) -> None:
    """Name the dynamic axes of the graph's inputs by what the input is; a fixed size stays.

    Raises:
        FusionError: an input with dynamic axes that is none of a decoder's.
    """
    token_axes, has_cache = _first_input_axes(model), any(_is_cache(value) for value in model.graph.inputs)
    for value in model.graph.inputs:
        shape = value.shape
        if shape is None:
            raise FusionError(f"no decoder: input {value.name} has no shape")
        axes = _axes_of_input(value, token_axes)
        if axes is not None and not has_cache:
            axes = tuple(SEQUENCE if axis == TOTAL else axis for axis in axes)
        if axes is None and not shape.is_static():
            raise FusionError(
                f"no decoder: input {value.name} {value.dtype} {[str(size) for size in shape]} is neither token ids, positions, a mask nor a cache"
            )
        value.shape = ir.Shape([size if isinstance(size, int) else axis for size, axis in zip(shape, axes or (None,) * len(shape), strict=True)])


def _is_cache(value: ir.Value) -> bool:
    """Whether an input holds past keys or values; without any, T = S."""
    return len(value.shape or ()) == 4 and "mask" not in (value.name or "").lower() and value.dtype is not None and value.dtype.is_floating_point()


def _axes_of_input(value: ir.Value, token_axes: tuple[str, ...]) -> tuple[str | None, ...] | None:
    """B, S, P, T of an input by its rank, dtype and name; None if it is none of a decoder's."""
    rank, name = len(value.shape or ()), (value.name or "").lower()
    if rank == 4:
        return (BATCH, None, PAST, None) if _is_cache(value) else (BATCH, None, SEQUENCE, TOTAL)
    if rank == 2:
        as_tokens = "mask" not in name and ("position" in name or tuple(map(str, value.shape or ())) == token_axes)
        return (BATCH, SEQUENCE) if as_tokens else (BATCH, TOTAL)
    return (SEQUENCE,) if rank == 1 and "position" in name else None


def _first_input_axes(model: ir.Model) -> tuple[str, ...]:
    """Axis names of the token ids: the rank-2 integer input that an embedding is read by."""
    for node in model.graph:
        ids = node.inputs[1] if node.op_type == "Gather" and len(node.inputs) > 1 else None
        if ids is not None and ids.is_graph_input() and ids.shape is not None and len(ids.shape) == 2:
            return tuple(map(str, ids.shape))
    return ()


def _axis(measured: tuple[int, ...]) -> int | str | None:
    return measured[0] if len(set(measured)) == 1 else AXES.get(measured)


def _keep_constant(graph: ir.Graph, value: ir.Value, elements: list[Array | None]) -> None:
    """Replace a computed value by an initializer where all sets of sizes give the same elements."""
    first = elements[0]
    if first is None or value.is_graph_output() or any(one is None or not np.array_equal(first, one) for one in elements[1:]):
        return
    tensor = ir.tensor(first, name=f"{value.name}.constant")
    constant = ir.Value(name=tensor.name, shape=ir.Shape(first.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(constant)
    ir.convenience.replace_all_uses_with(value, constant)


def _evaluate(model: ir.Model, sizes: Mapping[str, int]) -> dict[ir.Value, Measured]:
    """Types of all values, and the elements of the small ones, at one set of sizes."""
    known: dict[ir.Value, Measured] = {}
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        known[value] = _given(value, sizes)
    version = model.opset_imports[""]
    for node in model.graph:
        inputs = [known.get(value) for value in node.inputs if value is not None]
        if node.domain or any(one is None for one in inputs):
            continue
        named = {str(value.name): known[value] for value in node.inputs if value is not None}
        for value, found in zip(node.outputs, _infer(node, named, version), strict=True):
            if found is not None:
                known[value] = found
    return known


def _given(value: ir.Value, sizes: Mapping[str, int]) -> Measured:
    tensor, shape = value.const_value, value.shape if value.const_value is None else value.const_value.shape
    numbers = [size if isinstance(size, int) else sizes.get(str(size.value)) for size in shape or ()]
    dtype = value.dtype if tensor is None else tensor.dtype
    found = onnx.TypeProto()
    found.tensor_type.elem_type = int(dtype or ir.DataType.UNDEFINED)
    found.tensor_type.shape.SetInParent()
    for number in numbers:
        axis = found.tensor_type.shape.dim.add()
        if number is not None:
            axis.dim_value = number
    small = tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.size <= SMALL
    return Measured(found, tensor.numpy() if tensor is not None and small else None)


def _infer(node: ir.Node, named: Mapping[str, Measured], version: int) -> list[Measured | None]:
    """Outputs of one node; None for what its operator's inference does not say."""
    proto = ir.to_proto(node)
    data = {name: onnx.numpy_helper.from_array(one.data, name) for name, one in named.items() if one.data is not None}
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:  # an operator of a runtime under the standard domain
        return [None] * len(node.outputs)
    try:
        types = onnx.shape_inference.infer_node_outputs(
            schema, proto, {name: one.type for name, one in named.items()}, data, opset_imports=[onnx.OperatorSetIdProto(domain="", version=version)]
        )
    except onnx.shape_inference.InferenceError as error:
        raise FusionError(f"node {node.name} ({node.op_type}) contradicts its inputs: {error}") from error
    outputs = [Measured(types[str(value.name)]) if str(value.name) in types else None for value in node.outputs]
    values = _compute(node, proto, named, outputs, version)
    return [None if one is None else Measured(one.type, value) for one, value in zip(outputs, values, strict=True)]


def _compute(node: ir.Node, proto: onnx.NodeProto, named: Mapping[str, Measured], outputs: list[Measured | None], version: int) -> list[Array | None]:
    """Elements of a node's outputs where they are few and all inputs are known; a shape is known without its input's elements."""
    if node.op_type == "Shape":
        shape = next(iter(named.values())).shape
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape or ()))
        return [None if shape is None else np.array(shape[start:end], np.int64)]
    few = all(one is not None and one.shape is not None and np.prod(one.shape, dtype=float) <= SMALL for one in outputs)
    if not few or any(one.data is None for one in named.values()):
        return [None] * len(outputs)
    evaluator = ReferenceEvaluator(proto, opsets={"": version})
    return [np.asarray(one) for one in evaluator.run(None, {name: one.data for name, one in named.items()})]
