"""Rows of a weight as an artifact stores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.census import GraphWeight


def read_rows(artifact: Path, weight: GraphWeight, start: int, stop: int) -> NDArray[Any]:
    """Rows of a stored weight; [stop - start, …] in its own dtype."""
    dtype = np.dtype({"F16": "<f2", "F32": "<f4", "I8": "i1"}[weight.dtype])
    row = int(np.prod(weight.shape[1:], dtype=np.int64))
    at = weight.offset + start * row * dtype.itemsize
    return np.fromfile(artifact / weight.file, dtype, (stop - start) * row, offset=at).reshape(stop - start, *weight.shape[1:])
