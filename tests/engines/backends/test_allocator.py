"""engines/backends/allocator.py: mimalloc where it is installed, and memory that goes back; a build says which it had."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.backends import allocator
from engines.backends.worker import ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD and malloc_trim are Linux's")
HOLD_AND_FREE = """
import ctypes, psutil
from engines.backends.allocator import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(60_000) for _ in range(3_000)]
for piece in pieces:
    ctypes.memset(ctypes.c_void_p(piece), 1, 60_000)
for piece in pieces[:-1]:  # the last keeps the heap from shrinking by itself
    libc.free(piece)
before = psutil.Process().memory_info().rss
give_back()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A distribution that brings the library, under a name and as a link, and other files."""
    library = tmp_path / "lib" / "libmimalloc.so.3"
    library.parent.mkdir()
    library.touch()
    (tmp_path / "lib" / allocator.LIBRARY).symlink_to(library)
    names = ["include/mimalloc.h", "lib/libmimalloc.so.3", f"lib/{allocator.LIBRARY}"]
    files = [SimpleNamespace(name=Path(name).name, locate=lambda name=name: tmp_path / name) for name in names]
    monkeypatch.setattr(metadata, "files", {allocator.DISTRIBUTION: files}.__getitem__)
    return library


def missing(_: str) -> None:
    raise metadata.PackageNotFoundError


@LINUX
def test_a_worker_gets_the_installed_mimalloc(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(allocator.PRELOAD, raising=False)
    assert allocator.environment() == {"LD_PRELOAD": str(installed)}


@LINUX
def test_leaves_alone_what_is_preloaded_already(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(allocator.PRELOAD, "/lib/theirs.so")
    assert allocator.environment() == {}


@LINUX
@pytest.mark.parametrize("folder", ["my venv", "a:b"])
def test_a_path_that_is_two_names_to_the_loader_is_not_given(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(allocator.PRELOAD, raising=False)
    monkeypatch.setattr(allocator, "mimalloc", lambda: Path("/opt") / folder / allocator.LIBRARY)
    assert allocator.environment() == {}


@LINUX
def test_without_the_distribution_or_its_file_nothing_is_preloaded(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.unlink()
    assert allocator.environment() == {}
    monkeypatch.setattr(metadata, "files", missing)
    assert allocator.environment() == {}


def test_elsewhere_nothing_is_preloaded_or_asked(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert (allocator.environment(), allocator.allocator()) == ({}, "the system's")
    allocator.give_back()


@LINUX
@pytest.mark.parametrize(("version", "said"), [(30403, "mimalloc 3.4.3"), (None, "the system's")])
def test_says_what_the_process_runs_under(monkeypatch: pytest.MonkeyPatch, version: int | None, said: str) -> None:
    library = SimpleNamespace() if version is None else SimpleNamespace(mi_version=lambda: version)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert allocator.allocator() == said


@LINUX
@pytest.mark.parametrize(
    ("has", "asked"),
    [(("mi_collect", "malloc_trim"), [("mi_collect", True)]), (("malloc_trim",), [("malloc_trim", 0)]), ((), [])],
)
def test_asks_the_allocator_that_is_there(monkeypatch: pytest.MonkeyPatch, has: tuple[str, ...], asked: list[tuple[str, Any]]) -> None:
    calls: list[tuple[str, Any]] = []
    library = SimpleNamespace(**{name: lambda given, name=name: calls.append((name, given)) for name in has})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    allocator.give_back()
    assert calls == asked


@LINUX
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc here")
def test_memory_goes_back_to_the_system() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HOLD_AND_FREE], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100e6


def test_each_phase_of_a_build_gives_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    from engines.backends import bridge

    given: list[str] = []
    monkeypatch.setattr(bridge, "give_back", lambda: given.append("back"))
    monitor = bridge.Monitor()
    monitor.phase_start("Optimizing", None, 2)
    assert not given
    monitor.phase_finish("Optimizing")
    assert given == ["back"]


def test_under_mimalloc_a_process_says_so() -> None:
    """With the real library, where it is installed."""
    if allocator.mimalloc() is None:
        pytest.skip("cmeel-mimalloc is not installed")
    program = "from engines.backends.allocator import allocator; print(allocator())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **allocator.environment()}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"mimalloc {metadata.version(allocator.DISTRIBUTION)}"
