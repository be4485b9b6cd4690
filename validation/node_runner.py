"""Run a graph one node at a time in ONNX Runtime: every node a session of its own, its inputs fed and its outputs taken.

Between nodes a value has exactly the dtype that the graph gives it. That is the point: ONNX Runtime computes a whole float16 graph in float32
(it inserts casts and removes ours), but a lone node with fed inputs is rounded to float16 at its outputs; inside, matrix products accumulate
in float32. Nodes with the same operator, attributes, dtypes and ranks share a session: a few dozen at any depth. A value is freed after its
last use and a weight is mapped from its file while it is used, so the memory is that of the largest layer and not of the model.

The same run in float32 (``float32=True``) promotes every float16 value, weight and constant: what the graph computes without rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from artifact.errors import ValidationError
from artifact.layout import MODULE_KEY, layer_of
from artifact.progress import Progress, silent

Array = npt.NDArray[Any]
Observe = Callable[[ir.Node, ir.Value, ir.DataType, Array], None]
"""``observe(node, value, dtype, array)``: a node's output as computed; dtype is the graph's own, also where the run is float32."""

ManyThreads = frozenset({"MatMul", "Gemm", "Attention"})
_DTYPE_ATTRIBUTES = frozenset({"to", "output_dtype", "dtype"})
_ORT_DTYPES = {
    "float16": ir.DataType.FLOAT16,
    "float": ir.DataType.FLOAT,
    "double": ir.DataType.DOUBLE,
    "bfloat16": ir.DataType.BFLOAT16,
    "bool": ir.DataType.BOOL,
    **{name: ir.DataType[name.upper()] for name in ("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")},
}

Operand = tuple[ir.DataType, int] | None
"""Dtype and rank of a node's input; None where an optional input is left out."""


def run_nodes(
    model: ir.Model,
    feeds: Mapping[str, Array],
    *,
    float32: bool = False,
    keep: Collection[str] = (),
    observe: Observe | None = None,
    progress: Progress = silent,
) -> dict[str, Array]:
    """Run a graph node by node.

    Args:
        model: any graph without control flow; its external data lies where it was loaded from.
        feeds: graph input name → array, dtypes as in the graph.
        float32: promote float16 to float32 everywhere.
        keep: names of further values to return.
        observe: is shown every output of every node.
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
        run.step(node, observe)
    progress("run node by node", len(nodes), len(nodes))
    return run.results


def describe_node(node: ir.Node) -> str:
    """``name (operator, module)``."""
    module = node.metadata_props.get(MODULE_KEY)
    return f"{node.name or '?'} ({node.op_type}{', ' + module if module else ''})"


class NodeSessions:
    """One-node sessions, made when first needed and shared by all nodes that look the same from outside."""

    def __init__(self, model: ir.Model) -> None:
        self._opset_imports = dict(model.graph.opset_imports)
        self._ir_version = model.ir_version
        self._sessions: dict[tuple[object, ...], ort.InferenceSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, node: ir.Node, operands: Sequence[Operand], *, float32: bool = False) -> ort.InferenceSession:
        """The session for a node whose inputs have these dtypes and ranks; inputs are `0`, `1`, …, outputs `out0`, ….

        Raises:
            ValidationError: ONNX Runtime refuses the node.
        """
        attributes = [_promoted(attribute) if float32 else attribute for attribute in node.attributes.values()]
        named = tuple(bool(value.name) for value in node.outputs)
        key = (node.domain, node.op_type, node.version, tuple(sorted(map(_attribute_key, attributes))), tuple(operands), named)
        if key not in self._sessions:
            self._sessions[key] = self._session(node, attributes, operands, named)
        return self._sessions[key]

    def _session(self, node: ir.Node, attributes: list[ir.Attr], operands: Sequence[Operand], named: tuple[bool, ...]) -> ort.InferenceSession:
        inputs = [_input_value(index, operand) for index, operand in enumerate(operands)]
        outputs = [ir.Value(name=f"out{index}" if has_name else "") for index, has_name in enumerate(named)]
        alone = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, version=node.version)
        graph = ir.Graph(
            [value for value in inputs if value is not None],
            [value for value in outputs if value.name],
            nodes=[alone],
            opset_imports=self._opset_imports,
            name=node.op_type,
        )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 0 if node.op_type in ManyThreads else 1
        options.enable_cpu_mem_arena = False  # an arena keeps the largest product's float32 copies for ever
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # dozens of idle pools must not spin
        data = ir.to_proto(ir.Model(graph, ir_version=self._ir_version)).SerializeToString()
        try:
            return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common parent
            raise ValidationError(f"ONNX Runtime can't run {describe_node(node)} alone: {_first_line(error)}") from error


class _Run:
    """The values that are alive between two nodes."""

    def __init__(self, model: ir.Model, feeds: Mapping[str, Array], *, float32: bool, keep: Collection[str]) -> None:
        self.results: dict[str, Array] = {}
        self._float32 = float32
        self._sessions = NodeSessions(model)
        self._wanted = {str(value.name) for value in model.graph.outputs} | set(keep)
        self._uses_left = Counter(value for node in model.graph for value in node.inputs if value is not None)
        self._alive: dict[ir.Value, tuple[ir.DataType, Array]] = {}
        for value in model.graph.inputs:
            if not value.is_initializer():
                self._store(value, ir.DataType.from_numpy(_feed(feeds, value).dtype), _feed(feeds, value))

    def step(self, node: ir.Node, observe: Observe | None) -> None:
        """Run one node, then free what no later node reads."""
        operands = [None if value is None else self._operand(value) for value in node.inputs]
        arrays = [operand[1] for operand in operands if operand is not None]
        feeds = {str(index): operand[1] for index, operand in enumerate(operands) if operand is not None}
        session = self._sessions.get(node, [operand and (ir.DataType.from_numpy(operand[1].dtype), operand[1].ndim) for operand in operands], float32=self._float32)
        try:
            computed = session.run(None, feeds)
        except Exception as error:
            shapes = ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays)
            raise ValidationError(f"ONNX Runtime can't run {describe_node(node)} on {shapes}: {_first_line(error)}") from error
        dtypes = self._output_dtypes(node, operands)
        for value, dtype, array in zip((value for value in node.outputs if value.name), dtypes, computed, strict=True):
            if observe is not None:
                observe(node, value, dtype, array)
            self._store(value, dtype, array)
        for value in node.inputs:
            self._release(value)

    def _operand(self, value: ir.Value) -> tuple[ir.DataType, Array]:
        if value in self._alive:
            return self._alive[value]
        array = load_constant(value)
        dtype = ir.DataType.from_numpy(array.dtype)
        return dtype, self._promoted(array)

    def _output_dtypes(self, node: ir.Node, operands: Sequence[tuple[ir.DataType, Array] | None]) -> list[ir.DataType]:
        """What the graph's own dtypes are: those of the session that is not promoted."""
        session = self._sessions.get(node, [operand and (operand[0], operand[1].ndim) for operand in operands])
        return [_ORT_DTYPES[output.type.removeprefix("tensor(").removesuffix(")")] for output in session.get_outputs()]

    def _store(self, value: ir.Value, dtype: ir.DataType, array: Array) -> None:
        array = self._promoted(array)
        if value.name in self._wanted:
            self.results[value.name] = array
        if self._uses_left[value]:
            self._alive[value] = dtype, array

    def _promoted(self, array: Array) -> Array:
        return array.astype(np.float32) if self._float32 and array.dtype == np.float16 else array

    def _release(self, value: ir.Value | None) -> None:
        if value is None:
            return
        self._uses_left[value] -= 1
        if not self._uses_left[value]:
            self._alive.pop(value, None)


