"""Pinned graphs of other exporters, the checkpoints that they were exported from, and ways to damage a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from exporter.checkpoints import Checkpoint, open_checkpoint
from validation.lone.report import validate_graph

PINNED = Path(__file__).parents[2] / "graphs" / "foreign" / "pinned"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Floors of these tests stay with these tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "llama2trt" / "floors"


@pytest.fixture(scope="session")
def pinned() -> Callable[[str], Path]:
    """The file of a pinned graph, or of its checkpoint: ``pinned("optimum-18.onnx")``."""
    return lambda name: PINNED / name


@pytest.fixture(scope="session")
def exported_from() -> Checkpoint:
    """What the pinned graphs were exported from, without a tokenizer."""
    return open_checkpoint(str(PINNED / "checkpoint"))


@pytest.fixture
def judge(exported_from: Checkpoint, tmp_path: Path) -> Callable[[Path], dict[str, Any]]:
    """The report of a graph; its files go to ``tmp_path/reports``."""
    return lambda path: validate_graph(path, exported_from, out=tmp_path / "reports", text=None, tokens=None)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[str, Callable[[ir.Model], None]], Path]:
    """``damaged("optimum-18", edit)``: a copy of a pinned graph, edited."""

    def make(name: str, edit: Callable[[ir.Model], None]) -> Path:
        model = ir.load(PINNED / f"{name}.onnx")
        edit(model)
        ir.save(model, tmp_path / "damaged.onnx")
        return tmp_path / "damaged.onnx"

    return make
