"""Arrays that lie in a file and not in memory: keys, values and hidden states of all layers would be gigabytes at 13B.

The file has no name, so it is gone with the process, however that ends; its pages are the system's to drop.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.errors import ValidationError

Array = NDArray[Any]
BLOCK = 256 << 20
"""Bytes that are taken of the disk at a time: a file and a mapping each."""
ALIGNMENT = 64


class Spill:
    """A place for arrays on a disk.

    Args:
        folder: on the disk that has the room.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._block: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._used = 0

    def keep(self, array: Array) -> Array:
        """The same array, in a file.

        Raises:
            ValidationError: the disk is full.
        """
        if self._used + array.nbytes > len(self._block):
            self._block, self._used = self._new_block(max(BLOCK, array.nbytes)), 0
        kept: Array = self._block[self._used : self._used + array.nbytes].view(array.dtype).reshape(array.shape)
        kept[...] = array
        self._used += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        return kept

    def _new_block(self, size: int) -> NDArray[np.uint8]:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a hole would be a crash when it is written to on a full disk
            except OSError as error:
                hint = f"make room on the disk of {self._folder}"
                raise ValidationError(f"keys, values and hidden states can't be kept on disk: {error.strerror}", hint=hint) from error
            return np.memmap(file, np.uint8, "w+", shape=(size,))
