"""validation/strict.py: every operation rounds, and the first NaN or inf is named. ONNX Runtime's whole graph is shown to do neither."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact.layout import MODULE_KEY
from exporter.checkpoints import Checkpoint
from validation.calls import left_padded
from validation.floor import streamed_logits
from validation.graph_runner import call_feeds
from validation.reference import Reference
from validation.scenarios import Scenario
from validation.strict import run_strict

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
PRODUCTS = """
g (float16[1,4] x, float16[4,4] w, float16[4,4] u, float16[4] scale) => (float16[1,4] y)
{
    large = MatMul(x, w)
    small = MatMul(large, u)
    y = RMSNormalization<axis=-1, epsilon=1e-5>(small, scale)
}"""


def halve_constants(model: ir.Model) -> ir.Model:
    """ONNX text has no float16 literals: constants are written as float32; -1e30 becomes -inf."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            with np.errstate(over="ignore"):
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
            value.dtype = ir.DataType.FLOAT16
    return model


def graph(text: str) -> ir.Model:
    model = halve_constants(ir.from_onnx_text(HEADER + text))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def one_node(operator: str, inputs: list[np.ndarray], **attributes: object) -> tuple[ir.Model, dict[str, np.ndarray]]:
    values = [
        ir.Value(name=f"i{n}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape)) for n, array in enumerate(inputs)
    ]
    node = ir.Node("", operator, values, ir.convenience.convert_attributes(attributes), num_outputs=1, name="node")
    node.outputs[0].name = "y"
    model = ir.Model(ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 23}, name="g"), ir_version=10)
    return model, {f"i{n}": array for n, array in enumerate(inputs)}


def halves(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(len(shape)).standard_normal(shape) * scale).astype(np.float16)


def full(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.float16)


