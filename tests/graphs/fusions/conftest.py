"""How the fusion tests make a graph of text, keep weights in a file, and run it as written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

Arrays = Mapping[str, np.ndarray[Any, Any]]
GraphMaker = Callable[..., ir.Model]
Runner = Callable[[ir.Model, Arrays], list[np.ndarray[Any, Any]]]


@pytest.fixture
def graph(tmp_path: Path) -> GraphMaker:
    """Text → model; inputs named in ``constants`` become initializers, those in ``stored`` lie in one file from byte 16, ``gap`` bytes apart."""

    def make(text: str, constants: Arrays | None = None, stored: Arrays | None = None, gap: int = 0, opset: int = 23) -> ir.Model:
        model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : {opset}]>\n{text}')
        tensors: dict[str, Any] = {name: ir.tensor(array, name=name) for name, array in (constants or {}).items()}
        offset, file = 16, tmp_path / "weights.bin"
        with file.open("wb") as out:
            out.write(b"\0" * offset)
            for name, array in (stored or {}).items():
                out.write(array.tobytes() + b"\0" * gap)
                dtype = ir.DataType.from_numpy(array.dtype)
                tensors[name] = ir.ExternalTensor(file.name, offset, array.nbytes, dtype, shape=ir.Shape(array.shape), name=name, base_dir=tmp_path)
                offset += array.nbytes + gap
        for value in [value for value in model.graph.inputs if value.name in tensors]:
            model.graph.inputs.remove(value)
            value.const_value = tensors[str(value.name)]
            model.graph.initializers.add(value)
        return model

    return make


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    """ONNX Runtime on CPU, every optimisation off: what runs is what is written."""

    def outputs(model: ir.Model, feeds: Arrays) -> list[np.ndarray[Any, Any]]:
        path = tmp_path / "model.onnx"
        ir.save(model, path)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, dict(feeds)))

    return outputs


@pytest.fixture
def random() -> Callable[..., np.ndarray[Any, Any]]:
    """Normal numbers from a fixed seed: ``random(2, 3, dtype=np.float16)``."""
    generator = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        return generator.standard_normal(shape).astype(dtype)

    return normal
