"""engines/one_position.py, gathered early: what mixes positions keeps all of them, what stands behind it computes one, and the numbers stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.one_position import HIDDEN, LAST, gather_last_position

E, V = 4, 6
HEAD = """
<ir_version: 11, opset_import: ["" : 23]>
g (int64[batch_size,sequence_length] input_ids, int64[batch_size,sequence_length] attention_mask) => (float[batch_size,sequence_length,6] logits MORE)
<WEIGHTS, int64 axis = {1}, int64[2] halves = {4, 4}>
{
x = Gather(embed, input_ids)
mixed = CumSum(x, axis)
"""
LAYER = """
o_out = MatMul(mixed, o)
middle = Add(x, o_out)
normed = RMSNormalization(middle, gain)
both = MatMul(normed, up)
a, b = Split<axis = 2>(both, halves)
gate = Sigmoid(a)
inner = Mul(gate, b)
down_out = MatMul(inner, down)
hidden = Add(middle, down_out)
"""
TAIL = """
logits = MatMul(hidden, head)
}
"""


WEIGHTS = {"embed": (V, E), "o": (E, E), "up": (E, 2 * E), "down": (E, E), "head": (E, V), "gain": (E,)}


def stored(name: str) -> str:
    numbers = np.random.default_rng(len(name)).normal(size=WEIGHTS[name]).round(3)
    return f"float{list(numbers.shape)} {name} = {{{', '.join(map(str, numbers.ravel()))}}}"


def model(layer: str = LAYER, *, outputs: str = "") -> ir.Model:
    """A decoder's end: attention is a sum over the positions so far. Every value says its shape, as in a fused graph."""
    head = HEAD.replace("WEIGHTS", ", ".join(map(stored, WEIGHTS))).replace(" MORE", outputs)
    made = ir.from_onnx_text(head + layer + TAIL)
    for node in made.graph:
        node.name = f"node_{node.outputs[0].name}"
    made = ir.passes.common.ShapeInferencePass()(made).model
    if "c = " in layer:  # inference knows no shape of it, nor of what follows
        for value in (output for node in made.graph for output in node.outputs):
            if value.name in ("a", "b", "c", "gate", "inner", "down_out", "hidden"):
                value.shape = ir.Shape(["batch_size", "sequence_length", 2 * E if value.name == "c" else E])
    return made


def run(made: ir.Model, path: Path) -> list[np.ndarray]:
    ir.save(made, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {"input_ids": np.random.default_rng(1).integers(0, V, (4, 4)), "attention_mask": np.tri(4, dtype=np.int64)}
    outputs: list[np.ndarray] = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})
    return outputs


def gathered(made: ir.Model) -> set[str]:
    return {str(node.inputs[0].name) for node in made.graph if str(node.name).startswith(LAST)}  # type: ignore[union-attr]


def check(layer: str, expected: set[str], path: Path, *, outputs: str = "") -> ir.Model:
    """The numbers are those of the last position, other outputs are whole, and the gather stands where it should."""
    whole, early = model(layer, outputs=outputs), model(layer, outputs=outputs)
    gather_last_position(early.graph, "decoder.onnx", early=True)
    assert gathered(early) == expected
    before, after = run(whole, path), run(early, path)
    np.testing.assert_allclose(after[0], before[0][:, -1:], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(after[1:], before[1:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return early


def test_only_attention_and_the_residual_keep_all_positions(tmp_path: Path) -> None:
    early = check(LAYER, {"mixed", "x"}, tmp_path / "model.onnx")
    shapes = {str(node.outputs[0].name): str(node.outputs[0].shape) for node in early.graph}
    assert shapes["mixed"] == "[batch_size,sequence_length,4]"
    assert {shapes[name] for name in ("o_out", "normed", "hidden", HIDDEN, f"{HIDDEN}_1")} == {"[batch_size,1,4]"}
    assert shapes["logits"] == "[batch_size,1,6]"


def test_late_it_stands_before_lm_head(tmp_path: Path) -> None:
    late = model()
    gather_last_position(late.graph, "decoder.onnx")
    assert gathered(late) == {"hidden"}
    np.testing.assert_allclose(run(late, tmp_path / "late.onnx")[0], run(model(), tmp_path / "whole.onnx")[0][:, -1:], rtol=1e-5, atol=1e-6)


TURN = "turned = Transpose<perm = [0, 2, 1]>"
MIXED = {
    "a soft-max over positions": ("gate = Sigmoid(a)", "gate = Softmax<axis = 1>(a)", {"gate", "b", "middle"}),
    "a sum over positions": ("gate = Sigmoid(a)", "gate = CumSum(a, axis)", {"gate", "b", "middle"}),
    "a transposition": ("gate = Sigmoid(a)", f"{TURN}(a)\ngate = Transpose<perm = [0, 2, 1]>(turned)", {"gate", "b", "middle"}),
    "a product of two activations": (
        "inner = Mul(gate, b)",
        f"{TURN}(b)\nscores = MatMul(gate, turned)\ninner = MatMul(scores, b)",
        {"inner", "middle"},
    ),
    "a Split of positions": (
        "a, b = Split<axis = 2>(both",
        "c = Split<axis = 1, num_outputs = 1>(both)\na, b = Split<axis = 2>(c",
        {"c", "middle"},
    ),
    "a norm over positions": ("normed = RMSNormalization", "normed = RMSNormalization<axis = 1>", {"normed", "middle"}),
}


@pytest.mark.parametrize(("old", "new", "expected"), MIXED.values(), ids=MIXED)
def test_what_mixes_positions_reads_them_all(old: str, new: str, expected: set[str], tmp_path: Path) -> None:
    check(LAYER.replace(old, new), expected, tmp_path / "model.onnx")


def test_what_something_else_reads_stays_whole(tmp_path: Path) -> None:
    layer = LAYER.replace("gate = Sigmoid(a)", "gate = Sigmoid(a)\nkept = Identity(normed)")
    check(layer, {"normed", "middle"}, tmp_path / "model.onnx", outputs=", float[batch_size,sequence_length,4] kept")


def test_an_output_of_the_graph_stays_whole(tmp_path: Path) -> None:
    check(LAYER, {"middle", "down_out"}, tmp_path / "model.onnx", outputs=", float[batch_size,sequence_length,4] down_out")


def test_a_value_of_two_axes_is_not_taken_for_one_of_positions(tmp_path: Path) -> None:
    """[B, S] broadcasts over [B, S, E] by its last axis, so that S is no longer the axis of positions; only S = E runs."""
    layer = LAYER.replace("inner = Mul(gate, b)", "mask = Cast<to = 1>(attention_mask)\ninner_0 = Mul(gate, b)\ninner = Mul(inner_0, mask)")
    check(layer, {"hidden"}, tmp_path / "model.onnx")


def test_a_value_whose_shape_is_not_known_stays_whole() -> None:
    unknown = model()
    next(node for node in unknown.graph if node.name == "node_both").outputs[0].shape = None
    gather_last_position(unknown.graph, "decoder.onnx", early=True)
    assert gathered(unknown) == {"a", "b", "middle"}
