"""A three-layer artifact with traced, fused and int8 graphs, what they are compared with, and a way to narrow a damaged graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.io_spec import KvCache
from artifact.progress import silent
from artifact.steps import StepContext, run_step
from exporter.checkpoints import Checkpoint, open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
from validation.bisect.narrow import narrow
from validation.floor import no_floor
from validation.oracle import Oracle
from validation.prepare import prepare_oracle

Edit = Callable[[ir.Model], None]
Narrow = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def three_layers(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "three", num_hidden_layers=3)))


@pytest.fixture(scope="session")
def stages(three_layers: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _stages(three_layers, tmp_path_factory.mktemp("stages") / "three", "dynamic")


@pytest.fixture(scope="session")
def static_stages(three_layers: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _stages(three_layers, tmp_path_factory.mktemp("stages") / "static", "static")


@pytest.fixture(scope="session")
def oracle_of() -> Callable[[Checkpoint, Path, KvCache], Oracle]:
    return _oracle


@pytest.fixture(scope="session")
def narrower() -> Callable[[Oracle, Path], Narrow]:
    """``narrower(oracle, artifact)``: a ``narrowed`` of the stages of another artifact."""
    return _narrower


@pytest.fixture(scope="session")
def oracle(three_layers: Checkpoint, stages: Path) -> Oracle:
    return _oracle(three_layers, stages, "dynamic")


@pytest.fixture(scope="session")
def narrowed(oracle: Oracle, stages: Path) -> Narrow:
    """``narrowed(stage, edit)``: what is found in a graph of the artifact after an edit."""
    return _narrower(oracle, stages)


@pytest.fixture(scope="session")
def narrowed_static(three_layers: Checkpoint, static_stages: Path) -> Narrow:
    return _narrower(_oracle(three_layers, static_stages, "static"), static_stages)


def _stages(checkpoint: Checkpoint, artifact: Path, kv_cache: KvCache) -> Path:
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16", kv_cache=kv_cache))
    run_step(artifact, "fuse", {}, fuse_artifact)
    run_step(artifact, "quantize-int8", {}, quantize_int8)
    return artifact


def _oracle(checkpoint: Checkpoint, artifact: Path, kv_cache: KvCache) -> Oracle:
    return prepare_oracle(StepContext(artifact), checkpoint, "fp16", kv_cache, text=None, tokens=None, measure=lambda *_: no_floor("not measured"))


def _narrower(oracle: Oracle, artifact: Path) -> Narrow:
    def run(stage: str, edit: Edit | None = None, **entry: Any) -> dict[str, Any]:
        graph = artifact / f"{stage}.onnx"
        if edit is None:
            return narrow(oracle, graph, entry, silent)
        kept = shutil.copy(graph, artifact / f"{stage}.kept")
        try:
            model = ir.load(graph)
            edit(model)
            ir.save(model, graph)
            return narrow(oracle, graph, entry, silent)
        finally:
            shutil.move(kept, graph)

    return run
