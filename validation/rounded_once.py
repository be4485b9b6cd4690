"""Weights rounded as a scheme rounds them, each once: measuring a set of linears asks for the same ones again and again.

Levels lie in files without a name beside the artifact, gone with the process: a whole model's would not fit into memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
        self._rounder, self._scale_dtype, self._folder = rounder, np.dtype(scale_dtype), folder
        self._kept: dict[str, tuple[NDArray[np.int8], Weight]] = {}

    def __call__(self, name: str, weight: Weight) -> Weight:
        """[out, in] as it is once it is dequantised; ``name`` always means the same weight."""
        if name not in self._kept:
            levels, scale = self._rounder.round(weight, name, FORM.grid(name, weight.shape[1], self._scale_dtype))
            self._kept[name] = self._stored(levels), scale
        levels, scale = self._kept[name]
        rounded: Weight = levels * scale
        return rounded

    def _stored(self, levels: NDArray[np.int8]) -> NDArray[np.int8]:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(levels.data)
            file.flush()
            return np.memmap(file, np.int8, "r", shape=levels.shape)  # the mapping outlives the file
