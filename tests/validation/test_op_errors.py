from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.checkpoints import Checkpoint
from validation.op_errors import op_errors
from validation.reference import Reference

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def hidden(checkpoint: Checkpoint) -> list[np.ndarray]:
    (run,) = Reference(checkpoint.config, checkpoint.read).run([np.arange(40) % 64], keep_hidden={0}, keep_cache=())
    assert run.hidden is not None
    return run.hidden


@pytest.mark.parametrize("stage", ["traced", "fused", "int8"])
def test_roundings_of_a_sound_layer_are_float16s(quantized: Path, hidden: list[np.ndarray], stage: str) -> None:
    found = op_errors(quantized / f"{stage}.onnx", 1, hidden[1])
    assert found["layer"] == 1
    assert 1e-5 < found["error"] < 2**-9
    kinds = {kind["op"]: kind for kind in found["kinds"]}
    assert kinds["MatMul"]["nodes"] >= 4
    assert all(0 <= kind["worst"] < 2**-9 for kind in kinds.values())
    assert [kind["added"] for kind in found["kinds"]] == sorted((kind["added"] for kind in found["kinds"]), reverse=True)


def test_the_kind_that_loses_bits_is_first_and_its_node_is_named(
    artifact: Path, hidden: list[np.ndarray], rewrite_graph: Callable[..., None]
) -> None:
    """A large constant added and taken away again: the same in float32, and most bits are gone in float16."""

    def lose_bits(model: ir.Model) -> None:
        value = next(node for node in model.graph if node.op_type == "MatMul" and "layers.1.mlp.up_proj" in str(node.name)).outputs[0]
        users: list[Any] = list(value.uses())
        for sign in (512.0, -512.0):
            constant = ir.Value(name=f"large {sign}", const_value=ir.tensor(np.float16(sign), name=f"large {sign}"))
            model.graph.initializers.add(constant)
            node = ir.node("Add", [value, constant], metadata_props=dict(users[0][0].metadata_props), name=f"shift {sign}")
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"shifted {sign}", users[0][0].outputs[0].type, value.shape
            model.graph.append(node)
            value = node.outputs[0]
        for user, index in users:
            user.replace_input_with(index, value)
        model.graph.sort()

    rewrite_graph(artifact, lose_bits)
    found = op_errors(artifact / "traced.onnx", 1, hidden[1])
    assert found["kinds"][0]["op"] == "Add"
    assert found["kinds"][0]["where"].startswith("shift -512.0 (Add")
    assert found["kinds"][0]["worst"] > 0.05
