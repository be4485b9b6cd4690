"""Run a graph one node at a time in ONNX Runtime: every node a session of its own, its inputs fed and its outputs taken.

Between nodes a value has exactly the dtype that the graph gives it. That is the point: ONNX Runtime computes a whole float16 graph in float32
(it inserts casts and removes ours), but a lone node with fed inputs is rounded to float16 at its outputs; inside, matrix products accumulate
in float32. A value is freed after its last use and a weight is mapped from its file while it is used, so the memory is that of the largest
layer and not of the model.

The same run in float32 (``float32=True``) promotes every float16 value, weight and constant: what the graph computes without rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from artifact.errors import ValidationError
from artifact.layout import MODULE_KEY, layer_of
from artifact.progress import Progress, silent
from graphs.diff import describe_node
from validation.node_sessions import NodeSessions, Operand, first_line

Array = npt.NDArray[Any]
Observe = Callable[[ir.Node, ir.Value, ir.DataType, Array], None]
"""``observe(node, value, dtype, array)``: a node's output as computed; dtype is the graph's own, also where the run is float32."""
Replace = Callable[[ir.Value, Array], Array]
"""``replace(value, array)``: what later nodes read of a value in the place of what was computed."""


class Stored(NamedTuple):
    """A value that is alive; ``dtype`` is the graph's own, also where ``array`` is promoted."""

    dtype: ir.DataType
    array: Array


def run_nodes(
    model: ir.Model,
    feeds: Mapping[str, Array],
    *,
    float32: bool = False,
    keep: Collection[str] = (),
    observe: Observe | None = None,
    replace: Replace | None = None,
    progress: Progress = silent,
) -> dict[str, Array]:
    """Run a graph node by node.

    Args:
        model: any graph without control flow; its external data lies where it was loaded from.
        feeds: graph input name → array, dtypes as in the graph; others are ignored.
        float32: promote float16 to float32 everywhere.
        keep: names of further values to return.
        observe: is shown every output of every node.
        replace: gives what is read on, so that a node can be fed what another computed.
        progress: told the layer that is being run.

    Returns:
        Graph outputs and kept values by name; float16 ones as float32 where ``float32`` is set.

    Raises:
        ValidationError: a feed is missing or has another dtype, a weight can't be read, or ONNX Runtime can't run a node alone; it is named.
    """
    run = _Run(model, feeds, float32=float32, keep=keep)
    nodes = list(model.graph)
    layer: int | None = -1
    for done, node in enumerate(nodes):
        if layer_of(node.metadata_props.get(MODULE_KEY)) != layer:
            layer = layer_of(node.metadata_props.get(MODULE_KEY))
            progress("running node by node" if layer is None else f"running layer {layer} node by node", done, len(nodes))
        run.step(node, observe, replace)
    progress("run node by node", len(nodes), len(nodes))
    return run.results


def load_constant(value: ir.Value) -> Array:
    """The array of an initializer; external data is mapped, and unmapped when the array is gone. Levels of four bits come as int8.

    Raises:
        ValidationError: the value is no initializer, or its file is missing or too short.
    """
    tensor = value.const_value
    if tensor is None:
        raise ValidationError(f"{value.name} is read, but it is no input and no constant, and no node before computes it")
    if not isinstance(tensor, ir.ExternalTensor):
        return _fed(tensor)
    location, offset, length = tensor.location, tensor.offset, tensor.length
    # a new object, because the graph's own would keep its file mapped
    mapped = ir.ExternalTensor(location, offset, length, tensor.dtype, shape=tensor.shape, name=str(value.name), base_dir=tensor.base_dir)
    try:
        return _fed(mapped)
    except (OSError, ValueError) as error:
        raise ValidationError(
            f"{value.name}: {tensor.dtype.name}{list(tensor.shape)} at byte {offset or 0} of {location} can't be read: {error}",
            hint="export again; inspect --verify ART finds damaged files",
        ) from error


def _fed(tensor: ir.TensorProtocol) -> Array:
    """A tensor as a session is fed with it: numpy can't hand four bits to ONNX Runtime, and DequantizeLinear makes the same numbers of int8."""
    return tensor.numpy().astype(np.int8) if tensor.dtype == ir.DataType.INT4 else tensor.numpy()


class _Run:
    """The values that are alive between two nodes."""

    def __init__(self, model: ir.Model, feeds: Mapping[str, Array], *, float32: bool, keep: Collection[str]) -> None:
        self.results: dict[str, Array] = {}
        self._float32 = float32
        self._sessions = NodeSessions(model)
        self._wanted = {str(value.name) for value in model.graph.outputs} | set(keep)
        self._uses_left = Counter(value for node in model.graph for value in node.inputs if value is not None)
        self._alive: dict[ir.Value, Stored] = {}
        for value in model.graph.inputs:
            if not value.is_initializer():
                array = _feed(feeds, value)
                self._store(value, ir.DataType.from_numpy(array.dtype), array)

    def step(self, node: ir.Node, observe: Observe | None, replace: Replace | None) -> None:
        """Run one node, then free what no later node reads."""
        operands = [None if value is None else self._operand(value) for value in node.inputs]
        computed = self._compute(node, operands)
        dtypes = self._sessions.output_dtypes(node, [operand and (operand.dtype, operand.array.ndim) for operand in operands])
        outputs = [value for value in node.outputs if value.name]
        for output, dtype, array in zip(outputs, dtypes, computed, strict=True):
            if observe is not None:
                observe(node, output, dtype, array)
            self._store(output, dtype, array if replace is None else replace(output, array))
        for value in node.inputs:
            self._release(value)

    def _compute(self, node: ir.Node, operands: list[Stored | None]) -> list[Array]:
        seen: list[Operand] = [operand and (ir.DataType.from_numpy(operand.array.dtype), operand.array.ndim) for operand in operands]
        session = self._sessions.get(node, seen, float32=self._float32)
        feeds = {str(index): operand.array for index, operand in enumerate(operands) if operand is not None}
        try:
            return [np.asarray(output) for output in session.run(None, feeds)]
        except Exception as error:  # its exceptions have no common parent
            shapes = ", ".join(f"{array.dtype}{list(array.shape)}" for array in feeds.values())
            raise ValidationError(f"ONNX Runtime can't run {describe_node(node)} on {shapes}: {first_line(error)}") from error

    def _operand(self, value: ir.Value) -> Stored:
        if value in self._alive:
            return self._alive[value]
        array = load_constant(value)
        return Stored(ir.DataType.from_numpy(array.dtype), self._promoted(array))

    def _store(self, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        array = self._promoted(array)
        if value.name in self._wanted:
            self.results[value.name] = array
        if self._uses_left[value]:
            self._alive[value] = Stored(dtype, array)

    def _promoted(self, array: Array) -> Array:
        return array.astype(np.float32) if self._float32 and array.dtype == np.float16 else array

    def _release(self, value: ir.Value | None) -> None:
        if value is None:
            return
        self._uses_left[value] -= 1
        if not self._uses_left[value]:
            self._alive.pop(value, None)


def _feed(feeds: Mapping[str, Array], value: ir.Value) -> Array:
    if str(value.name) not in feeds:
        raise ValidationError(f"graph input {value.name} is not fed; fed are {', '.join(sorted(feeds)) or 'none'}")
    array = np.asarray(feeds[str(value.name)])
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        raise ValidationError(f"graph input {value.name} is {value.dtype.name}, fed was {array.dtype}")
    return array
