"""The export step: a checkpoint → ``traced.onnx``, ``weights/`` and the sidecars, in the memory of one tensor."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import onnx_ir as ir
import psutil

from artifact.io_spec import Dtype, KvCache
from artifact.manifest import read_manifest, write_manifest
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor
from exporter.checkpoints import Checkpoint, CheckpointRequest
from exporter.stamp import stamp_layers
from exporter.trace_cache import traced_layer
from exporter.weights import plan_weights, write_weights

logger = logging.getLogger(__name__)
_ONNX_DTYPES = {"F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT}


def export_checkpoint(
    step: StepContext,
    checkpoint: Checkpoint,
    *,
    request: CheckpointRequest | None = None,
    dtype: Dtype = "fp16",
    kv_cache: KvCache = "dynamic",
) -> dict[str, Any]:
    """Write everything that the later steps need of a checkpoint.

    Args:
        step: the artifact.
        checkpoint: opened and checked.
        request: what it was opened with, for the manifest; None means its source alone.
        dtype: of weights and activations.
        kv_cache: form of the graph's cache.

    Returns:
        artifact, nodes, trace_s, trace_cached, weights_s, weights_bytes, peak_rss_mb, dropped, unknown_config_keys, notes.
    """
    start = time.perf_counter()
    step.progress("tracing one layer", 0, 1)
    model, trace_cached = traced_graph(checkpoint, dtype, kv_cache)
    trace_s = time.perf_counter() - start
    start = time.perf_counter()
    written = write_weights(step, checkpoint, dtype)
    weights_s = time.perf_counter() - start
    checkpoint.write_sidecars(step.write)
    with step.write("traced.onnx") as temporary:
        ir.save(model, temporary)
    _describe_model(step, checkpoint, request or CheckpointRequest(checkpoint.source), dtype, kv_cache)
    return {
        "artifact": str(step.artifact),
        "nodes": model.graph.num_nodes(),
        "trace_s": round(trace_s, 3),
        "trace_cached": trace_cached,
        "weights_s": round(weights_s, 3),
        "weights_bytes": sum(tensor.length for tensor in written),
        "peak_rss_mb": peak_rss_mb(),
        "dropped": list(checkpoint.dropped),
        "unknown_config_keys": list(checkpoint.unknown_config_keys),
        "notes": list(checkpoint.notes),
    }


def traced_graph(checkpoint: Checkpoint, dtype: Dtype, kv_cache: KvCache = "dynamic") -> tuple[ir.Model, bool]:
    """Trace one layer, stamp the rest, and point every weight at its place in ``weights/``; also whether the trace was a kept one."""
    config = checkpoint.config
    layer, trace_cached = traced_layer(config, dtype, kv_cache)
    model = stamp_layers(layer, config)
    for _, planned in plan_weights(config, dtype).values():
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


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far, in MB, mapped file pages included."""
    memory = psutil.Process().memory_info()
    with open("/proc/self/status", encoding="ascii") as status:  # psutil has no peak on Linux
        peak_kb = next((int(line.split()[1]) for line in status if line.startswith("VmHWM")), memory.rss // 1024)
    return round(peak_kb * 1024 / 1e6)


def _describe_model(step: StepContext, checkpoint: Checkpoint, request: CheckpointRequest, dtype: Dtype, kv_cache: KvCache) -> None:
    manifest = read_manifest(step.artifact)
    manifest["model"] = {
        "name": checkpoint.name,
        "source": checkpoint.source,
        "request": request.as_record(),
        "format": checkpoint.format,
        "fingerprint": checkpoint.fingerprint,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "config": asdict(checkpoint.config),
    }
    write_manifest(step.artifact, manifest)
