"""Meta's model-parallel parts: which tensor is split how, and its rows put together from all parts.

Letters as in ``artifact.layout``; n parts. Column-parallel layers split their output, which are rows of the weight; row-parallel layers split
their input, which are columns. Llama 1 and 2 split the embedding by columns, Llama 3 by rows; its shape says which.
Source: https://github.com/meta-llama/llama/blob/main/llama/model.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from artifact.errors import CheckpointError
from exporter.checkpoints.file_tensor import FileTensor, TensorFile
from exporter.checkpoints.shards import inside
from exporter.checkpoints.torch_file import open_torch

PART = re.compile(r"consolidated\.(\d+)\.pth")
SAMPLE_ROWS = 8
_DOWNLOAD = "download every consolidated.*.pth of the model again"


class Split(Enum):
    """How the parts hold one tensor."""

    ROWS = 0
    COLUMNS = 1
    SAME = 2


SPLITS = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), Split.ROWS),
    **dict.fromkeys(("wo", "w2", "tok_embeddings"), Split.COLUMNS),
    **dict.fromkeys(("norm", "attention_norm", "ffn_norm", "freqs"), Split.SAME),
}
"""By the last word of the name before ``.weight``."""


@dataclass(frozen=True)
class MergedTensor:
    """One tensor over all parts; ``pieces`` in the order of the parts, one alone where all hold the same."""

    split: Split
    pieces: tuple[FileTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        first = self.pieces[0].shape
        if self.split is Split.SAME:
            return first
        return tuple(size * len(self.pieces) if axis == self.split.value else size for axis, size in enumerate(first))

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the whole tensor."""
        if self.split is Split.COLUMNS:
            return torch.cat([piece.read_rows(start, stop) for piece in self.pieces], dim=1)
        height, found = self.pieces[0].shape[0], []
        for index, piece in enumerate(self.pieces):
            first, last = max(start - index * height, 0), min(stop - index * height, height)
            if first < last:
                found.append(piece.read_rows(first, last))
        if not found:
            return self.pieces[0].read_rows(0, 0)
        return found[0] if len(found) == 1 else torch.cat(found)


def open_parts(folder: Path) -> list[TensorFile]:
    """The folder's parts in order, each checked.

    Raises:
        CheckpointError: a number is missing, a file is broken, or one part has tensors that another lacks.
    """
    numbers = sorted({int(found[1]) for path in folder.iterdir() if (found := PART.fullmatch(path.name))})
    missing = [f"consolidated.{number:02d}.pth" for number in range(max(numbers, default=0)) if number not in numbers]
    if missing or not numbers:
        there = ", ".join(f"consolidated.{number:02d}.pth" for number in numbers)
        raise CheckpointError(f"{folder}: {', '.join(missing) or 'consolidated.00.pth'} is missing; there are: {there or 'none'}", hint=_DOWNLOAD)
    parts: list[TensorFile] = [open_torch(inside(folder, f"consolidated.{number:02d}.pth")) for number in numbers]
    for part in parts[1:]:
        different = sorted(part.tensors.keys() ^ parts[0].tensors.keys())
        if different:
            lacking = part if different[0] in parts[0].tensors else parts[0]
            raise CheckpointError(f"{lacking.path.name}: tensor {different[0]} is missing, another part has it", hint=_DOWNLOAD)
    return parts


def merge_parts(parts: Sequence[TensorFile], dim: int) -> dict[str, MergedTensor]:
    """Meta's name → the tensor over all parts.

    Args:
        parts: in order.
        dim: hidden_size, from params.json.

    Raises:
        CheckpointError: parts are missing, or hold a tensor in different shapes, dtypes or (norms) values.
    """
    _check_count(parts, dim)
    return {name: _merged(name, [part.tensors[name] for part in parts], dim) for name in parts[0].tensors}


def refuse_copies(tensors: Iterable[MergedTensor]) -> None:
    """Raise CheckpointError where two parts hold the same piece of every one of these: one is the other's file under another name.

    Norms are equal in all parts, and shapes too; only the pieces of a split tensor tell parts apart.

    Args:
        tensors: split among the parts, of a dtype that can be read.
    """
    seen: dict[bytes, FileTensor] = {}
    for pieces in zip(*(tensor.pieces for tensor in tensors), strict=True):
        sample = b"".join(piece.read_rows(0, min(SAMPLE_ROWS, piece.shape[0])).view(torch.uint8).numpy().tobytes() for piece in pieces)
        twin = seen.setdefault(sample, pieces[0])
        if twin is not pieces[0]:
            raise CheckpointError(f"{pieces[0].path.name} is a copy of {twin.path.name}: the same piece of layer 0's wq and wo", hint=_DOWNLOAD)


def _merged(name: str, pieces: list[FileTensor], dim: int) -> MergedTensor:
    for piece in pieces[1:]:
        if (piece.shape, piece.dtype) != (pieces[0].shape, pieces[0].dtype):
            held = (f"{part.path.name} has {part.dtype} {list(part.shape)}" for part in (pieces[0], piece))
            raise CheckpointError(f"tensor {name}: {', '.join(held)}", hint=_DOWNLOAD)
    split = SPLITS.get(name.removesuffix(".weight").split(".")[-1], Split.SAME)
    if name == "tok_embeddings.weight" and pieces[0].shape[1:] == (dim,):
        split = Split.ROWS
    if split is Split.COLUMNS and len(pieces[0].shape) != 2:
        raise CheckpointError(f"{pieces[0].path.name}: tensor {name} has shape {list(pieces[0].shape)}; expected two axes")
    if split is not Split.SAME:
        return MergedTensor(split, tuple(pieces))
    for piece in pieces[1:]:
        if name.endswith("norm.weight") and not torch.equal(piece.read(), pieces[0].read()):
            raise CheckpointError(f"tensor {name} differs between {pieces[0].path.name} and {piece.path.name}; every part must hold it whole")
    return MergedTensor(split, tuple(pieces[:1]))


def _check_count(parts: Sequence[TensorFile], dim: int) -> None:
    """Every part holds 1/n of the columns of w2 and wo; the shape of one says how many parts there must be."""
    rows: Mapping[str, FileTensor] = parts[0].tensors
    first = rows.get("layers.0.attention.wo.weight")
    if first is None or len(first.shape) != 2 or not first.shape[1] or dim % first.shape[1]:
        return  # the census names what is wrong
    expected = dim // first.shape[1]
    if expected != len(parts):
        raise CheckpointError(
            f"{parts[0].path.parent}: {len(parts)} of {expected} model-parallel parts; {parts[0].path.name} holds 1/{expected} of every layer",
            hint=f"consolidated.00.pth to consolidated.{expected - 1:02d}.pth, all from the same model",
        )
