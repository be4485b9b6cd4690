"""Trace a Llama to ONNX on the ``meta`` device: no weights in memory, plain operations, dynamic batch, sequence and cache length.

The exporter fuses when it may; this trace is pinned to plain operations (``optimize=False``, attention written out), so that ``graphs``
has its work to do and can say what fired. Peak memory does not depend on the model's size: the weights have shapes and no bytes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes
from onnxscript import optimizer
from onnxscript.onnx_opset import opset24
from torch.export import Dim

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ExportError
from artifact.io_spec import Dtype, KvCache
from artifact.layout import MODULE_KEY
from exporter.model import LlamaModel
from exporter.static_cache import StaticLlamaModel

logger = logging.getLogger(__name__)
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}
MODELS: dict[KvCache, type[LlamaModel]] = {"dynamic": LlamaModel, "static": StaticLlamaModel}
IR_VERSION = 11
_SCOPES = "pkg.torch.onnx.name_scopes"
_AXIS_SOURCES = {
    io_spec.BATCH: (io_spec.INPUT_IDS, 0),
    io_spec.SEQUENCE: (io_spec.INPUT_IDS, 1),
    io_spec.TOTAL: (io_spec.ATTENTION_MASK, 1),
    io_spec.PAST: (io_spec.past_name(0, "key"), 2),
    io_spec.CAPACITY: (io_spec.past_name(0, "key"), 2),
}
"""Where the size of each dynamic axis is read, whichever input the exporter happened to take."""


def trace_model(config: LlamaConfig, dtype: Dtype, kv_cache: KvCache = "dynamic") -> ir.Model:
    """Trace every layer that ``config`` has.

    Returns:
        A graph with the contract's inputs and outputs; initializers of weights have a name, shape and dtype but no value;
        each node carries its module path in ``metadata_props["module"]``.

    Raises:
        ExportError: the exporter left an operator that is not plain ONNX.
    """
    captured = _capture(config, dtype, kv_cache)
    translations: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.llama2trt.tensor_scatter.default: _tensor_scatter}
    with _quiet():
        program = torch.onnx.export(
            captured,
            dynamo=True,
            optimize=False,
            opset_version=io_spec.OPSETS[kv_cache],
            custom_translation_table=translations,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    model = program.model
    _drop_weight_values(model)
    with _quiet():
        optimizer.optimize(model)
    _rename_interface(model, config, dtype, kv_cache)
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


def _tensor_scatter(cache: Any, new: Any, write_indices: Any) -> Any:
    """What the exporter writes for ``exporter.static_cache.tensor_scatter``."""
    return opset24.TensorScatter(cache, new, write_indices, axis=-2, mode="linear")


def _capture(config: LlamaConfig, dtype: Dtype, kv_cache: KvCache) -> torch.export.ExportedProgram:
    """torch.export of the model on the meta device; axes are dynamic as in ``io_spec``, with sizes that differ from each other and from 1."""
    sizes = {io_spec.BATCH: 2, io_spec.SEQUENCE: 5, io_spec.PAST: 7, io_spec.TOTAL: 12, io_spec.CAPACITY: 11}
    # T = P + S is found by the exporter
    axes = {name: Dim.DYNAMIC if name == io_spec.TOTAL else Dim(name) for name in sizes}
    types: dict[str, torch.dtype] = {"int64": torch.int64, "fp16": torch.float16, "fp32": torch.float32}
    specs = io_spec.graph_inputs(config, dtype, kv_cache)
    with torch.device("meta"):
        model = MODELS[kv_cache](config).to(TORCH_DTYPES[dtype]).eval()
        # every input its own tensor: torch.export takes two uses of one tensor for one input
        tensors = {spec.name: torch.empty(spec.sizes(**sizes), dtype=types[spec.dtype]) for spec in specs}
    dynamic = {spec.name: {axis: axes[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in specs}
    inputs, shapes = _by_layer(tensors, config), _by_layer(dynamic, config)
    with _quiet():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


def _by_layer(values: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """Arguments of a model's ``forward`` from a value for each graph input: the caches become a list of pairs."""
    names = [[io_spec.past_name(layer, kind) for kind in io_spec.CACHE_KINDS] for layer in range(config.num_hidden_layers)]
    caches = {name for pair in names for name in pair}
    return {name: value for name, value in values.items() if name not in caches} | {"past": [tuple(values[name] for name in pair) for pair in names]}


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


def _rename_interface(model: ir.Model, config: LlamaConfig, dtype: Dtype, kv_cache: KvCache) -> None:
    """Give inputs, outputs and axes the contract's names."""
    graph = model.graph
    specs = [*io_spec.graph_inputs(config, dtype, kv_cache), *io_spec.graph_outputs(config, dtype, kv_cache)]
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
