"""Trace a Llama to ONNX on the ``meta`` device: no weights in memory, plain operations, dynamic batch, sequence and past.

The exporter fuses when it may; this trace is pinned to plain operations (``optimize=False``, attention written out), so that ``graphs``
has its work to do and can say what fired. Peak memory does not depend on the model's size: the weights have shapes and no bytes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes
from onnxscript import optimizer
from torch.export import Dim

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ExportError
from artifact.io_spec import Dtype
from artifact.layout import MODULE_KEY
from exporter.model import LlamaModel

logger = logging.getLogger(__name__)
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}
IR_VERSION = 11
_SCOPES = "pkg.torch.onnx.name_scopes"
_AXIS_SOURCES = {
    io_spec.BATCH: (io_spec.INPUT_IDS, 0),
    io_spec.SEQUENCE: (io_spec.INPUT_IDS, 1),
    io_spec.TOTAL: (io_spec.ATTENTION_MASK, 1),
    io_spec.PAST: (io_spec.past_name(0, "key"), 2),
}
"""Where the size of each dynamic axis is read, whichever input the exporter happened to take."""


def trace_model(config: LlamaConfig, dtype: Dtype) -> ir.Model:
    """Trace every layer that ``config`` has.

    Returns:
        A graph with the contract's inputs and outputs; initializers of weights have a name, shape and dtype but no value;
        each node carries its module path in ``metadata_props["module"]``.

    Raises:
        ExportError: the exporter left an operator that is not plain ONNX.
    """
    captured = _capture(config, dtype)
    with _quiet():
        program = torch.onnx.export(captured, dynamo=True, optimize=False, opset_version=io_spec.OPSET, verbose=False)
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    model = program.model
    _drop_weight_values(model)
    with _quiet():
        optimizer.optimize(model)
    _rename_interface(model, config, dtype)
    _read_axes_from_one_place(model)
    _keep_module_paths(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "llama2trt", ""
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain})
    if foreign or model.functions:
        raise ExportError(
            f"the trace holds operators that are not plain ONNX: {', '.join(foreign)}", hint="pin torch to the version in constraints.txt"
        )
    return model


def _capture(config: LlamaConfig, dtype: Dtype) -> torch.export.ExportedProgram:
    """torch.export of the model on the meta device, with sizes that differ from each other and from 1."""
    batch, new, past = 2, 5, 7
    with torch.device("meta"):
        model = LlamaModel(config).to(TORCH_DTYPES[dtype]).eval()
        cache = partial(torch.empty, (batch, config.num_key_value_heads, past, config.head_dim), dtype=TORCH_DTYPES[dtype])
        tokens = partial(torch.empty, dtype=torch.int64)
        # every input its own tensor: torch.export takes two uses of one tensor for one input
        inputs = (
            tokens((batch, new)),
            tokens((batch, past + new)),
            tokens((batch, new)),
            [(cache(), cache()) for _ in range(config.num_hidden_layers)],
        )
    batch_axis, new_axis, past_axis = Dim(io_spec.BATCH), Dim(io_spec.SEQUENCE), Dim(io_spec.PAST)
    new_tokens = {0: batch_axis, 1: new_axis}
    layer = ({0: batch_axis, 2: past_axis}, {0: batch_axis, 2: past_axis})
    shapes = {
        "input_ids": new_tokens,
        "attention_mask": {0: batch_axis, 1: Dim.DYNAMIC},  # T = P + S, found by the exporter
        "position_ids": new_tokens,
        "past": [layer] * config.num_hidden_layers,
    }
    with _quiet():
        return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about packages that are not needed here off the user's screen."""
    for name in ("torch.onnx._internal.exporter._registration", "onnx_ir.passes.common.initializer_deduplication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _drop_weight_values(model: ir.Model) -> None:
    """Weights on the meta device have no bytes; the optimizer must not try to read them."""
    for value in model.graph.initializers.values():
        if value.name is not None and value.name.startswith(("model.", "lm_head.")):
            value.const_value = None


def _rename_interface(model: ir.Model, config: LlamaConfig, dtype: Dtype) -> None:
    """Give inputs, outputs and axes the contract's names."""
    graph = model.graph
    specs = [*io_spec.graph_inputs(config, dtype), *io_spec.graph_outputs(config, dtype)]
    axes: dict[str, str] = {}
    for value, spec in zip([*graph.inputs, *graph.outputs], specs, strict=True):
        value.name = spec.name
        for found, wanted in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(wanted, str):
                axes.setdefault(str(found), wanted)
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else axes.get(str(size)) for size in value.shape])


def _read_axes_from_one_place(model: ir.Model) -> None:
    """The exporter reads a shared size from any input that has it, which depends on depth; read it from a fixed one."""
    inputs = {value.name: value for value in model.graph.inputs}
    for node in model.graph:
        if node.op_type != "Shape" or node.inputs[0] not in model.graph.inputs:
            continue
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None or end != start + 1:
            continue
        name, axis = _AXIS_SOURCES[str(shape[start])]
        node.replace_input_with(0, inputs[name])
        node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)


def _keep_module_paths(model: ir.Model) -> None:
    """Replace the exporter's metadata (stack traces with file paths) by one entry: the module path."""
    nodes = list(model.graph)
    paths: dict[ir.Node, str] = {}
    for node in reversed(nodes):  # a node that the optimizer made has no scope: take its consumer's
        scopes = node.metadata_props.get(_SCOPES)
        consumers = [paths[user] for output in node.outputs for user, _ in output.uses() if user in paths]
        paths[node] = _module_path(scopes) if scopes else (consumers[0] if consumers else "")
    logits = model.graph.outputs[0].producer()
    for node in filter(None, (logits, *(value.producer() for value in (logits.inputs if logits else ()) if value))):
        paths[node] = paths[node] or "lm_head"
    for node in nodes:
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = paths[node]
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None


def _module_path(scopes: str) -> str:
    """The innermost module of a recorded scope list (`['', 'model', 'model.layers.0', 'add_3']` → `model.layers.0`)."""
    names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
    return next((name for name in reversed(names[:-1]) if name.startswith(("model", "lm_head"))), "")
