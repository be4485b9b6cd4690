"""Bring a foreign graph into the form that the fusions read: opset 23, constants as initializers, known shapes, nothing that does nothing."""

from __future__ import annotations

import hashlib
import logging

import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript import version_converter

from artifact.errors import FusionError
from graphs.cleanup import merge
from graphs.foreign.measure import measure, name_axes
from graphs.foreign.source import OPSET
from graphs.fusions._rotary_tables import LARGEST_TABLE_BYTES
from graphs.fusions._values import numbers, scalar, sizes

CONVERTER_LOG = "onnxscript.version_converter"
TABLE_READERS = {"Gather", "Slice"}


def prepare(model: ir.Model) -> None:
    """Prepare a graph in place; weights are not read.

    Ensures: opset 23 or newer; every value's shape as measured (graphs/foreign/measure.py), inputs and outputs included: ``Interface`` puts
    theirs back; equal computations are one; no node that returns its input is left.

    Raises:
        FusionError: the opset can't be raised, or an input is none of a decoder's.
    """
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    common_passes.InlinePass()(model)
    raise_opset(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    share_tables(model.graph)
    merge(model)
    name_axes(model)
    measure(model)
    drop_idle_nodes(model)
    merge(model)


class Interface:
    """Names, shapes and dtypes of a graph's inputs and outputs, kept while it is rewritten."""

    def __init__(self, model: ir.Model) -> None:
        self._kept = [(value.name, value.shape, value.type) for value in (*model.graph.inputs, *model.graph.outputs)]

    def restore(self, model: ir.Model) -> None:
        """Give them back, and forget what was measured of all other values: its names of axes are not the graph's own."""
        for node in model.graph:
            for value in node.outputs:
                value.shape = value.type = None
        for value, (name, shape, type_) in zip((*model.graph.inputs, *model.graph.outputs), self._kept, strict=True):
            value.name, value.shape, value.type = name, shape, type_


def raise_opset(model: ir.Model) -> None:
    """Convert a graph of an older opset to 23; a newer one stays as it is.

    Raises:
        FusionError: a node has no form in opset 23, or the converter gives up.
    """
    before = model.opset_imports[""]
    if before >= OPSET:
        return
    heard = _Heard()
    logger = logging.getLogger(CONVERTER_LOG)
    logger.addHandler(heard)
    propagates, logger.propagate = logger.propagate, False  # said once, in our own words
    try:
        version_converter.convert_version(model, target_version=OPSET, fallback=True)
    except Exception as error:  # the converter raises classes of its own, without a common base
        raise FusionError(f"opset {before} can't be raised to {OPSET}: {type(error).__name__}: {error}", hint=_HINT) from error
    finally:
        logger.removeHandler(heard)
        logger.propagate = propagates
    if model.opset_imports.get("") != OPSET or heard.failures:
        why = heard.failures[0] if heard.failures else "the converter left it as it was"
        raise FusionError(f"opset {before} can't be raised to {OPSET}: {why}", hint=_HINT)


_HINT = f"export the model again with opset {OPSET}"


class _Heard(logging.Handler):
    """What a converter says that it skipped or failed at."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.failures: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        message = record.getMessage()
        if message.startswith(("Skipping", "Failed")):
            self.failures.append(message if record.exc_info is None else f"{message}: {record.exc_info[1]}")


def share_tables(graph: ir.Graph) -> None:
    """Let equal tables that are read by position be one: in some versions each layer brings its own cosines. One without its like is not read."""
    alike: dict[tuple[object, ...], list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor, readers = value.const_value, {use.node.op_type for use in value.uses()}
        if tensor is not None and len(tensor.shape) > 1 and tensor.nbytes <= LARGEST_TABLE_BYTES and readers <= TABLE_READERS:
            alike.setdefault((tensor.dtype, tuple(tensor.shape)), []).append(value)
    for tables in alike.values():
        kept: dict[bytes, ir.Value] = {}
        for value in tables if len(tables) > 1 else ():
            assert value.const_value is not None
            one = kept.setdefault(hashlib.sha256(value.const_value.tobytes()).digest(), value)
            if one is not value:
                ir.convenience.replace_all_uses_with(value, one)


def drop_idle_nodes(model: ir.Model) -> None:
    """Remove nodes whose output is their input: casts to the same dtype, slices and expansions that change no size, products with one."""
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type in IDLE and node.domain == "" else None
        if source is not None and not node.outputs[0].is_graph_output() and IDLE[node.op_type](node):
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)


def _same_dtype(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].dtype is not None and node.inputs[0].dtype == node.attributes.get_int("to")


def _same_shape(node: ir.Node) -> bool:
    shape = sizes(node.inputs[0])
    return shape is not None and None not in shape and shape == sizes(node.outputs[0])


def _forward(node: ir.Node) -> bool:
    steps = numbers(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    return _same_shape(node) and steps is not None and all(step > 0 for step in steps)


def _by_one(node: ir.Node) -> bool:
    return scalar(node.inputs[1]) == 1 and _same_shape(node)


IDLE = {
    "Identity": lambda node: True,
    "Cast": _same_dtype,
    "Slice": _forward,
    "Expand": _same_shape,
    "Reshape": _same_shape,
    "Mul": _by_one,
    "Div": _by_one,
}
