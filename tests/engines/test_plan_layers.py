"""engines/plan_layers.py, on real plans: which kernel belongs to which layer, what it does, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from engines.plan_layers import Launch, PlanReader, describe, layers_of
from engines.plan_program import Kernel, Program, read_programs

Built = Callable[..., tuple[Any, Path]]
DECODE = ["norm", "gemm", "cache", "rotary", "attention", "gemm", "norm", "gemm", "pointwise", "gemm"]
PREFILL = ["norm", "gemm", "cache", "rotary", "attention", "copy", "gemm", "norm", "gemm", "pointwise", "gemm"]


@pytest.fixture(scope="module")
def launches(built: Built) -> list[list[Launch]]:
    """Of three layers, by profile."""
    stage, plan = built(3)
    reader = PlanReader(ir.load(stage.engine_graph).graph, stage.config)
    return [reader.launches(program) for program in read_programs(plan)]


def test_layers_hold_their_kernels_in_order(launches: list[list[Launch]]) -> None:
    for found, expected in zip(launches, (PREFILL, DECODE), strict=True):
        assert layers_of(found) == [0, 1, 2]
        assert [launch.kind for launch in found if launch.layer == 1] == expected
        # layer 0 looks the rotary tables up, in one kernel for query, key and value
        assert [launch.kind for launch in found if launch.layer == 0] == [kind for kind in expected if kind != "rotary"]


def test_outside_are_the_mask_the_last_norm_and_lm_head(launches: list[list[Launch]]) -> None:
    for found in launches:
        outside = [launch for launch in found if launch.layer is None]
        assert [launch.kind for launch in outside] == ["pointwise", "norm", "pointwise", "gemm"]
        assert outside[-1].writes == ("logits",)


def test_says_what_is_written_of_the_cache(launches: list[list[Launch]]) -> None:
    prefill, decode = ([launch.writes for launch in found if launch.kind == "cache"] for found in launches)
    assert decode == [("present key", "present value")] * 3
    assert prefill == [("copied keys or values", "copied keys or values", "present key", "present value")] * 3


@pytest.mark.parametrize(("precision", "weight"), [("fp16", "half"), ("int8", "int8")])
def test_says_the_type_of_a_gemms_weight(built: Built, precision: str, weight: str) -> None:
    stage, plan = built(2, precision)
    reader = PlanReader(ir.load(stage.engine_graph).graph, stage.config)
    for program in read_programs(plan):
        found = [launch.weight for launch in reader.launches(program) if launch.kind == "gemm"]
        assert found == [weight] * 8 + ["half"]  # lm_head stays float16


def test_attention_in_pieces_is_seen_as_such(built: Built) -> None:
    stage, plan = built(2, "fp16", attention="grouped")
    reader = PlanReader(ir.load(stage.engine_graph).graph, stage.config)
    decode = [launch for launch in reader.launches(read_programs(plan)[1]) if launch.layer == 1]
    assert [launch.kind for launch in decode if launch.kind in ("product", "softmax", "attention")] == ["product", "softmax", "product"]
    assert {launch.kind for launch in decode if "scores" in launch.writes} == {"product", "softmax", "copy"}


def test_layers_alike_stand_together(launches: list[list[Launch]]) -> None:
    folded = describe(launches[1])["layers"]
    assert [(group["first"], group["last"]) for group in folded] == [(0, 0), (1, 1), (2, 2)]  # the last one's residual goes with the final norm
    many = [
        Launch(launch.kernel, layer, launch.kind, launch.weight, launch.writes) for layer in range(5) for launch in launches[1] if launch.layer == 1
    ]
    (group,) = describe(many)["layers"]
    assert (group["first"], group["last"], len(group["kernels"])) == (0, 4, len(DECODE))


def program_of(*labels: tuple[str, ...]) -> Program:
    return Program(0, tuple(Kernel(f"__myl_Mul{number}", names, ()) for number, names in enumerate(labels)), ())


def test_a_kernel_belongs_to_most_of_its_nodes_and_else_to_the_later(built: Built) -> None:
    stage, _ = built(3)
    reader = PlanReader(ir.load(stage.engine_graph).graph, stage.config)
    program = program_of(
        ("node_l0_out", "node_l1_norm1"),  # one node each
        ("node_l0_down", "node_l0_out", "node_l1_norm1"),
        ("node_l2_out", "node_normed"),  # the final norm stands behind all layers
        ("node_mask", "node_visible", "node_l0_attention"),
        ("a name that is not the graph's",),
    )
    assert [launch.layer for launch in reader.launches(program)] == [1, 0, None, None, None]


@pytest.mark.parametrize(
    ("name", "layer"),
    [("/model/layers.3/self_attn/MatMul", 3), ("model.layers.12.mlp", 12), ("h.7.attn", 7), ("/model/norm", None), ("MatMul_31", None)],
)
def test_a_graph_of_others_says_the_layer_in_its_names(built: Built, name: str, layer: int | None) -> None:
    stage, _ = built(3)
    graph = ir.from_onnx_text('<ir_version: 11, opset_import: ["" : 23]>\ng (float[2] x) => (float[2] y)\n{ y = Relu(x) }').graph
    graph[0].name = name
    (launch,) = PlanReader(graph, stage.config).launches(program_of((name,)))
    assert launch.layer == layer
