"""Weights rounded as a scheme rounds them, each once: measuring a set of linears asks for the same ones again and again.

Levels lie in a file without a name beside the artifact, gone with the process: a whole model's would not fit into memory.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from graphs.quantize.int8 import FORM
from graphs.quantize.rounder import Rounder
from validation.fake_quant import Weight


class RoundedOnce:
    """Rounds to INT8, one scale a row.

    Args:
        rounder: plain, or with what calibration saw of the input.
        scale_dtype: of the scales.
        folder: where there is room for the levels.
    """

    def __init__(self, rounder: Rounder, scale_dtype: str, folder: Path) -> None:
        self._rounder, self._scale_dtype = rounder, np.dtype(scale_dtype)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with this object
        finalize(self, self._file.close)
        self._kept: dict[str, tuple[int, Weight]] = {}

    def __call__(self, name: str, weight: Weight) -> Weight:
        """[out, in] as it is once it is dequantised; ``name`` always means the same weight.

        Raises:
            QuantizationError: the levels don't fit on the disk.
        """
        if name not in self._kept:
            levels, scale = self._rounder.round(weight, name, FORM.grid(name, weight.shape[1], self._scale_dtype))
            self._kept[name] = self._store(levels), scale
        offset, scale = self._kept[name]
        levels = np.frombuffer(os.pread(self._file.fileno(), weight.size, offset), np.int8).reshape(weight.shape)
        rounded: Weight = levels * scale
        return rounded

    def _store(self, levels: NDArray[np.int8]) -> int:
        """Where in the file they begin."""
        offset = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(levels.data)
            self._file.flush()
        except OSError as error:
            hint = "measuring sets keeps every rounded weight on the disk, twice for int8-smoothquant: make room, or leave out the limit"
            short = f"{offset + levels.nbytes:,} bytes of levels don't fit beside the artifact: {error.strerror}"
            raise QuantizationError(short, hint=hint) from error
        return offset