def load_constant(value: ir.Value) -> Array:
    """The array of an initializer; external data is mapped, and unmapped when the array is gone.

    Raises:
        ValidationError: the value is no initializer, or its file is missing or too short.
    """
    tensor = value.const_value
    if tensor is None:
        raise ValidationError(f"{value.name} is read, but nothing computes it: it is neither an input, nor an output of a node before, nor a constant")
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    # a new object, because the graph's own keeps its file mapped
    fresh = ir.ExternalTensor(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=tensor.base_dir)
    try:
        return fresh.numpy()
    except (OSError, ValueError) as error:
        raise ValidationError(
            f"{tensor.name}: {list(tensor.shape)} {tensor.dtype.name} at byte {tensor.offset} of {tensor.location} can't be read: {error}",
            hint="inspect --verify finds damaged files; export again",
        ) from error


def _feed(feeds: Mapping[str, Array], value: ir.Value) -> Array:
    array = feeds.get(str(value.name))
    if array is None:
        raise ValidationError(f"graph input {value.name} is not fed; fed are {', '.join(sorted(feeds)) or 'none'}")
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        raise ValidationError(f"graph input {value.name} is {value.dtype.name}, fed was {array.dtype}")
    return array


def _input_value(index: int, operand: Operand) -> ir.Value | None:
    if operand is None:
        return None
    dtype, rank = operand
    shape = ir.Shape([f"d{index}_{axis}" for axis in range(rank)])
    return ir.Value(name=str(index), type=ir.TensorType(dtype), shape=shape)


def _promoted(attribute: ir.Attr) -> ir.Attr:
    """The attribute with float32 in the place of float16."""
    if attribute.name in _DTYPE_ATTRIBUTES and attribute.value == ir.DataType.FLOAT16:
        return ir.AttrInt64(attribute.name, ir.DataType.FLOAT)
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT16:
        return ir.AttrTensor(attribute.name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))
    return attribute


def _attribute_key(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{attribute.name}={tensor.dtype} {tensor.shape} {tensor.tobytes().hex()}"
    return f"{attribute.name}={attribute.value!r}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
