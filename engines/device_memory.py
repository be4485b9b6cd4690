"""Buffers and streams on the GPU, through Polygraphy: the only calls that can't be made without one."""

from __future__ import annotations

from typing import Any

import numpy as np


def open_stream() -> Any:
    """A new CUDA stream: ``ptr`` and ``synchronize``."""
    from polygraphy.cuda import Stream

    return Stream()


def allocate(shape: tuple[int, ...], dtype: Any, count: int = 1) -> list[Any]:
    """Buffers of a shape and a NumPy dtype on the GPU: ``ptr``, ``shape``, ``resize``, ``copy_from``, ``view`` and ``copy_to``."""
    from polygraphy.cuda import DeviceArray
    from polygraphy.datatype import DataType

    return [DeviceArray(shape, DataType.from_dtype(np.dtype(dtype))) for _ in range(count)]


def free(*owned: Any) -> None:
    """Give buffers and streams back; Polygraphy does not when they are forgotten."""
    for one in owned:
        one.free()
