"""Which fusions run for which target, in which order."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import ModuleType
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.errors import FusionError
from artifact.graph_file import load_graph
from artifact.io_spec import KvCache
from artifact.manifest import kv_cache_of, require_artifact
from artifact.progress import Progress, silent
from artifact.steps import StepContext, require
from graphs import contract
from graphs.cleanup import clean_up
from graphs.fusions import (
    accumulate,
    attention,
    constant_shape,
    group_query_attention,
    grouped_static_attention,
    pack_gate_up,
    pack_grouped_qkv,
    pack_qkv,
    pack_rotated_qkv,
    pack_sliced_gate_up,
    rms_norm,
    rotary,
    skip_rms_norm,
    static_attention,
)
from graphs.lower import lower_to
from graphs.passes import GROUPED_NOTE, Fusion, run_passes
from graphs.report import Before, FusionReport, check_complete
from graphs.tensorrt_releases import LATER, check_release, takes

logger = logging.getLogger(__name__)
CACHE_WRITER = "TensorScatter"
OUTPUTS = {"tensorrt": "fused.onnx", "onnxruntime": "fused-onnxruntime.onnx"}


def _packing(rule: str, module: ModuleType, *, requires: tuple[contract.Claim, ...] = (), ensures: tuple[contract.Claim, ...] = ()) -> Fusion:
    """A pass that packs linears of each layer whose weights lie next to each other."""
    return Fusion(
        rule,
        module,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.TYPED, contract.WEIGHTS_OUTSIDE, *requires),
        ensures=(contract.WEIGHTS_OUTSIDE, *ensures),
        needs_layout=True,
    )


FORMS = (
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
        ensures=(contract.ROTATIONS_OF_HALVES,),
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
)
"""What every target fuses first: the norm, the rotation and the attention of a trace, each one operator."""

TENSORRT = (
    *FORMS,
    _packing("pack_qkv", pack_qkv, requires=(contract.SHAPES_CONSTANT,), ensures=(contract.LINEARS_UNSLICED,)),
    _packing("pack_gate_up", pack_gate_up, ensures=(contract.LINEARS_UNSLICED,)),
    Fusion("accumulate", accumulate, None, requires=(contract.TYPED,), ensures=(contract.SUMS_IN_FLOAT32,)),
)
"""Operators that TensorRT's parser has and its compiler fuses."""

ONNXRUNTIME_ENDS = (
    _packing("pack_sliced_gate_up", pack_sliced_gate_up),
    Fusion(
        "skip_rms_norm",
        skip_rms_norm,
        lambda shape: 2 * shape.num_hidden_layers,
        requires=(contract.TYPED, contract.NORMS_IN_FLOAT32),
        ensures=(contract.NORMS_IN_FLOAT32,),
    ),
)
"""What is fused for ONNX Runtime around the attention, whatever the cache."""

ONNXRUNTIME = (
    *FORMS,
    Fusion(
        "group_query_attention",
        group_query_attention,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.TYPED, contract.SHAPES_CONSTANT, contract.ATTENTION_PLAIN),
        ensures=(contract.ROTATIONS_OF_HALVES,),
        note=GROUPED_NOTE,
    ),
    _packing("pack_rotated_qkv", pack_rotated_qkv, ensures=(contract.SHAPES_CONSTANT,)),
    *ONNXRUNTIME_ENDS,
)
"""Operators of ONNX Runtime's own where they were measured faster (docs/adr/012)."""

STATIC_ATTENTION = Fusion(
    "static_attention",
    static_attention,
    lambda shape: shape.num_hidden_layers,
    requires=(contract.TYPED, contract.ATTENTION_PLAIN, contract.HEADS_UNREPEATED),
    ensures=(contract.ATTENTION_PLAIN, contract.MASKED_BY_LENGTHS),
)

STATIC = (*TENSORRT, STATIC_ATTENTION)
"""The same for a static cache, whose lengths take the mask's place in the end."""

