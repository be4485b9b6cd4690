"""Pinned exports whose code spells a decoder in another way: older transformers (masks of numbers, tables of cosines), and rotation by pairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from validation.node_runner import run_nodes
from validation.strict import run_strict

LAYERS = 2
FIRED = {"rms_norm": 2 * LAYERS + 1, "rotary": 2 * LAYERS, "attention": LAYERS, "constant_shape": 4 * LAYERS, "pack_qkv": 0, "pack_gate_up": 0}
FLOAT32 = ("pairs-18-float32", "torchscript-4.36-float32")
FLOAT16 = ("pairs-18-repeated-float16", "torchscript-4.30-float16", "torchscript-4.46-float16")
SCENARIOS = ["prefill", "batch", "decode", "chunk", "left-padded", "left-padded-decode"]


@pytest.mark.parametrize("name", [*FLOAT32, *FLOAT16])
def test_every_rule_fires_and_nothing_is_expanded(pinned, fused, name) -> None:
    out, report = fused(pinned(name))
    counts = FIRED | {"accumulate": 7 * LAYERS + 1 if name.endswith("float16") else 0}
    assert {rule["rule"]: (rule["fired"], rule["expected"]) for rule in report["rules"]} == {rule: (count, count) for rule, count in counts.items()}
    graph = ir.load(out).graph
    assert not {"Softmax", "Pow", "ReduceMean", "Neg"} & {node.op_type for node in graph}
    kinds = Counter(node.op_type for node in graph)
    assert kinds["Or"] == 1  # one mask for all layers
    assert all(node.inputs[part].producer().op_type == "Concat" for node in graph if node.op_type == "Attention" for part in (1, 2))
    rotations = [node for node in graph if node.op_type == "RotaryEmbedding"]
    assert {node.attributes.get_int("interleaved", 0) for node in rotations} == {int(name.startswith("pairs"))}
    assert len({tuple(node.inputs[1:]) for node in rotations}) == 1  # one cosine and one sine


@pytest.mark.parametrize("name", FLOAT32)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_numbers_stay(pinned, fused, tools, name, scenario) -> None:
    out, _ = fused(pinned(name))
    assert tools["worst_difference"](pinned(name), out, tools["scenarios"][scenario]) <= 1e-5
    assert tools["interface"](out) == tools["interface"](pinned(name))


@pytest.mark.parametrize("name", FLOAT16)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_float16_numbers_stay_within_its_rounding(pinned, fused, tools, name, scenario) -> None:
    out, _ = fused(pinned(name))
    assert tools["worst_difference"](pinned(name), out, tools["scenarios"][scenario]) <= 2**-7


@pytest.mark.parametrize("name", FLOAT16)
def test_float16_noise_does_not_grow(pinned, fused, tools, name) -> None:
    """Against the same graph in float32, every operation rounded."""
    before, after = ir.load(pinned(name)), ir.load(fused(pinned(name))[0])
    noise = {"before": [], "after": []}
    for scenario in ("prefill", "batch", "decode", "chunk"):
        made = tools["feeds"](pinned(name), tools["scenarios"][scenario])
        exact = run_nodes(before, made, float32=True)["logits"]
        for which, model in (("before", before), ("after", after)):
            noise[which].append(np.abs(run_strict(model, made).outputs["logits"].astype(np.float64) - exact).mean())
    assert 0 < np.mean(noise["after"]) <= 1.1 * np.mean(noise["before"]), {which: np.mean(each) for which, each in noise.items()}


@pytest.mark.parametrize("name", [*FLOAT32, *FLOAT16])
def test_no_row_is_fully_masked(pinned, fused, name, tmp_path) -> None:
    """Ask for the mask itself: the padded rows of a left-padded batch attend to themselves, whatever numbers it was made of."""
    model = ir.load(fused(pinned(name))[0])
    mask = next(node.outputs[0] for node in model.graph if node.op_type == "Or")
    mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([None, None, None, None])
    model.graph.outputs.append(mask)
    ir.save(model, tmp_path / "mask.onnx")
    graph = ort.InferenceSession(tmp_path / "mask.onnx", providers=["CPUExecutionProvider"])
    made = {"input_ids": np.zeros((1, 3), np.int64), "attention_mask": np.array([[0, 0, 0, 1, 1]]), "position_ids": np.array([[0, 0, 1]])}
    for value in graph.get_inputs()[3:]:
        made[value.name] = np.zeros((1, value.shape[1], 2, value.shape[3]), np.float16 if "16" in value.type else np.float32)
    (allowed,) = graph.run([mask.name], made)
    np.testing.assert_array_equal(allowed[0, 0], [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]])
