"""validation/node_runner.py and node_sessions.py: dtypes between nodes, memory, sharing of sessions, and errors that name what is wrong."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.errors import ValidationError
from exporter.checkpoints import Checkpoint
from validation.calls import left_padded
from validation.graph_runner import call_feeds
from validation.node_runner import load_constant, run_nodes
from validation.node_sessions import NodeSessions
from validation.reference import Reference, ReferenceRun
from validation.scenarios import Scenario

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
CHAIN = """
g (float16[B,4] x, int64[2] shape) => (float16[M,N] y)
<float[1] one = {1.0}, float[1] half = {0.5}>
{
    a = Add(x, one)
    b = Mul(a, half)
    c, d = Split<axis=1, num_outputs=2>(b)
    e = Sub(c, d)
    y = Reshape(e, shape)
}"""
TOKENS = 24


def halve_constants(model: ir.Model) -> ir.Model:
    """ONNX text has no float16 literals: constants are written as float32; -1e30 becomes -inf."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        if value.const_value.dtype == ir.DataType.FLOAT:
            with np.errstate(over="ignore"):
                value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
            value.dtype = ir.DataType.FLOAT16
    return model


def graph(text: str = CHAIN) -> ir.Model:
    return halve_constants(ir.from_onnx_text(HEADER + text))


def feeds(**other: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": np.array([[1, 2, 3, 5]], np.float16), "shape": np.array([2, 1]), **other}


def prefill(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], ReferenceRun]:
    ids = np.arange(TOKENS) * 7 % checkpoint.config.vocab_size
    call = next(left_padded(Scenario("prefill", (ids,), (0,), (TOKENS,)).turns()))
    run = Reference(checkpoint.config, checkpoint.read).run([ids], keep_hidden=[0])[0]
    return call_feeds(checkpoint.config, "fp16", call), run


def test_run_nodes_returns_outputs_and_kept_values() -> None:
    results = run_nodes(graph(), feeds(), keep=["b"])
    np.testing.assert_array_equal(results["y"], np.array([[-1], [-1.5]], np.float16))
    np.testing.assert_array_equal(results["b"], np.array([[1, 1.5, 2, 3]], np.float16))
    assert results.keys() == {"y", "b"}
    assert results["y"].dtype == np.float16


def test_run_nodes_in_float32_promotes_values_constants_and_casts() -> None:
    bits = np.float16(0.0002).view(np.uint16)  # the text form of float16
    text = f"""
    g (float16[B,1] x) => (float16[B,1] y)
    <float[1] tiny = {{0.0001}}>
    {{
        a = Add(x, tiny)
        wide = Cast<to=1>(a)
        b = Cast<to=10>(wide)
        k = Constant<value = float16[1] {{{bits}}}>()
        y = Add(b, k)
    }}"""
    x = {"x": np.array([[1]], np.float16)}
    assert run_nodes(graph(text), x)["y"].tolist() == [[1.0]]  # both are below half a step of float16 at 1
    promoted = run_nodes(graph(text), x, float32=True)["y"]
    assert promoted.dtype == np.float32
    assert promoted[0, 0] == pytest.approx(1 + float(np.float16(0.0001)) + float(np.float16(0.0002)), abs=1e-7)


def test_observer_sees_the_dtype_of_the_graph_in_a_float32_run() -> None:
    seen: dict[str, tuple[ir.DataType, Any]] = {}
    run_nodes(graph(), feeds(), float32=True, observe=lambda node, value, dtype, array: seen.update({str(value.name): (dtype, array.dtype)}))
    assert seen == dict.fromkeys("abcdey", (ir.DataType.FLOAT16, np.float32))


def test_optional_input_may_be_left_out() -> None:
    model = graph("g (float[B,4] x, float high) => (float[B,4] y) { y = Clip(x, , high) }")
    result = run_nodes(model, {"x": np.array([[1, 9, 3, 4]], np.float32), "high": np.array(3.5, np.float32)})
    np.testing.assert_array_equal(result["y"], [[1, 3.5, 3, 3.5]])


def test_optional_output_may_be_left_out() -> None:
    model = graph("g (float[1,1,2] x, float[1,2,2] w, float[1,2,2] r) => (float[1,1,2] last) { all, last = RNN<hidden_size=2>(x, w, r) }")
    model.graph[0].outputs[0].name = ""
    weight = np.eye(2, dtype=np.float32)[None]
    result = run_nodes(model, {"x": np.array([[[1, 2]]], np.float32), "w": weight, "r": weight})
    np.testing.assert_allclose(result["last"], np.tanh([[[1, 2]]]), rtol=1e-6)


@pytest.mark.trace
@pytest.mark.parametrize("stage", ["traced"])
def test_float32_run_of_a_float16_graph_is_the_reference(sound_artifact: Path, checkpoint: Checkpoint, stage: str) -> None:
    inputs, reference = prefill(checkpoint)
    logits = run_nodes(ir.load(sound_artifact / f"{stage}.onnx"), inputs, float32=True)["logits"][0]
    assert np.abs(logits - reference.logits()).max() < 2e-3 * np.abs(reference.logits()).max()  # rotary tables are rounded to float16
    rounded = run_nodes(ir.load(sound_artifact / f"{stage}.onnx"), inputs)["logits"][0]
    assert np.abs(rounded - reference.logits()).mean() > 2 * np.abs(logits - reference.logits()).mean()