STATIC_ONNXRUNTIME = (
    *FORMS,
    STATIC_ATTENTION,
    Fusion(
        "grouped_static_attention",
        grouped_static_attention,
        lambda shape: shape.num_hidden_layers,
        requires=(contract.TYPED, contract.SHAPES_CONSTANT, contract.MASKED_BY_LENGTHS),
        ensures=(contract.TYPED, contract.SHAPES_CONSTANT),
        note=GROUPED_NOTE,
    ),
    _packing("pack_grouped_qkv", pack_grouped_qkv),
    *ONNXRUNTIME_ENDS,
)
"""ONNX Runtime's operators for a static cache: the attention writes into it and rotates by itself."""

PIPELINES = {"tensorrt": TENSORRT, "onnxruntime": ONNXRUNTIME}
STATIC_PIPELINES = {"tensorrt": STATIC, "onnxruntime": STATIC_ONNXRUNTIME}


def fuse_model(
    model: ir.Model,
    config: LlamaConfig,
    *,
    target: str = "tensorrt",
    kv_cache: KvCache = "dynamic",
    own_layout: bool = True,
    min_tensorrt: str | None = None,
    progress: Progress = silent,
) -> FusionReport:
    """Fuse a traced graph in place; weights are neither read nor copied.

    Args:
        model: changed in place.
        config: the model's shape.
        target: whose operators to use.
        kv_cache: the form of its caches.
        own_layout: False where the weights lie as somebody else stored them.
        min_tensorrt: a release that must take the graph; what it lacks is written in older operators.
        progress: told of each pass.

    Raises:
        FusionError: there is no such target, or not for this cache form, a pass's claim does not hold, or the release can't take the graph
            or a cache of this form.
        UsageError: there is no such release, or it is given for another target.
    """
    fusions = _pipeline(target, kv_cache, min_tensorrt)
    before = Before.of(model)
    rules = run_passes(model, fusions, config, own_layout=own_layout, progress=progress)
    lowered = {} if min_tensorrt is None else lower_to(model, min_tensorrt)
    clean_up(model)
    report = replace(before.report(model, target, rules), min_tensorrt=min_tensorrt, lowered=lowered)
    logger.info("fused %d nodes to %d in %.1f s", report.nodes_before, report.nodes_after, report.seconds)
    return report


def fuse_artifact(step: StepContext, *, target: str = "tensorrt", allow_partial: bool = False, min_tensorrt: str | None = None) -> dict[str, Any]:
    """Write ``fused.onnx`` from ``traced.onnx``; the weights stay where they are.

    Returns:
        nodes_before, nodes_after, target, passed, seconds, rules, ops_before, ops_after, layer_operators, needs_tensorrt, min_tensorrt,
        lowered.

    Raises:
        ParityMismatch: a rule fired another number of times than the model's shape says, and ``allow_partial`` is not given; nothing is written.
        FusionError, UsageError: as ``fuse_model``.
        ArtifactError: the folder is no artifact, or has no traced.onnx.
    """
    described = require_artifact(step.artifact, "fuse")["model"]
    config, kv_cache, own_layout = LlamaConfig(**described["config"]), kv_cache_of(described), described.get("weights") != "reference"
    _pipeline(target, kv_cache, min_tensorrt)
    model = load_graph(require(step.artifact, "traced.onnx"))
    report = fuse_model(model, config, target=target, kv_cache=kv_cache, own_layout=own_layout, min_tensorrt=min_tensorrt, progress=step.progress)
    if not allow_partial:
        check_complete(report)
    with step.write(OUTPUTS[target]) as temporary:
        ir.save(model, temporary)
    return report.as_json()


def _pipeline(target: str, kv_cache: KvCache, min_tensorrt: str | None) -> tuple[Fusion, ...]:
    pipelines = STATIC_PIPELINES if kv_cache == "static" else PIPELINES
    if target not in pipelines:
        form = " with a static cache" if kv_cache == "static" else ""
        raise FusionError(f"no fusions for target {target!r}{form}; there are: {', '.join(pipelines)}")
    if min_tensorrt is not None:
        check_release(min_tensorrt, target)
        if kv_cache == "static" and not takes(min_tensorrt, CACHE_WRITER):
            first = LATER[CACHE_WRITER]
            raise FusionError(
                f"a static cache is written in place by {CACHE_WRITER}, which TensorRT takes from {first} on; nothing older than that does it",
                hint=f"--min-tensorrt {first}, or export into another folder with --kv-cache dynamic",
            )
    return pipelines[target]
