"""Which fusions run for which target, in which order."""

from __future__ import annotations

import logging
import time
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.errors import FusionError
from artifact.graph_file import load_graph
from artifact.manifest import require_artifact
from artifact.progress import Progress, silent
from artifact.steps import StepContext, require
from graphs import contract
from graphs.cleanup import clean_up
from graphs.fusions import (
    attention,
    constant_shape,
    group_query_attention,
    pack_gate_up,
    pack_qkv,
    pack_rotated_qkv,
    rms_norm,
    rotary,
    skip_rms_norm,
)
from graphs.passes import Fusion, run_passes
from graphs.report import FusionReport, check_complete, count_operators

logger = logging.getLogger(__name__)
OUTPUTS = {"tensorrt": "fused.onnx", "onnxruntime": "fused-onnxruntime.onnx"}

TENSORRT = (
    Fusion(
        "rms_norm",
        rms_norm,
        lambda shape: 2 * shape.num_hidden_layers + 1,
        requires=(contract.OPSET_23, contract.TYPED),
        ensures=(contract.NORMS_IN_FLOAT32,),
    ),
    Fusion(
        "rotary",
        rotary,
        lambda shape: 2 * shape.num_hidden_layers,
        requires=(contract.OPSET_23, contract.TYPED),
        ensures=(contract.ROTATIONS_BY_TABLE,),
    ),
    Fusion(
        "attention",
        attention,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.OPSET_23, contract.TYPED),
        ensures=(contract.ATTENTION_PLAIN, contract.MASKS_BOOLEAN, contract.HEADS_UNREPEATED),
    ),
    Fusion(
        "constant_shape",
        constant_shape,
        lambda shape: 4 * shape.num_hidden_layers,
        requires=(contract.TYPED, contract.HEADS_UNREPEATED),  # repeated heads have shapes that no constant can say
        ensures=(contract.SHAPES_CONSTANT,),
    ),
    Fusion(
        "pack_qkv",
        pack_qkv,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.TYPED, contract.SHAPES_CONSTANT, contract.WEIGHTS_OUTSIDE),
        ensures=(contract.WEIGHTS_OUTSIDE, contract.LINEARS_UNSLICED),
        needs_layout=True,
    ),
    Fusion(
        "pack_gate_up",
        pack_gate_up,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.TYPED, contract.WEIGHTS_OUTSIDE),
        ensures=(contract.WEIGHTS_OUTSIDE, contract.LINEARS_UNSLICED),
        needs_layout=True,
    ),
)
"""Operators that TensorRT's parser has and its compiler fuses."""

ONNXRUNTIME = (
    *TENSORRT[:4],  # rms_norm, rotary, attention, constant_shape
    Fusion(
        "group_query_attention",
        group_query_attention,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.TYPED, contract.SHAPES_CONSTANT, contract.ATTENTION_PLAIN),
        ensures=(contract.ROTATIONS_BY_TABLE,),
    ),
    Fusion(
        "pack_rotated_qkv",
        pack_rotated_qkv,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.TYPED, contract.WEIGHTS_OUTSIDE),
        ensures=(contract.WEIGHTS_OUTSIDE,),
        needs_layout=True,
    ),
    Fusion(
        "skip_rms_norm",
        skip_rms_norm,
        lambda shape: 2 * shape.num_hidden_layers,
        requires=(contract.TYPED, contract.NORMS_IN_FLOAT32),
    ),
)
"""Operators of ONNX Runtime's own where they were measured faster (docs/adr/010); gate and up stay two linears."""

PIPELINES = {"tensorrt": TENSORRT, "onnxruntime": ONNXRUNTIME}


def fuse_model(
    model: ir.Model, config: LlamaConfig, *, target: str = "tensorrt", own_layout: bool = True, progress: Progress = silent
) -> FusionReport:
    """Fuse a traced graph in place; weights are neither read nor copied.

    ``own_layout`` is False where the weights lie as somebody else stored them.

    Raises:
        FusionError: there is no such target, or a pass's claim does not hold.
    """
    fusions = _pipeline(target)
    start, nodes_before, ops_before = time.perf_counter(), model.graph.num_nodes(), count_operators(model)
    rules = run_passes(model, fusions, config, own_layout=own_layout, progress=progress)
    clean_up(model)
    seconds = round(time.perf_counter() - start, 3)
    logger.info("fused %d nodes to %d in %.1f s", nodes_before, model.graph.num_nodes(), seconds)
    return FusionReport(target, nodes_before, model.graph.num_nodes(), ops_before, count_operators(model), rules, seconds)


def fuse_artifact(step: StepContext, *, target: str = "tensorrt", allow_partial: bool = False) -> dict[str, Any]:
    """Write ``fused.onnx`` from ``traced.onnx``; the weights stay where they are.

    Returns:
        nodes_before, nodes_after, target, passed, seconds, rules, ops_before, ops_after.

    Raises:
        ParityMismatch: a rule fired another number of times than the model's shape says, and ``allow_partial`` is not given; nothing is written.
        FusionError: there is no such target.
        ArtifactError: the folder is no artifact, or has no traced.onnx.
    """
    _pipeline(target)
    described = require_artifact(step.artifact, "fuse")["model"]
    config = LlamaConfig(**described["config"])
    model = load_graph(require(step.artifact, "traced.onnx"))
    report = fuse_model(model, config, target=target, own_layout=described.get("weights") != "reference", progress=step.progress)
    if not allow_partial:
        check_complete(report)
    with step.write(OUTPUTS[target]) as temporary:
        ir.save(model, temporary)
    return report.as_json()


def _pipeline(target: str) -> tuple[Fusion, ...]:
    if target not in PIPELINES:
        raise FusionError(f"no fusions for target {target!r}; there are: {', '.join(PIPELINES)}")
    return PIPELINES[target]
