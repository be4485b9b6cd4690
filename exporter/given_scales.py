"""Keep the scales of a quantised checkpoint beside the weights that they made: `quantize` takes them instead of rounding anew."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from artifact.errors import ExportError
from artifact.given import GIVEN_FILE, INPUT_SCALE, SMALLEST_SCALE, WEIGHT_SCALE
from artifact.io_spec import Dtype
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor, plan_tensors, write_tensors
from exporter.blocks import as_bytes
from exporter.checkpoints.quantised_model import QuantisedCheckpoint

ROWS = 4096
"""Scales read at once: 4 MB where a row has 256 of them."""


def plan_scales(checkpoint: QuantisedCheckpoint) -> tuple[bytes, list[StoredTensor]]:
    """The file's header, and where every scale will lie: linears in the order of the model, so that packed ones are neighbours."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module in checkpoint.usable:
        linear = checkpoint.linears[module]
        groups = -(-linear.shape[1] // linear.group_size) if linear.group_size else 1
        tensors[f"{module}.{WEIGHT_SCALE}"] = ("F32", (linear.shape[0], groups))
        if linear.input_scale() is not None:
            tensors[f"{module}.{INPUT_SCALE}"] = ("F32", (1,))
    return plan_tensors(GIVEN_FILE, tensors)


def write_scales(step: StepContext, checkpoint: QuantisedCheckpoint, dtype: Dtype) -> None:
    """Write the scales as the weights have them.

    Raises:
        CheckpointError: a scale that is not finite and positive.
        ExportError: one so small that float16 weights don't tell its levels.
    """
    header, planned = plan_scales(checkpoint)
    with step.write(GIVEN_FILE) as temporary:
        write_tensors(temporary, header, planned, _data(checkpoint, dtype))


def _data(checkpoint: QuantisedCheckpoint, dtype: Dtype) -> Iterator[memoryview]:
    for module in checkpoint.usable:
        linear = checkpoint.linears[module]
        for start in range(0, linear.shape[0], ROWS):
            stop = min(start + ROWS, linear.shape[0])
            scales = checkpoint.scales(module, start, stop)
            if dtype == "fp16":
                _check_size(checkpoint, module, scales, start)
            yield as_bytes(scales.contiguous())
        if (scale := linear.input_scale()) is not None:
            yield as_bytes(torch.tensor([scale], dtype=torch.float32))


def _check_size(checkpoint: QuantisedCheckpoint, module: str, scales: Tensor, first: int) -> None:
    """Below the limit a float16 weight may be another level's; a row of zeros has no levels to tell."""
    linear = checkpoint.linears[module]
    for row in (first + torch.nonzero((scales < SMALLEST_SCALE).any(dim=1))[:, 0]).tolist():
        if bool(linear.levels(row, row + 1).any()):
            smallest = float(scales[row - first].min())
            raise ExportError(f"{module}: a scale of row {row} is {smallest:.3g}, too small for float16 weights", hint="export with --dtype fp32")
