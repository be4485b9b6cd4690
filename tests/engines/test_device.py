"""engines/device.py, on a driver that answers as the real one does, and on the real one where there is one."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from artifact.errors import EngineError
from engines import device
from engines.device import Device, find_device, read_device


def driver(*, devices: int = 1, fails: str = "") -> SimpleNamespace:
    """libcuda's calls that are used; one of them may fail with CUDA error 999."""

    def code(name: str) -> int:
        return 999 if name == fails else 0

    def count(found: Any) -> int:
        found._obj.value = devices
        return code("cuDeviceGetCount")

    def name(buffer: Any, size: int, handle: Any) -> int:
        buffer.value = b"NVIDIA A100-SXM4-80GB"
        return code("cuDeviceGetName")

    def memory(found: Any, handle: Any) -> int:
        found._obj.value = 80 * 2**30
        return code("cuDeviceTotalMem_v2")

    def attribute(found: Any, which: int, handle: Any) -> int:
        found._obj.value = {75: 8, 76: 0}[which]
        return code("cuDeviceGetAttribute")

    return SimpleNamespace(
        cuInit=lambda flags: code("cuInit"), cuDeviceGetCount=count, cuDeviceGet=lambda handle, index: code("cuDeviceGet"),
        cuDeviceGetName=name, cuDeviceTotalMem_v2=memory, cuDeviceGetAttribute=attribute,
    )  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, library: SimpleNamespace) -> None:
    monkeypatch.setattr(device, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": lambda name: library}))


def test_says_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, driver())
    assert read_device() == find_device() == Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fails": "cuInit"}, "an NVIDIA driver, but no GPU that it can use"),
        ({"devices": 0}, "an NVIDIA driver, but no GPU that it can use"),
        ({"fails": "cuDeviceGetCount"}, "an NVIDIA driver, but no GPU that it can use"),
        *(({"fails": call}, r"can't describe its GPU \(CUDA error 999\)") for call in ("cuDeviceGet", "cuDeviceGetName", "cuDeviceTotalMem_v2")),
        ({"fails": "cuDeviceGetAttribute"}, r"can't describe its GPU \(CUDA error 999\)"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error_and_a_reason(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str) -> None:
    install(monkeypatch, driver(**options))
    with pytest.raises(EngineError, match=words) as error:
        read_device()
    assert "nvidia-smi" in str(error.value.hint)
    assert find_device() == str(error.value)


def test_a_machine_without_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(device, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": absent}))
    assert str(find_device()) == "no NVIDIA driver here: libcuda.so.1: cannot open shared object file"


@pytest.mark.gpu
def test_the_gpu_that_is_there_is_described() -> None:
    found = read_device()
    assert found.name
    assert found.compute_capability >= (7, 5)
    assert found.memory_bytes > 2**30
