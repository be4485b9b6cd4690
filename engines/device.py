"""The GPU of this machine, asked through NVIDIA's driver; nothing but the driver has to be installed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from artifact.errors import EngineError

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


@dataclass(frozen=True)
class Device:
    """The first GPU that the driver shows.

    Attributes:
        compute_capability: (major, minor).
        memory_bytes: device memory, all of it.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int


def find_device() -> Device | str:
    """This machine's GPU, or why there is none."""
    try:
        return read_device()
    except EngineError as error:
        return str(error)


def read_device() -> Device:
    """Ask the driver for its first GPU.

    Raises:
        EngineError: no driver, or a driver that finds no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(f"no NVIDIA driver here: {error}", hint="plans run on a machine with their GPU; everything else runs here") from error
    count, handle, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise EngineError("an NVIDIA driver, but no GPU that it can use", hint="nvidia-smi says what the driver sees")
    name = ctypes.create_string_buffer(128)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuDeviceGet(ctypes.byref(handle), 0)
        or driver.cuDeviceGetName(name, len(name), handle)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, handle)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, handle)
    )
    if failed:
        raise EngineError(f"the NVIDIA driver can't describe its GPU (CUDA error {failed})", hint="nvidia-smi says what the driver sees")
    return Device(name.value.decode(errors="replace"), (major.value, minor.value), size.value)