def layers(count: int) -> ir.Model:
    """``count`` times the same two nodes."""
    body = "\n".join(f"    m{i} = Mul(x{i}, two)\n    x{i + 1} = Add(m{i}, two)" for i in range(count))
    return graph(f"g (float16[B,4] x0) => (float16[B,4] x{count})\n<float[1] two = {{2.0}}>\n{{\n{body}\n}}")


def test_sessions_are_shared_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = NodeSessions._session

    def counted(self: NodeSessions, node: ir.Node, *rest: Any) -> Any:
        made.append(node.op_type)
        return make(self, node, *rest)

    monkeypatch.setattr(NodeSessions, "_session", counted)
    run_nodes(layers(9), {"x0": np.zeros((1, 4), np.float16)})
    assert made == ["Mul", "Add"]


def test_sessions_differ_where_attributes_or_dtypes_do() -> None:
    sessions = NodeSessions(graph())
    first, second = (ir.Node("", "Softmax", [None], [ir.AttrInt64("axis", axis)], num_outputs=1) for axis in (0, 1))
    for node in (first, second):
        node.outputs[0].name = "y"
    half, single = [(ir.DataType.FLOAT16, 2)], [(ir.DataType.FLOAT, 2)]
    made = [sessions.get(first, half), sessions.get(second, half), sessions.get(first, single), sessions.get(first, half)]
    assert len({id(session) for session in made}) == 3
    assert made[0] is made[3]


def test_values_are_freed_after_their_last_use() -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    counts: list[int] = []

    def observe(node: ir.Node, value: ir.Value, dtype: ir.DataType, array: np.ndarray) -> None:
        alive.append(weakref.ref(array))
        counts.append(sum(reference() is not None for reference in alive))

    run_nodes(layers(30), {"x0": np.zeros((1, 4), np.float16)}, observe=observe)
    assert max(counts) <= 3


def test_progress_is_told_the_layers() -> None:
    model = layers(2)
    for node, module in zip(model.graph, ("model", "model.layers.0", "model.layers.0.mlp", "model.layers.1"), strict=True):
        node.metadata_props["module"] = module
    told: list[tuple[str, int, int]] = []
    run_nodes(model, {"x0": np.zeros((1, 4), np.float16)}, progress=lambda what, done, total: told.append((what, done, total)))
    assert [done for _, done, _ in told] == [0, 1, 3, 4]
    assert "layer 1" in told[2][0]


def test_missing_feed_is_named() -> None:
    with pytest.raises(ValidationError, match="graph input shape is not fed; fed are x"):
        run_nodes(graph(), {"x": np.zeros((1, 4), np.float16)})


def test_feed_of_another_dtype_is_named() -> None:
    with pytest.raises(ValidationError, match="graph input x is FLOAT16, fed was float32"):
        run_nodes(graph(), feeds(x=np.zeros((1, 4), np.float32)))


def test_node_that_fails_on_its_inputs_is_named_with_their_shapes() -> None:
    model = graph()
    model.graph[4].name = "last"
    with pytest.raises(ValidationError, match=r"can't run last \(Reshape\) on float16\[1, 2\], int64\[2\]"):
        run_nodes(model, feeds(shape=np.array([7, 1])))


def test_node_that_cannot_be_run_alone_is_named() -> None:
    model = graph()
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(ValidationError, match=r"can't run \S+ \(NoSuchOperator\) alone"):
        run_nodes(model, feeds())


def external(folder: Path, *, size: int = 64, location: str = "w.bin") -> ir.Value:
    (folder / "w.bin").write_bytes(np.arange(size, dtype=np.float16).tobytes())
    tensor = ir.ExternalTensor(location, 8, 32, ir.DataType.FLOAT16, shape=ir.Shape([4, 4]), name="w", base_dir=folder)
    return ir.Value(name="w", const_value=tensor)


def test_external_weight_is_read_from_its_offset(tmp_path: Path) -> None:
    np.testing.assert_array_equal(load_constant(external(tmp_path)), np.arange(4, 20, dtype=np.float16).reshape(4, 4))


@pytest.mark.parametrize(
    ("options", "reason"), [({"size": 10}, "can't be read"), ({"location": "gone.bin"}, "gone.bin"), ({"location": "../w.bin"}, "outside")], ids=str
)
def test_external_weight_that_is_short_missing_or_outside_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason) as caught:
        load_constant(external(tmp_path, **options))
    assert "w: FLOAT16[4, 4] at byte 8" in str(caught.value)
    assert caught.value.hint


def test_levels_of_four_bits_are_dequantised_as_onnx_says() -> None:
    model = ir.from_onnx_text(
        HEADER
        + """
g (float16[B,4] x) => (float16[B,2] y)
{
    w = DequantizeLinear<axis=1, block_size=2>(levels, scale)
    t = Transpose<perm=[1,0]>(w)
    y = MatMul(x, t)
}"""
    )
    levels, scale = np.array([[-8, 7, 1, -1], [3, 0, -2, 5]], np.int8), np.array([[0.5, 2], [0.25, 1]], np.float16)
    tensors = {"levels": ir.tensor(levels, dtype=None).numpy().astype(ir.DataType.INT4.numpy()), "scale": scale}
    for value in model.graph[0].inputs:
        value.const_value = ir.tensor(tensors[value.name], name=value.name)
        model.graph.initializers.add(value)
    x = np.array([[1, 2, 3, 4]], np.float16)
    (y,) = run_nodes(model, {"x": x}).values()
    np.testing.assert_array_equal(y, x @ (levels * np.repeat(scale, 2, axis=1)).T)
