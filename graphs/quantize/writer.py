"""What a scheme stores, written as a stream: two linears in memory, one file a layer, each tensor hashed; and how a graph reads it.

Files: weights/<scheme>-layer-000.safetensors …, <scheme>-shared.safetensors (what is in no layer), <scheme>-checksums.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.ahead import ahead
from artifact.errors import QuantizationError
from artifact.half import all_finite, widened
from artifact.layout import layer_of
from artifact.mapped import forget
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor, checksums_json, plan_tensors
from artifact.tensor_store import store_anew
from graphs.quantize.linears import Linear

Result = TypeVar("Result")
Floats = NDArray[np.float32]
ROW_BLOCK_VALUES, PACKED_VALUES = 1 << 18, 1 << 22
"""Weights that are rounded at once, in the cache, and levels that are packed at once."""
SAFETENSORS = {ir.DataType.FLOAT16: "F16", ir.DataType.FLOAT: "F32"}
"""Dtype of a float weight → what safetensors calls it."""


@dataclass(frozen=True)
class Piece:
    """What a scheme stores of one module.

    Attributes:
        module: its path; the layer decides the file.
        tensors: name → (dtype of safetensors, shape), in stored order.
        make: gives their arrays in that order, each in one block or several; called while the module before is written, of which nothing is kept.
    """

    module: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    make: Callable[[], Iterable[NDArray[Any]]]


def write_pieces(step: StepContext, scheme: str, pieces: Sequence[Piece]) -> dict[str, StoredTensor]:
    """Write all pieces, one layer's file after the other, and the checksums.

    Returns:
        Name → where it lies.
    """
    stored: list[StoredTensor] = []
    done = 0
    in_order = sorted(pieces, key=lambda piece: _place(layer_of(piece.module)))
    for layer, group in groupby(in_order, key=lambda piece: layer_of(piece.module)):
        part = "shared" if layer is None else f"layer-{layer:03d}"
        members, file = list(group), f"weights/{scheme}-{part}.safetensors"
        step.progress(f"quantising {part}", done, len(pieces))
        header, planned = plan_tensors(file, {name: form for piece in members for name, form in piece.tensors.items()})
        stored += store_anew(step, file, header, planned, (array.data.cast("B") for arrays in ahead(_begun, members, threads=1) for array in arrays))
        done += len(members)
    with step.write(f"weights/{scheme}-checksums.json") as temporary:
        temporary.write_text(checksums_json(stored), encoding="utf-8")
    return {tensor.name: tensor for tensor in stored}


def _begun(piece: Piece) -> Iterator[NDArray[Any]]:
    """The piece's arrays; the first is made at once, while the one before is written."""
    arrays = iter(piece.make())
    return chain([next(arrays)], arrays)


def _place(layer: int | None) -> tuple[bool, int]:
    """Layers by number, then what is in none."""
    return layer is None, layer or 0


def read_mapped(value: ir.Value, folder: Path, use: Callable[[NDArray[Any]], Result]) -> Result:
    """What ``use`` makes of a stored weight, which is mapped from its file as long as that takes; it must keep no view of it."""
    tensor = value.const_value
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return use(tensor.numpy())
    tensor.base_dir = folder
    result = use(tensor.numpy())
    tensor.release()
    return result


def row_blocks(weight: NDArray[Any], name: str, values: int = ROW_BLOCK_VALUES) -> Iterator[tuple[slice, Floats]]:
    """Some rows of a weight [out, in] at a time, copied to float32.

    Raises:
        QuantizationError: one of them is NaN or Inf.
    """
    return ((rows, exact_rows(weight, name, rows)) for rows in row_slices(weight, values))


def row_slices(weight: NDArray[Any], values: int = ROW_BLOCK_VALUES) -> list[slice]:
    """The rows of a weight [out, in] in blocks of about so many values."""
    height = max(1, values // weight.shape[1])
    return [slice(start, min(start + height, len(weight))) for start in range(0, len(weight), height)]


def exact_rows(weight: NDArray[Any], name: str, rows: slice, out: Floats | None = None, scratch: Floats | None = None) -> Floats:
    """Those rows of a weight, copied to float32; where it is mapped, they leave memory. ``out`` and ``scratch`` are memory of their shape.

    Raises:
        QuantizationError: one of them is NaN or Inf.
    """
    if not all_finite(weight[rows], scratch):
        raise QuantizationError(f"{name}.weight holds NaN or Inf in rows {rows.start} … {rows.stop - 1}")
    exact = widened(weight[rows], out)
    forget(weight[rows])
    return exact


def add_initializer(graph: ir.Graph, tensor: StoredTensor, dtype: ir.DataType, shape: tuple[int, ...] | None = None) -> ir.Value:
    """A new initializer of a graph that reads a stored tensor; ``shape`` where its bytes hold more elements than safetensors can say."""
    size = ir.Shape(shape or tensor.shape)
    data = ir.ExternalTensor(tensor.file, tensor.offset, tensor.length, dtype, shape=size, name=tensor.name)
    value = ir.Value(name=tensor.name, shape=size, type=ir.TensorType(dtype), const_value=data)
    graph.initializers.add(value)
    return value


def shape_of(value: ir.Value) -> tuple[int, int]:
    """(out, in) of a linear's weight."""
    assert value.shape is not None
    rows, columns = value.shape.numpy()
    return int(rows), int(columns)


def elements(linears: Iterable[Linear]) -> int:
    """Numbers in the weights of some linears."""
    return sum(prod(shape_of(linear.weight)) for linear in linears)
