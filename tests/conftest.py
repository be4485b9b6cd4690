"""What every test shares: few threads, no network for tokenizers and configs, and GPU tests that say why they are skipped."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Before torch is imported: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]


def missing_gpu() -> str | None:
    """Why no NVIDIA GPU can be used here; None where one can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no CUDA driver: {error}"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "a CUDA driver, but no GPU"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = missing_gpu() if gpu_items else None
    if reason is None:
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU ({reason})"))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""config.json of a model small enough to trace, run and compare in seconds."""


def write_checkpoint(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """Write a Hugging Face folder with random float16 weights of a sane scale."""
    import torch
    from safetensors.torch import save_file

    from artifact.config import LlamaConfig
    from artifact.layout import tensor_shapes

    folder.mkdir(parents=True, exist_ok=True)
    fields = TINY | config
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(LlamaConfig.from_hf(fields)).items():
        values = torch.randn(shape, generator=generator)
        spread = 0.3 if name.endswith(".bias") else 0.1
        tensors[name] = (values * shape[-1] ** -0.5 if len(shape) > 1 else spread * values + (not name.endswith(".bias"))).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: 2 layers, grouped-query attention, untied, no tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """Writes Hugging Face folders of other shapes: ``make_checkpoint(folder, num_hidden_layers=5)``."""
    return write_checkpoint


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_cli("fuse", artifact, code=3)``: what ``python cli.py fuse ARTIFACT`` says and how it ends, without seconds of imports each time.

    That a process says and does the same: tests/test_cli.py::test_a_process_ends_as_main_does.
    """
    return _run_main


def _run_main(*arguments: str | Path, code: int = 0, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    import cli

    out, err, ended = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err), _logging_of_its_own():
        patch.setattr(sys, "argv", ["cli.py", *map(str, arguments)])
        patch.chdir(folder)
        try:
            cli.main()
        except SystemExit as end:
            ended = int(end.code or 0)
    assert ended == code, out.getvalue() + err.getvalue()
    return subprocess.CompletedProcess(arguments, ended, out.getvalue(), err.getvalue())


@contextmanager
def _logging_of_its_own() -> Iterator[None]:
    """As in a new process: no handler is there, and none stays."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.fixture(scope="session")
def plan_on_cpu() -> ModuleType:
    """The file of that name beside this one; tests are no package to import it from."""
    spec = importlib.util.spec_from_file_location("plan_on_cpu", Path(__file__).with_name("plan_on_cpu.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runtime(plan_on_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """ONNX Runtime in the place of TensorRT-RTX, for plans of ``plan_on_cpu.write_plan``; buffers lie in the host's memory."""
    from engines import device_cache, runner

    memory = plan_on_cpu.Memory()
    for module in (runner, device_cache):
        monkeypatch.setattr(module, "device_memory", memory)
    fake = plan_on_cpu.Runtime(memory)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return fake


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> Any:
    """This machine has an A100, as far as anybody asks its driver."""
    from engines import device

    found = device.Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30)
    monkeypatch.setattr(device, "read_device", lambda: found)
    return found
