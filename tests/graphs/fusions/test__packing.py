from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphs.fusions._packing import _joined, packed_module, packing_objections

NAMES = ("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj")
PACKED_NAME = "mlp.gate_up_proj"


def stored(name, shape, offset, dtype=ir.DataType.FLOAT):
    """A value whose bytes lie in a file, from an offset on; None is its beginning."""
    tensor = ir.ExternalTensor("weights.bin", offset, int(np.prod(shape)) * 4, dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def weights(shapes=((6, 4), (6, 4)), offsets=(None, 96), names=NAMES):
    return [stored(f"{name}.weight", shape, offset) for name, shape, offset in zip(names, shapes, offsets, strict=True)]


def biases(offsets=(200, 224)):
    return [stored(f"{name}.bias", (6,), offset) for name, offset in zip(NAMES, offsets, strict=True)]


@pytest.fixture
def x():
    return ir.Value(name="x", shape=ir.Shape(["B", "S", 4]), type=ir.TensorType(ir.DataType.FLOAT))


def reason(x, parts, more=()):
    """The first objection, None if there is none."""
    return next((reason for reason, _ in packing_objections(x, parts, PACKED_NAME, more)), None)


@pytest.mark.parametrize("offsets", [(None, 96), (0, 96), (16, 112)])
def test_weights_that_lie_side_by_side_are_one(x, offsets) -> None:
    parts = weights(offsets=offsets)
    assert reason(x, parts, biases()) is None
    joined = _joined(parts, "packed", (12, 4))
    assert (joined.offset, joined.length, tuple(joined.shape)) == (offsets[0] or 0, 192, (12, 4))


@pytest.mark.parametrize("shapes", [((6, 5), (6, 5)), ((6, 1, 4), (6, 1, 4)), ((4,), (4,))])
def test_refuses_weights_of_other_shapes(x, shapes) -> None:
    assert reason(x, weights(shapes)) == "model.layers.3.mlp.gate_proj.weight is not a weight [out, in] stored outside the graph"


def test_refuses_a_bias_in_the_graph_and_one_of_another_size(x) -> None:
    inside, (gate, _) = ir.Value(name="b", shape=ir.Shape([6]), const_value=ir.tensor(np.zeros(6, np.float32))), biases()
    assert reason(x, weights(), [inside, gate]) == "b is not a bias [out] stored outside the graph"
    assert reason(x, weights(), [stored("c", (5,), 200), gate]) == "c is not a bias [out] stored outside the graph"


@pytest.mark.parametrize("names", [("w", "v"), (f"{NAMES[0]}.weight.2", NAMES[1]), (NAMES[0], "model.layers.4.mlp.up_proj"), NAMES[::-1]])
def test_refuses_weights_of_other_names(x, names) -> None:
    parts = weights(names=names)
    parts[0].name = parts[0].name.replace(".2.weight", ".2")
    assert packed_module(parts, PACKED_NAME) is None
    assert reason(x, parts).endswith("are not named mlp.gate_proj, mlp.up_proj of one layer")


def test_names_the_packed_module() -> None:
    assert packed_module(weights(), PACKED_NAME) == "model.layers.3.mlp.gate_up_proj"
