"""Stream a checkpoint's weights into ``weights/*.safetensors``: a block in memory at a time, converted, checked and hashed on the way.

Every block is read back once it is written, and a file that an interrupted export has finished is not written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby

import torch

from artifact.config import LlamaConfig
from artifact.io_spec import Dtype
from artifact.layout import weight_files
from artifact.steps import StepContext
from artifact.tensor_file import CHECKSUMS, StoredTensor, WeightsMode, checksums_json, plan_tensors
from artifact.tensor_store import store_tensors
from exporter.blocks import ROW_BYTES, STORED_DTYPES, Tally, as_bytes, tensor_blocks
from exporter.checkpoints import Checkpoint
from exporter.checkpoints.protocol import InFiles
from exporter.in_place import hash_in_place, places_of
from exporter.rope import rotary_rows

ROTARY_FILE = "weights/rotary.safetensors"
ROTARY_COS, ROTARY_SIN = "model.rotary_emb.cos", "model.rotary_emb.sin"
ROTARY = {ROTARY_COS: torch.cos, ROTARY_SIN: torch.sin}
"""Table → the function of the angles that it holds."""


def plan_weights(config: LlamaConfig, dtype: Dtype) -> dict[str, tuple[bytes, list[StoredTensor]]]:
    """File → its header and where every tensor will lie; a pure function of the model's shape."""
    stored = STORED_DTYPES[dtype]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {**weight_files(config), ROTARY_FILE: dict.fromkeys(ROTARY, rotary_shape(config))}
    return {file: plan_tensors(file, {name: (stored, shape) for name, shape in tensors.items()}) for file, tensors in shapes.items()}


def write_weights(step: StepContext, checkpoint: Checkpoint, dtype: Dtype, weights: WeightsMode = "copy") -> list[StoredTensor]:
    """Write every weight file and the checksums; what is used where it lies is hashed only.

    Raises:
        ExportError: a tensor holds NaN or Inf, or overflows the dtype; it is named.
        ParityMismatch: what the disk gives back is not what was written.
    """
    if weights == "none":
        return []
    files = planned_files(checkpoint, dtype, weights)
    written: list[StoredTensor] = []
    for done, (file, (header, planned)) in enumerate(files.items()):
        if header is None:
            written += hash_in_place(checkpoint, planned, dtype, step.progress)
            continue
        step.progress(f"writing {file}", done, len(files))
        blocks = (rotary_blocks(checkpoint.config, dtype, name) for name in ROTARY)
        source = chain.from_iterable(blocks) if file == ROTARY_FILE else _weights(checkpoint, planned, dtype)
        written += store_tensors(step, file, header, planned, source)
    with step.write(CHECKSUMS) as temporary:
        temporary.write_text(checksums_json(written), encoding="utf-8")
    step.progress("weights written", len(files), len(files))
    return written


def planned_files(checkpoint: Checkpoint, dtype: Dtype, weights: WeightsMode = "copy") -> dict[str, tuple[bytes | None, list[StoredTensor]]]:
    """File → its header and its tensors, in the order they are written; no header where the file is the checkpoint's own."""
    planned = plan_weights(checkpoint.config, dtype)
    if weights != "reference" or not isinstance(checkpoint, InFiles):
        return dict(planned)
    own = sorted(places_of(checkpoint, checkpoint.shapes), key=lambda tensor: (tensor.file, tensor.offset))
    return {file: (None, list(tensors)) for file, tensors in groupby(own, key=lambda tensor: tensor.file)} | {ROTARY_FILE: planned[ROTARY_FILE]}


def rotary_shape(config: LlamaConfig) -> tuple[int, int]:
    """Of the cosine and of the sine table."""
    return config.max_position_embeddings, config.head_dim // 2


def rotary_blocks(config: LlamaConfig, dtype: Dtype, name: str) -> Iterator[memoryview]:
    """The bytes of one table, some positions at a time.

    Raises:
        ExportError: the config's scaling gives NaN, Inf, or values that the dtype can't hold.
    """
    positions, pairs = rotary_shape(config)
    tally, step = Tally(name, dtype, origin="as the config's rope scaling gives them"), max(1, ROW_BYTES // (4 * pairs))
    for start in range(0, positions, step):
        yield as_bytes(tally.add(rotary_rows(config, ROTARY[name], range(start, min(start + step, positions)))))
    tally.judge()


def _weights(checkpoint: Checkpoint, planned: list[StoredTensor], dtype: Dtype) -> Iterator[memoryview]:
    for tensor in planned:
        yield from tensor_blocks(checkpoint, tensor, dtype)
