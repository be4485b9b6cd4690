"""Where an error begins: the error of every layer alone, as a multiple of what float16 itself costs that layer.

    ratio = mean |graph's layer(x16) − y| ÷ mean |reference layer in float16(x16) − y|

x is the reference's float32 hidden state that enters the layer, x16 the same rounded to float16, y the float32 hidden state that leaves it. Every
layer starts from the reference, so a damaged layer shows at its own place, undiluted by those before and after.

The input's rounding is in the numerator as in the denominator, because y is computed from x: both sides are charged with what no float16
layer can avoid. Comparing with the float32 layer fed x16 instead would leave that out and gain a tenth of sensitivity for a second float32 pass.
Measured on SmolLM2 (128 tokens, every linear of nine layers): undamaged 0.56–0.95, one linear × 1.01 2.0–17, one linear × 1.05 9–88.
Letters: L tokens, E hidden, N layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from artifact import io_spec
from artifact.errors import ValidationError
from artifact.progress import Progress, silent
from exporter.model import attention_allowed
from exporter.rope import rotary_tables
from graphs.partition import cut_layer, cut_shared, layer_count, part_boundaries
from validation.cut_session import open_cut
from validation.floor import Float32Products
from validation.node_runner import Array, run_nodes
from validation.reference import Reference

TOKENS = 128
"""Positions that are used: enough for a mean over L·E values."""


@torch.inference_mode()
def float16_layer_errors(reference: Reference, hidden: Sequence[Array], progress: Progress = silent) -> list[float]:
    """The denominators: mean |float16 layer − float32 layer| of every layer; they depend on checkpoint and text alone, and serve all stages.

    Args:
        reference: gives the layers in float16.
        hidden: the reference's N+1 hidden states [L, E] float32 from position 0; the first ``TOKENS`` positions are used.
        progress: told which layer runs.

    Returns:
        N errors; NaN or inf where the layer overflows float16.
    """
    states = first_tokens(hidden)
    config, length = reference.config, len(states[0])
    cos, sin = (table[None, None, :length] for table in rotary_tables(config, torch.float16))  # [1, 1, L, D/2]
    mask = attention_allowed(torch.ones(1, length, dtype=torch.int64), length)
    past = torch.empty(1, config.num_key_value_heads, 0, config.head_dim, dtype=torch.float16)
    errors = []
    for index in range(config.num_hidden_layers):
        progress("reference layers in float16", index, config.num_hidden_layers)
        entering = torch.from_numpy(states[index]).to(torch.float16)[None]  # [1, L, E]
        with Float32Products():  # PyTorch's own float16 products are four times slower on a CPU, and round alike
            output, _ = reference.decoder_layer(index, torch.float16)(entering, cos, sin, mask, (past, past))
        errors.append(mean_error(output[0].float().numpy(), states[index + 1]))
    return errors


def local_ratios(graph: ir.Model | Path, hidden: Sequence[Array], float16_errors: Sequence[float], progress: Progress = silent) -> list[float] | None:
    """Cut every layer out of a graph, run it in ONNX Runtime on the reference's hidden state, and compare what leaves it.

    Args:
        graph: a graph of this toolkit, or its path; traced, fused or quantised.
        hidden: the reference's N+1 hidden states [L, E] float32 from position 0, as in ``float16_layer_errors``.
        float16_errors: what that returned, N values.
        progress: told which layer runs.

    Returns:
        N ratios (1.0 = as good as float16 in PyTorch; NaN or inf where one side is not finite); None for a float32 graph: not applicable.

    Raises:
        FusionError: the graph can't be cut at its layers.
        ValidationError: the graph has another number of layers than the reference, or ONNX Runtime can't run a layer.
    """
    errors = layer_errors(graph, hidden, progress)
    return None if errors is None else as_ratios(errors, float16_errors)


def layer_errors(graph: ir.Model | Path, hidden: Sequence[Array], progress: Progress = silent) -> list[float] | None:
    """The numerators of ``local_ratios``, whose arguments and errors these are."""
    model = ir.load(graph) if isinstance(graph, Path) else graph.clone()
    part_boundaries(model)
    layers = layer_count(model)
    if layers != len(hidden) - 1:
        raise ValidationError(f"the graph has {layers} layers; the reference has {len(hidden) - 1}")
    states = first_tokens(hidden)
    shared_part = cut_shared(model)
    if shared_part.graph.outputs[0].dtype != ir.DataType.FLOAT16:
        return None
    feeds = shared_feeds(model, len(states[0]))
    errors = []
    for index in range(layers):
        progress("one layer at a time", index, layers)
        output = run_layer(cut_layer(model, index), index, states[index].astype(np.float16)[None], feeds)
        errors.append(mean_error(output[0], states[index + 1]))
    progress("one layer at a time", layers, layers)
    return errors


def as_ratios(errors: Sequence[float], float16_errors: Sequence[float]) -> list[float]:
    """Errors of a graph's layers as multiples of what float16 costs each."""
    return [_ratio(error, float16_error) for error, float16_error in zip(errors, float16_errors, strict=True)]


