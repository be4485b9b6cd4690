"""Who gives a compiler its memory, and how what it no longer needs is given back.

A compiler allocates and frees millions of small pieces. On SmolLM2, glibc's malloc and the cache misses that its heap brings are 40 % of the build's
CPU time: under mimalloc the same plan takes 0.6 of it (docs/adr/010). So a worker runs under mimalloc where the distribution that brings it is
installed. Either keeps free memory for itself, 300 MB of 930 by the time the plan is written, unless it is told to give it back.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTION = "cmeel-mimalloc"
LIBRARY = "libmimalloc.so"
PRELOAD = "LD_PRELOAD"
SEPARATORS = " :"
"""What ld.so parts names of libraries at; they can't be quoted."""
SYSTEM = "the system's"
_VERSION = "mi_version"
_COLLECT: dict[str, Callable[[Any], Any]] = {"mi_collect": lambda collect: collect(True), "malloc_trim": lambda trim: trim(0)}
"""What gives memory back → how it is called; mimalloc's first, since under it glibc's has nothing to give."""


def mimalloc() -> Path | None:
    """The library of the installed distribution; None where there is none."""
    if sys.platform != "linux":
        return None
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.name == LIBRARY)
    return next((library.resolve() for library in found if library.is_file()), None)


def environment() -> dict[str, str]:
    """Variables that put a process under mimalloc; none where it is not installed, where something else is preloaded, or where ld.so can't name it.

    A preload of somebody's own, an allocator or a sanitizer, may have to be the first and the only one.
    """
    library = mimalloc()
    if library is None or os.environ.get(PRELOAD) or set(str(library)) & set(SEPARATORS):
        return {}
    return {PRELOAD: str(library)}


def allocator() -> str:
    """What this process runs under, as build.json has it; asked of the process: a library that can't be preloaded is left out without an error."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, _VERSION):
        return SYSTEM
    major, rest = divmod(int(getattr(library, _VERSION)()), 10_000)
    return f"mimalloc {major}.{rest // 100}.{rest % 100}"


def give_back() -> None:
    """Return this process's free memory to the system; nothing where its allocator can't be asked."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    name = next((name for name in _COLLECT if hasattr(library, name)), None)
    if name is not None:
        _COLLECT[name](getattr(library, name))
