"""Open one cut of a graph in ONNX Runtime: its weights stay mapped in their files until it copies them, and are gone with the session.

ONNX Runtime computes a float16 graph in float32 and deletes a cast to float16 that is followed by one back, so between two layers of a whole graph
the hidden state is often not rounded. A cut that takes it as one float16 value would round it. So it leaves a cut in float32, and enters the next as
three float16 values that add up to it, 11 bits and 11 bits and the last two:

    whole:  … ─ Add ─────────────────────────────────────── layer 1 …          ONNX Runtime: both sums in float32, nothing rounded between
    cuts:   … ─ Add ─ Cast(float32) ═▶ x = high + rest · 2⁻¹¹ + … ═▶ Add(Add(high, Mul(rest, 2⁻¹¹)), …) ─ layer 1 …

In float16 such a sum gives ``high`` again, as each rest is at most half a step of it: each cut still is the graph's own computation. The rests are
scaled so that none of their bits falls below float16's smallest value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from artifact.errors import ValidationError
from artifact.io_spec import LOGITS
from validation.graph_interface import DISABLED, PROVIDERS, session_options

RESTS = {".rest": 2.0**-11, ".rest.rest": 2.0**-22}
"""What the other parts of a hidden state are called, behind its own name, and what they are multiplied by."""


def open_cut(cut: ir.Model, what: str, *, run_once: bool = False) -> Any:
    """A session of a cut.

    Args:
        cut: of ``graphs.partition``; its external data lies where the graph was loaded from.
        what: what it is called in an error: ``layer 3``.
        run_once: leave weights as they are: packing them for the processor would be waste.

    Raises:
        ValidationError: ONNX Runtime can't load it.
    """
    options = session_options()
    if run_once:
        options.add_session_config_entry("session.disable_prepacking", "1")
    folders = {str(tensor.base_dir) for value in cut.graph.initializers.values() if isinstance(tensor := value.const_value, ir.ExternalTensor)}
    for folder in folders:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return ort.InferenceSession(ir.to_proto(cut).SerializeToString(), options, providers=PROVIDERS, disabled_optimizers=DISABLED)
    except Exception as error:  # its exceptions have no common parent
        raise ValidationError(f"ONNX Runtime can't run {what} alone: {error}") from error


def widen(cut: ir.Model) -> ir.Model:
    """A copy of a cut whose first input is several float16 values and whose first output is float32; of another dtype they stay as they are.

    The inputs are those of ``entering``; only the hidden state is first in a cut of the layers, what the layers share comes as the graph has it.
    """
    copy = cut.clone()
    graph = copy.graph
    if graph.inputs[0].dtype == ir.DataType.FLOAT16:
        _take_in_parts(graph, graph.inputs[0])
    if graph.outputs[0].dtype == ir.DataType.FLOAT16 and graph.outputs[0].name != LOGITS:
        graph.outputs[0] = _give_in_float32(graph, graph.outputs[0])
    return copy


def entering(cut: ir.Model, state: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """A hidden state as a widened cut takes it: by name, in parts where the cut is of a float16 graph.

    Args:
        cut: before it was widened.
        state: [B, S, E], float32 or the cut's own dtype.
    """
    value = cut.graph.inputs[0]
    name = str(value.name)
    if value.dtype != ir.DataType.FLOAT16:
        return {name: state}
    parts = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for suffix, scale in {"": 1.0, **RESTS}.items():
            part = (state / np.float32(scale)).astype(np.float16)  # beyond 65504 an infinity, as the graph has it
            parts[name + suffix] = part
            state = np.where(np.isfinite(part), state - part.astype(np.float32) * np.float32(scale), np.float32(0))
    return parts


def _take_in_parts(graph: ir.Graph, value: ir.Value) -> None:
    users, total, made = list(value.uses()), value, []
    for position, (suffix, scale) in enumerate(RESTS.items(), start=1):
        rest = ir.Value(name=f"{value.name}{suffix}", type=value.type, shape=value.shape)
        graph.inputs.insert(position, rest)
        factor = ir.Value(name=f"{rest.name}.scale", const_value=ir.tensor(np.float16(scale), name=f"{rest.name}.scale"))
        graph.register_initializer(factor)
        scaled = ir.node("Mul", [rest, factor], name=f"{rest.name}.scaled")
        made += [scaled, ir.node("Add", [total, scaled.outputs[0]], name=f"{rest.name}.enters")]
        for node in made[-2:]:
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = node.name, value.type, value.shape
        total = made[-1].outputs[0]
    for user, index in users:
        user.replace_input_with(index, total)
    graph.insert_before(graph[0], made)


def _give_in_float32(graph: ir.Graph, value: ir.Value) -> ir.Value:
    name = str(value.name)
    value.name = f"{name}.float16"
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}.leaves")
    wide = cast.outputs[0]
    wide.name, wide.type, wide.shape = name, ir.TensorType(ir.DataType.FLOAT), value.shape
    graph.append(cast)
    return wide
