"""The export step: a checkpoint → ``traced.onnx``, ``weights/`` and the sidecars, in the memory of one block of a tensor."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import onnx_ir as ir

from artifact.errors import ParityMismatch
from artifact.given import GIVEN_KEY
from artifact.io_spec import Dtype, KvCache
from artifact.manifest import read_manifest, write_manifest
from artifact.memory import peak_rss_mb
from artifact.progress import Progress, silent
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor, WeightsMode
from exporter.audit import audit_artifact
from exporter.checkpoints import Checkpoint, CheckpointRequest
from exporter.checkpoints.quantised_model import QuantisedCheckpoint
from exporter.disk_space import check_space
from exporter.given_scales import write_scales
from exporter.stamp import stamp_layers
from exporter.trace_cache import traced_layer
from exporter.weights import planned_files, write_weights

logger = logging.getLogger(__name__)
_ONNX_DTYPES = {"F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT}


def export_checkpoint(
    step: StepContext,
    checkpoint: Checkpoint,
    *,
    request: CheckpointRequest | None = None,
    dtype: Dtype = "fp16",
    kv_cache: KvCache = "dynamic",
    weights: WeightsMode = "copy",
) -> dict[str, Any]:
    """Write everything that the later steps need of a checkpoint.

    Args:
        step: the artifact.
        checkpoint: opened and checked.
        request: what it was opened with, for the manifest; None means its source alone.
        dtype: of weights and activations.
        kv_cache: form of the graph's cache.
        weights: copied, referred to where the checkpoint has them, or left for a later export.

    Returns:
        artifact, nodes, trace_s, trace_cached, weights_s, weights_bytes, planned_weights_bytes, peak_rss_mb, weights, audit, dropped,
        unknown_config_keys, notes.

    Raises:
        ExportError: the disk is too small, or as ``write_weights``.
        ParityMismatch: the audit found a weight that is not the checkpoint's.
    """
    files = planned_files(checkpoint, dtype, weights)
    planned = [tensor for _, tensors in files.values() for tensor in tensors]
    if weights != "none":
        check_space(step, {file: tensors[-1].offset + tensors[-1].length for file, (header, tensors) in files.items() if header is not None})
    start = time.perf_counter()
    model, trace_cached = traced_graph(checkpoint, dtype, planned, kv_cache, step.progress)
    trace_s = time.perf_counter() - start
    start = time.perf_counter()
    written = write_weights(step, checkpoint, dtype, weights)
    if isinstance(checkpoint, QuantisedCheckpoint) and weights != "none":
        write_scales(step, checkpoint, dtype)
    weights_s = time.perf_counter() - start
    if weights != "reference":
        checkpoint.write_sidecars(step.write)
    with step.write("traced.onnx") as temporary:
        ir.save(model, temporary)
    options = {"dtype": dtype, "kv_cache": kv_cache, "weights": weights}
    described = _describe_model(step, checkpoint, request or CheckpointRequest(checkpoint.source), options)
    audit = _audit(step, checkpoint, described, written)
    return {
        "artifact": str(step.artifact),
        "nodes": model.graph.num_nodes(),
        "trace_s": round(trace_s, 3),
        "trace_cached": trace_cached,
        "weights_s": round(weights_s, 3),
        "weights_bytes": sum(tensor.length for tensor in written),
        "planned_weights_bytes": sum(tensor.length for tensor in planned),
        "peak_rss_mb": peak_rss_mb(),
        "weights": weights,
        "audit": audit,
        "dropped": list(checkpoint.dropped),
        "unknown_config_keys": list(checkpoint.unknown_config_keys),
        "notes": list(checkpoint.notes),
    }


def traced_graph(
    checkpoint: Checkpoint, dtype: Dtype, planned: Iterable[StoredTensor], kv_cache: KvCache = "dynamic", progress: Progress = silent
) -> tuple[ir.Model, bool]:
    """Trace one layer, stamp the rest, and point every weight at its planned place; also whether the trace was a kept one."""
    layer, trace_cached = traced_layer(checkpoint.config, dtype, kv_cache, progress=progress)
    model = stamp_layers(layer, checkpoint.config)
    for tensor in planned:
        if tensor.name in model.graph.initializers:
            model.graph.initializers[tensor.name].const_value = external_tensor(tensor)
    return model, trace_cached


def external_tensor(tensor: StoredTensor) -> ir.ExternalTensor:
    """A reference to a stored tensor, as ONNX external data."""
    return ir.ExternalTensor(
        location=tensor.file,
        offset=tensor.offset,
        length=tensor.length,
        dtype=_ONNX_DTYPES[tensor.dtype],
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
    )


def _describe_model(step: StepContext, checkpoint: Checkpoint, request: CheckpointRequest, options: Mapping[str, str]) -> dict[str, Any]:
    manifest = read_manifest(step.artifact)
    manifest["model"] = {
        "name": checkpoint.name,
        "source": checkpoint.source,
        "request": request.as_record(),
        "format": checkpoint.format,
        "fingerprint": checkpoint.fingerprint,
        **options,
        **({GIVEN_KEY: checkpoint.given.as_record()} if isinstance(checkpoint, QuantisedCheckpoint) else {}),
        "config": asdict(checkpoint.config),
    }
    write_manifest(step.artifact, manifest)
    described: dict[str, Any] = manifest["model"]
    return described


def _audit(step: StepContext, checkpoint: Checkpoint, described: dict[str, Any], written: list[StoredTensor]) -> dict[str, Any] | None:
    """Every weight was compared when it was written; here, that the graph as it lies on the disk points at those places, and at nothing else."""
    if not written:
        return None
    audit = audit_artifact(step.artifact, described, ["traced.onnx"], checkpoint, written={tensor.name: tensor for tensor in written})
    if not audit["passed"]:
        first = audit["failed"][0]
        raise ParityMismatch(f"weight audit: {first['graph']}: {first['tensor'] or ''} {first['reason']}")
    return audit
