"""Graphs that other exporters made (make_graphs.py says how), and the scenarios in which two graphs must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphs.foreign.fuse import fuse_graph

Array = np.ndarray[Any, Any]
PINNED = Path(__file__).parent / "pinned"


@dataclass(frozen=True)
class Scenario:
    """One call: B sequences of S new tokens after P; ``padding`` positions of the first are padding, on the left."""

    batch: int
    new: int
    past: int
    padding: int = 0


SCENARIOS = {
    "prefill": Scenario(1, 24, 0),
    "batch": Scenario(2, 9, 0),
    "decode": Scenario(1, 1, 17),
    "chunk": Scenario(2, 5, 11),
    "left-padded": Scenario(2, 12, 0, padding=5),
    "left-padded-decode": Scenario(2, 1, 12, padding=5),
}


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """A pinned graph and a target → (file, report); each is fused once."""
    made: dict[tuple[Path, str], tuple[Path, dict[str, Any]]] = {}

    def make(path: Path, target: str = "tensorrt") -> tuple[Path, dict[str, Any]]:
        if (path, target) not in made:
            out = tmp_path_factory.mktemp(f"{path.stem}-{target}") / "fused.onnx"
            made[path, target] = out, fuse_graph(path, out, target=target)
        return made[path, target]

    return make


@pytest.fixture
def pinned() -> Callable[[str], Path]:
    """The file of a pinned graph: ``pinned("optimum-18")``."""
    return lambda name: PINNED / f"{name}.onnx"


def session(path: Path) -> ort.InferenceSession:
    """Every optimisation off: what runs is what is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(graph: ort.InferenceSession, scenario: Scenario, vocab_size: int) -> tuple[dict[str, Array], Array]:
    """Inputs of one call in the graph's own order, and which of the T positions are real [B, T]."""
    generator = np.random.default_rng(0)
    total = scenario.past + scenario.new
    mask = np.ones((scenario.batch, total), np.int64)
    mask[0, : scenario.padding] = 0
    made: dict[str, Array] = {
        "input_ids": generator.integers(0, vocab_size, (scenario.batch, scenario.new)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, -scenario.new :],
    }
    for value in graph.get_inputs():
        if value.name.startswith("past"):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            made[value.name] = generator.standard_normal((scenario.batch, value.shape[1], scenario.past, value.shape[3])).astype(dtype)
    return {value.name: made[value.name] for value in graph.get_inputs()}, mask.astype(bool)


def worst_difference(before: Path, after: Path, scenario: Scenario, vocab_size: int = 32) -> float:
    """The largest difference of logits and caches at real positions, relative to the largest value of that output."""
    graphs = session(before), session(after)
    inputs, real = feeds(graphs[0], scenario, vocab_size)
    worst = 0.0
    for name, old, new in zip((value.name for value in graphs[0].get_outputs()), *(graph.run(None, inputs) for graph in graphs), strict=True):
        kept = (real[:, -scenario.new :], old, new) if name == "logits" else (real, old.transpose(0, 2, 1, 3), new.transpose(0, 2, 1, 3))
        at_real = [array[kept[0]].astype(np.float64) for array in kept[1:]]
        worst = max(worst, float(np.abs(at_real[0] - at_real[1]).max() / np.abs(at_real[0]).max()))
    return worst


def interface(path: Path) -> list[tuple[Any, ...]]:
    """Names, dtypes and shapes of inputs and outputs."""
    graph = ir.load(path).graph
    return [(value.name, value.dtype, str(value.shape)) for value in (*graph.inputs, *graph.outputs)]


@pytest.fixture
def tools() -> Mapping[str, Any]:
    """The functions above; a conftest can't be imported by name here."""
    return {
        "worst_difference": worst_difference,
        "interface": interface,
        "scenarios": SCENARIOS,
        "feeds": lambda path, scenario: feeds(session(path), scenario, 32)[0],
    }
