"""One-node ONNX Runtime sessions, shared by all nodes that look the same from outside.

A session is made for an operator with its attributes and the dtypes and ranks of its inputs: a few dozen for a decoder of any depth, below a
millisecond each. Graph optimisation is off, and nothing is there to optimise: a float16 node keeps its float16 inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from artifact.errors import ValidationError
from graphs.diff import describe_node

Operand = tuple[ir.DataType, int] | None
"""Dtype and rank of a node's input; None where an optional input is left out."""

MANY_THREADS = frozenset({"MatMul", "Gemm", "Attention", "GroupQueryAttention", "MatMulNBits"})
_DTYPE_ATTRIBUTES = frozenset({"to", "output_dtype", "dtype"})
_NAMED_TYPES = {
    "float": ir.DataType.FLOAT,
    **{dtype.name.lower(): dtype for dtype in ir.DataType if dtype not in (ir.DataType.FLOAT, ir.DataType.UNDEFINED)},
}


class NodeSessions:
    """Sessions for the nodes of one model.

    Args:
        model: gives the opset and the IR version.
    """

    def __init__(self, model: ir.Model) -> None:
        self._opset_imports = dict(model.graph.opset_imports)
        self._ir_version = model.ir_version
        self._sessions: dict[tuple[object, ...], ort.InferenceSession] = {}

    def get(self, node: ir.Node, operands: Sequence[Operand], *, float32: bool = False) -> ort.InferenceSession:
        """The session for a node whose inputs have these dtypes and ranks; its inputs are named `0`, `1`, …, its outputs `out0`, ….

        Args:
            node: any node without a subgraph.
            operands: one for each of its inputs.
            float32: replace float16 by float32 in its attributes.

        Raises:
            ValidationError: ONNX Runtime refuses the node.
        """
        attributes = [_promoted(attribute) if float32 else attribute for attribute in node.attributes.values()]
        named = tuple(bool(value.name) for value in node.outputs)
        key = (node.domain, node.op_type, node.version, tuple(sorted(map(_attribute_key, attributes))), tuple(operands), named)
        if key not in self._sessions:
            self._sessions[key] = self._session(node, attributes, operands, named)
        return self._sessions[key]

    def output_dtypes(self, node: ir.Node, operands: Sequence[Operand]) -> list[ir.DataType]:
        """Dtypes of a node's named outputs, as ONNX Runtime infers them."""
        types = [output.type.removeprefix("tensor(").removesuffix(")") for output in self.get(node, operands).get_outputs()]
        unknown = sorted(set(types) - _NAMED_TYPES.keys())
        if unknown:
            raise ValidationError(f"{describe_node(node)} gives {unknown[0]}, which is no tensor")
        return [_NAMED_TYPES[name] for name in types]

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
        data = ir.to_proto(ir.Model(graph, ir_version=self._ir_version)).SerializeToString()
        try:
            return ort.InferenceSession(data, _options(node.op_type), providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common parent
            raise ValidationError(f"ONNX Runtime can't run {describe_node(node)} alone: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an exception of ONNX Runtime says, without its stack."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _options(op_type: str) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 0 if op_type in MANY_THREADS else 1
    options.enable_cpu_mem_arena = False  # an arena would keep the float32 copies of the largest product
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # dozens of idle thread pools must not spin
    return options


def _input_value(index: int, operand: Operand) -> ir.Value | None:
    if operand is None:
        return None
    dtype, rank = operand
    return ir.Value(name=str(index), type=ir.TensorType(dtype), shape=ir.Shape([f"d{index}_{axis}" for axis in range(rank)]))


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