def run_layer(layer: ir.Model, index: int, entering: Array, feeds: Mapping[str, Array]) -> Array:
    """[1, L, E] → [1, L, E] through one cut layer, whole, as ONNX Runtime optimises it."""
    session = open_cut(layer, f"layer {index}", run_once=True)
    hidden, *others = layer.graph.inputs
    layer_feeds = {str(hidden.name): entering} | {str(value.name): feeds[str(value.name)] for value in others}
    try:
        return np.asarray(session.run([layer.graph.outputs[0].name], layer_feeds)[0])
    except Exception as error:  # its exceptions have no common parent
        raise ValidationError(f"ONNX Runtime can't run layer {index} alone: {error}") from error


def shared_feeds(model: ir.Model, length: int) -> dict[str, Array]:
    """All that a layer reads but its hidden state: the graph's inputs for one row of real tokens and an empty cache, and what the layers share."""
    feeds = prefill_feeds(model, length)
    return feeds | run_nodes(cut_shared(model), feeds)


def prefill_feeds(model: ir.Model, length: int) -> dict[str, Array]:
    """Graph inputs for one row of ``length`` real tokens and an empty cache of either form; ids are 0, because the layers are fed hidden states."""
    known = {
        io_spec.INPUT_IDS: np.zeros((1, length), np.int64),
        io_spec.ATTENTION_MASK: np.ones((1, length), np.int64),
        io_spec.POSITION_IDS: np.arange(length, dtype=np.int64)[None],
        io_spec.CACHE_WRITE_INDICES: np.zeros(1, np.int64),
        io_spec.KEY_VALUE_LENGTHS: np.full(1, length, np.int64),
    }
    for value in model.graph.inputs:
        if value.name not in known:
            if value.shape is None or value.dtype is None:
                raise ValidationError(f"graph input {value.name} has no shape or dtype")
            axes = {io_spec.BATCH: 1, io_spec.PAST: 0, io_spec.CAPACITY: length}
            known[str(value.name)] = np.zeros([size if isinstance(size, int) else axes[str(size)] for size in value.shape], value.dtype.numpy())
    return known


def first_tokens(hidden: Sequence[Array]) -> list[Array]:
    """The first ``TOKENS`` positions. A causal layer's first outputs do not depend on later tokens, so a prefix of a longer run is a run."""
    return [state[:TOKENS] for state in hidden]


def mean_error(ours: Array, theirs: Array) -> float:
    """Mean |difference| of two arrays of any float dtype."""
    return float(np.abs(ours.astype(np.float32) - theirs).mean(dtype=np.float64))


def _ratio(error: float, float16_error: float) -> float:
    if float16_error:
        return error / float16_error
    return float("inf") if error else 0.0