def whole_graph(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("MatMul", [full(300, 2, 4), full(300, 4, 3)], {}),
        ("Gemm", [full(300, 2, 4), full(300, 3, 4)], {"transB": 1}),
        ("Mul", [full(300, 4), full(300, 4)], {}),
        ("Add", [full(40000, 4), full(40000, 4)], {}),
        ("Sub", [full(40000, 4), full(-40000, 4)], {}),
        ("Div", [full(300, 4), full(1e-4, 4)], {}),
        ("Pow", [full(300, 4), np.array(2.0, np.float16)], {}),
        ("Reciprocal", [full(1e-5, 4)], {}),
        ("ReduceSum", [full(40000, 4)], {}),
        ("Cast", [np.full(4, 1e5, np.float32)], {"to": ir.DataType.FLOAT16}),
        ("DequantizeLinear", [np.full((2, 4), 127, np.int8), full(1000, 2)], {"axis": 0}),
        ("RMSNormalization", [full(1, 2, 4), full(60000, 4) * np.array([1, 1, 1, np.inf], np.float16)], {"axis": -1}),
        ("RotaryEmbedding", [full(60000, 1, 1, 2, 4), full(1, 3, 2), full(-1, 3, 2), np.array([[0, 1]])], {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lone_operation_overflows_to_inf(operator: str, inputs: list[np.ndarray], attributes: dict[str, object]) -> None:
    model, feeds = one_node(operator, inputs, **attributes)
    run = run_strict(model, feeds)
    assert np.isinf(run.outputs["y"]).any()
    assert run.first_nonfinite is not None
    assert run.first_nonfinite.startswith(f"node ({operator}): inf in y FLOAT16")


@pytest.mark.parametrize(("operator", "numpy_operation"), [("Mul", np.multiply), ("Add", np.add), ("Sub", np.subtract), ("Div", np.divide)])
def test_arithmetic_is_rounded_once(operator: str, numpy_operation: np.ufunc) -> None:
    a, b = halves(64, 64), halves(64, 64, scale=3)[::-1].copy()
    model, feeds = one_node(operator, [a, b])
    np.testing.assert_array_equal(
        run_strict(model, feeds).outputs["y"], numpy_operation(a.astype(np.float64), b.astype(np.float64)).astype(np.float16)
    )


def test_product_is_accumulated_in_float32_and_rounded_once() -> None:
    a, b = halves(32, 1024), halves(1024, 32)
    model, feeds = one_node("MatMul", [a, b])
    exact = a.astype(np.float64) @ b.astype(np.float64)
    ours = run_strict(model, feeds).outputs["y"].astype(np.float64)
    assert np.abs(ours - exact).mean() == pytest.approx(np.abs(exact.astype(np.float16) - exact).mean(), rel=0.01)


def test_overflow_between_two_nodes_is_found_where_the_whole_graph_hides_it() -> None:
    feeds = {"x": full(160, 1, 4), "w": full(160, 4, 4), "u": full(1e-3, 4, 4), "scale": full(1, 4)}
    hidden = whole_graph(graph(PRODUCTS), feeds)
    assert np.isfinite(hidden).all()  # 102,400 in between, and nobody sees it
    run = run_strict(graph(PRODUCTS), feeds)
    assert np.isnan(run.outputs["y"]).all()
    assert run.first_nonfinite == "node_large (MatMul): inf in large FLOAT16[1, 4]"


def test_first_nonfinite_gives_the_layer() -> None:
    model = graph(PRODUCTS)
    model.graph[1].metadata_props[MODULE_KEY] = "model.layers.7.mlp.down_proj"
    feeds = {"x": full(100, 1, 4), "w": full(100, 4, 4), "u": full(100, 4, 4), "scale": full(1, 4)}
    run = run_strict(model, feeds)
    assert run.first_nonfinite == "node_small (MatMul, model.layers.7.mlp.down_proj): inf in small FLOAT16[1, 4]"
    assert run.first_nonfinite_layer == 7


def test_sound_graph_has_no_nonfinite_value() -> None:
    run = run_strict(graph(PRODUCTS), {"x": full(1, 1, 4), "w": full(1, 4, 4), "u": full(1, 4, 4), "scale": full(1, 4)})
    assert (run.first_nonfinite, run.first_nonfinite_layer) == (None, None)
    np.testing.assert_array_equal(run.outputs["y"], full(1, 1, 4))


MASK = """
g (float16[1,4] scores, bool[1,4] keep) => (float16[1,4] y)
<float[1] fill = {-1e30}>
{
    s = Where(keep, scores, fill)
    y = Softmax<axis=-1>(s)
}"""


def test_infinity_of_a_mask_is_no_overflow() -> None:
    run = run_strict(graph(MASK), {"scores": full(1, 1, 4), "keep": np.array([[True, True, False, False]])})
    assert run.first_nonfinite is None
    np.testing.assert_allclose(run.outputs["y"], [[0.5, 0.5, 0, 0]])


def test_nan_of_a_fully_masked_row_is_reported() -> None:
    run = run_strict(graph(MASK), {"scores": full(1, 1, 4), "keep": np.zeros((1, 4), bool)})
    assert np.isnan(run.outputs["y"]).all()
    assert run.first_nonfinite == "node_y (Softmax): NaN in y FLOAT16[1, 4]"


@pytest.mark.trace
def test_real_trace_has_the_error_of_float16_in_pytorch(sound_artifact: Path, checkpoint: Checkpoint) -> None:
    """Strict mode and PyTorch round at nearly the same places; the whole graph in ONNX Runtime is much better than float16 can be."""
    ids = np.arange(64) * 7 % checkpoint.config.vocab_size
    reference = Reference(checkpoint.config, checkpoint.read)
    truth = reference.run([ids])[0].logits()
    feeds = call_feeds(checkpoint.config, "fp16", next(left_padded(Scenario("prefill", (ids,), (0,), (64,)).turns())))
    floor = np.abs(streamed_logits(reference, [ids])[0] - truth).mean()
    run = run_strict(sound_artifact / "traced.onnx", feeds)
    assert run.first_nonfinite is None
    assert 0.8 < np.abs(run.outputs["logits"][0] - truth).mean() / floor < 1.2
    session = ort.InferenceSession(sound_artifact / "traced.onnx", providers=["CPUExecutionProvider"])
    whole = np.asarray(session.run(["logits"], feeds)[0])[0]
    assert np.abs(whole - truth).mean() / floor < 0.7
