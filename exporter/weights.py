"""Stream a checkpoint's weights into ``weights/*.safetensors``: one tensor in memory at a time, converted, checked and hashed on the way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import ExportError
from artifact.io_spec import Dtype
from artifact.layout import weight_files
from artifact.steps import StepContext
from artifact.tensor_file import CHECKSUMS, StoredTensor, checksums_json, plan_tensors, write_tensors
from exporter.checkpoints import Checkpoint
from exporter.rope import rotary_tables
from exporter.trace import TORCH_DTYPES

STORED_DTYPES: dict[Dtype, str] = {"fp16": "F16", "fp32": "F32"}
ROTARY_FILE = "weights/rotary.safetensors"
ROTARY_COS, ROTARY_SIN = "model.rotary_emb.cos", "model.rotary_emb.sin"


def plan_weights(config: LlamaConfig, dtype: Dtype) -> dict[str, tuple[bytes, list[StoredTensor]]]:
    """File → its header and where every tensor will lie; a pure function of the model's shape."""
    stored = STORED_DTYPES[dtype]
    table = (config.max_position_embeddings, config.head_dim // 2)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {**weight_files(config), ROTARY_FILE: {ROTARY_COS: table, ROTARY_SIN: table}}
    return {file: plan_tensors(file, {name: (stored, shape) for name, shape in tensors.items()}) for file, tensors in shapes.items()}


def write_weights(step: StepContext, checkpoint: Checkpoint, dtype: Dtype) -> list[StoredTensor]:
    """Write every weight file and the checksums.

    Raises:
        ExportError: a tensor holds NaN or Inf, or overflows the dtype; it is named.
    """
    plan = plan_weights(checkpoint.config, dtype)
    written: list[StoredTensor] = []
    for done, (file, (header, planned)) in enumerate(plan.items()):
        step.progress(f"writing {file}", done, len(plan))
        source = _rotary(checkpoint.config, dtype) if file == ROTARY_FILE else _weights(checkpoint, planned, dtype)
        with step.write(file) as temporary:
            written += write_tensors(temporary, header, planned, source)
    with step.write(CHECKSUMS) as temporary:
        temporary.write_text(checksums_json(written), encoding="utf-8")
    step.progress("weights written", len(plan), len(plan))
    return written


def convert(name: str, tensor: Tensor, dtype: Dtype) -> Tensor:
    """Convert one tensor, and refuse what would ruin the model silently.

    Raises:
        ExportError: NaN or Inf in the checkpoint, or values beyond the dtype's range.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ExportError(f"{name}: {bad} of {tensor.numel()} values are NaN or Inf in the checkpoint")
    converted = tensor.to(TORCH_DTYPES[dtype]).contiguous()
    overflowed = int(torch.isinf(converted).sum()) if converted.dtype != tensor.dtype else 0
    if overflowed:
        largest, limit = tensor.abs().max().item(), torch.finfo(converted.dtype).max
        raise ExportError(
            f"{name}: {overflowed} of {tensor.numel()} values overflow {dtype} (largest {largest:g}, limit {limit:g})",
            hint="export with --dtype fp32",
        )
    return converted


def _weights(checkpoint: Checkpoint, planned: list[StoredTensor], dtype: Dtype) -> Iterator[memoryview]:
    for tensor in planned:
        yield _bytes(convert(tensor.name, checkpoint.read(tensor.name), dtype))


def _rotary(config: LlamaConfig, dtype: Dtype) -> Iterator[memoryview]:
    for table in rotary_tables(config, TORCH_DTYPES[dtype]):
        yield _bytes(table.contiguous())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().data.cast("B")
