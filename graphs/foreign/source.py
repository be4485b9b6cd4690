"""Open an ONNX file of unknown origin: everything that can be wrong with it is found before anything is done with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from artifact.errors import FusionError
from artifact.io_spec import OPSETS
from graphs.foreign.lazy import load_lazily

OPSET, NEWEST_OPSET = OPSETS["dynamic"], OPSETS["static"]
"""23, to which older graphs are raised; and 24, the newest whose operators are known here (TensorScatter)."""
STANDARD = ("", "ai.onnx")
MERGED = "use_cache_branch"
"""Input of optimum's merged decoders."""


def open_graph(path: Path) -> ir.Model:
    """Read an ONNX file without its weights, and check that all external data is there; weights in the file itself count as external data of its own.

    Raises:
        FusionError: no ONNX file, cut off, a newer opset than is known, control flow, or external data that is missing, too short or elsewhere.
    """
    if not path.is_file():
        raise FusionError(f"there is no file {path}")
    try:
        model = load_lazily(path)
    except Exception as error:  # protobuf and onnx-ir raise classes of their own, without a common base
        raise FusionError(
            f"{path} is not a readable ONNX file, or is cut off: {type(error).__name__}: {error}", hint="export or copy the file again"
        ) from error
    if not model.graph.num_nodes() or not model.graph.outputs:
        raise FusionError(f"{path} is not an ONNX model: its graph is empty", hint="export or copy the file again")
    _check_opset(model, path)
    if any(value.name == MERGED for value in model.graph.inputs):
        what = f"{path} is a merged decoder (input {MERGED}): two graphs behind an If"
        raise FusionError(what, hint="export it unmerged: optimum-cli export onnx --no-post-process")
    for node in model.graph:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
            raise FusionError(
                f"{path}: node {node.name} is {node.op_type}, which holds graphs of its own; a decoder without control flow is expected"
            )
    for tensor in external_tensors(model):
        _check_stored(tensor, path)
    return model


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every initializer that is stored outside the graph, in the graph's order."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


def _check_opset(model: ir.Model, path: Path) -> None:
    versions = [model.opset_imports[domain] for domain in STANDARD if domain in model.opset_imports]
    if not versions:
        raise FusionError(f"{path} imports no ONNX opset, only {', '.join(model.opset_imports) or 'nothing'}")
    if max(versions) > NEWEST_OPSET:
        raise FusionError(
            f"{path} is of opset {max(versions)}; the newest that is known here is {NEWEST_OPSET}", hint=f"export it again with opset {OPSET}"
        )


def _check_stored(tensor: ir.ExternalTensor, path: Path) -> None:
    """Raise FusionError if a tensor's bytes are not within the folder of the graph, or not all there."""
    folder = path.resolve().parent
    file = (folder / tensor.location).resolve()
    what = f"{path}: the external data of {tensor.name}"
    if not file.is_relative_to(folder):
        raise FusionError(f"{what} lies outside its folder: {tensor.location}", hint="export it again with its data beside it")
    if not file.is_file():
        raise FusionError(f"{what} is missing: there is no file {file}", hint="copy the data file beside the graph")
    start, size = tensor.offset or 0, file.stat().st_size
    length = tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes:
        raise FusionError(f"{what} has {length} bytes, expected {tensor.nbytes} for {tensor.dtype} {list(tensor.shape)}")
    if start < 0 or start + length > size:
        raise FusionError(f"{what} is cut off: bytes {start} to {start + length} of {file.name}, which has {size}", hint="copy the data file again")
