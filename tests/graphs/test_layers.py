"""Operators by layer: alike layers together, others apart, by module names or by norms; and which TensorRT release a graph needs."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from artifact.errors import UsageError
from artifact.layout import MODULE_KEY
from graphs import tensorrt_releases
from graphs.fusions._values import in_module
from graphs.layers import layer_operators
from graphs.tensorrt_releases import EARLIER, LATER, RELEASES, check_release, first_release, needed_release, takes


def layered(*modules: tuple[str, str]) -> ir.Model:
    """A chain of nodes, each of an operator and a module."""
    text = " ".join(f"v{index} = {op_type}(v{index - 1})" for index, (op_type, _) in enumerate(modules, start=1))
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 23]> g (float[B] v0) => (float[B] v{len(modules)}) {{ {text} }}')
    for node, (_, module) in zip(model.graph, modules, strict=True):
        in_module(node.outputs[0], module)
    return model


def test_alike_layers_are_together_and_others_apart() -> None:
    layers = [("Neg", "Abs"), ("Neg", "Abs"), ("Neg", "Exp"), ("Neg", "Abs"), ("Neg", "Abs")]
    nodes = [(op_type, f"model.layers.{layer}.mlp") for layer, pair in enumerate(layers) for op_type in pair]
    found = layer_operators(layered(("Cos", "model"), *nodes, ("Sin", "lm_head")))
    assert found.groups == (((0, 1, 3, 4), {"Neg": 1, "Abs": 1}), ((2,), {"Neg": 1, "Exp": 1}))
    assert found.outside == {"Cos": 1, "Sin": 1}
    assert found.known_by == "module names"
    assert found.lines() == ["layers 0–1, 3–4 (4 alike): Neg 1, Abs 1", "layer 2: Neg 1, Exp 1", "outside layers: Cos 1, Sin 1"]
    assert found.as_json()["groups"][1] == {"layers": [2], "operators": {"Neg": 1, "Exp": 1}}


def test_order_of_operators_does_not_make_layers_differ() -> None:
    nodes = [("Neg", "model.layers.0"), ("Abs", "model.layers.0"), ("Abs", "model.layers.1"), ("Neg", "model.layers.1")]
    assert [layers for layers, _ in layer_operators(layered(*nodes)).groups] == [(0, 1)]


def graph_of(*op_types: str, domain: str = "") -> list[ir.Node]:
    return [ir.Node(domain, op_type, []) for op_type in op_types]


@pytest.mark.parametrize(
    ("op_types", "release", "because"),
    [
        (("MatMul", "Softmax"), "10.0", ()),
        (("MatMul", "Attention"), "10.14", ("Attention",)),
        (("Attention", "RotaryEmbedding", "RMSNormalization"), "10.15", ("RMSNormalization", "RotaryEmbedding")),
        (("TensorScatter", "Swish"), "11.0", ("Swish",)),
    ],
)
def test_the_latest_operator_decides_the_release(op_types, release, because) -> None:
    need = needed_release(graph_of(*op_types))
    assert (need.release, need.because) == (release, because)
    assert f"TensorRT ≥ {release}" in need.words
    assert all(op_type in need.words for op_type in because)


def test_what_no_release_takes_is_named() -> None:
    need = needed_release([*graph_of("MatMul", "MatMulInteger"), *graph_of("GroupQueryAttention", domain="com.microsoft")])
    assert need.release is None
    assert need.words == "no known TensorRT release takes MatMulInteger, com.microsoft::GroupQueryAttention"


def test_the_table_names_operators_of_onnx_and_known_releases() -> None:
    import onnx

    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(LATER) - known == set()
    assert EARLIER - known <= {"Scatter", "Upsample"}  # withdrawn from ONNX
    assert set(LATER.values()) <= set(RELEASES)
    assert not EARLIER & LATER.keys()


def test_releases_are_in_order_of_time_not_of_text() -> None:
    assert takes("10.14", "Attention")
    assert not takes("10.9", "Attention")
    assert takes("11.0", "RotaryEmbedding")
    assert not takes("10.14", "RotaryEmbedding")
    assert not takes("11.5", "MatMulInteger")
    assert first_release("MatMul", "ai.onnx") == tensorrt_releases.OLDEST


@pytest.mark.parametrize("release", ["9.3", "10", "10.99", "newest", ""])
def test_unknown_release_is_refused_with_the_known_ones(release) -> None:
    with pytest.raises(UsageError, match=r"is not a release that this version knows; it knows: 10\.0, 10\.1, .*11\.5"):
        check_release(release)


def test_module_key_is_what_layers_are_read_from() -> None:
    model = layered(("Neg", "model.layers.0"))
    next(iter(model.graph)).metadata_props[MODULE_KEY] = "model.layers.7.mlp"
    assert layer_operators(model).lines()[0] == "layer 7: Neg 1"
