"""The files of .github/local and of the composite action, which are no package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def expressions() -> Iterator[ModuleType]:
    """.github/local/expressions.py."""
    yield load(ROOT / ".github" / "local" / "expressions.py")
    del sys.modules["expressions"]


@pytest.fixture(scope="session")
def cache_key() -> Iterator[ModuleType]:
    """The cache key of the composite action."""
    before = list(sys.path)
    yield load(ROOT / ".github" / "actions" / "build-engine" / "cache_key.py")
    sys.path[:] = before
    del sys.modules["cache_key"]
