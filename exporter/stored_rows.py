"""Some rows of a weight as an artifact stores it; of one that is stored turned, some columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.census import GraphWeight

DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "I8": np.dtype("i1")}


def read_rows(artifact: Path, weight: GraphWeight, start: int, stop: int) -> NDArray[Any]:
    """Rows of a stored weight; [stop - start, …] in its own dtype."""
    dtype = DTYPES[weight.dtype]
    row = int(np.prod(weight.shape[1:], dtype=np.int64))
    at = weight.offset + start * row * dtype.itemsize
    return np.fromfile(artifact / weight.file, dtype, (stop - start) * row, offset=at).reshape(stop - start, *weight.shape[1:])


def read_columns(artifact: Path, weight: GraphWeight, start: int, stop: int) -> NDArray[Any]:
    """Columns of a stored matrix, as rows; [stop - start, rows] in its own dtype."""
    stored: NDArray[Any] = np.memmap(artifact / weight.file, DTYPES[weight.dtype], mode="r", offset=weight.offset, shape=weight.shape)
    return np.array(stored[:, start:stop].T)
