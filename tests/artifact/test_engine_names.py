"""artifact/engine_names.py: names go out and come back."""

from __future__ import annotations

import json

import pytest

from artifact.engine_names import Bucket, bucket_of, built_from, engine_folder, engine_graph, has_gemv, is_engine, is_part, part_graph_name, stage_of


@pytest.mark.parametrize(
    ("name", "stage", "bucket"),
    [("fused", "fused", 0), ("fused-engine", "fused", 0), ("int8-smoothquant-engine-c512", "int8-smoothquant", 512), ("engine", "engine", 0)],
)
def test_a_graphs_stage_and_bucket_are_in_its_name(name: str, stage: str, bucket: int) -> None:
    assert (stage_of(name), bucket_of(name), is_engine(name)) == (stage, bucket, name != stage)


def test_one_capacity_stands_in_no_name_and_one_of_several_does() -> None:
    assert (engine_graph("int8"), engine_graph("int8", 512), engine_graph("int8", Bucket(512))) == (
        "int8-engine.onnx",
        "int8-engine.onnx",
        "int8-engine-c512.onnx",
    )
    assert engine_folder("l4", "fp16", 512) == "engines/l4-fp16"
    assert engine_folder("l4", "fp16", Bucket(512)) == "engines/l4-fp16-c512"
    assert json.dumps({"capacity": Bucket(512)}) == '{"capacity": 512}'
    assert f"{Bucket(512)}" == "512"


@pytest.mark.parametrize(("capacity", "suffix", "bucket"), [(None, "", 0), (512, "", 0), (Bucket(512), "-c512", 512)])
def test_the_form_of_decode_stands_in_the_graphs_name(capacity: int | None, suffix: str, bucket: int) -> None:
    graph = engine_graph("fused", capacity, gemv=True)
    assert graph == f"fused-engine-gemv{suffix}.onnx"
    name = graph.removesuffix(".onnx")
    assert (has_gemv(name), is_engine(name), stage_of(name), bucket_of(name), built_from(graph)) == (True, True, "fused", bucket, "fused")
    assert not has_gemv(engine_graph("fused", capacity).removesuffix(".onnx"))
    assert not has_gemv("fused-gemv")


@pytest.mark.parametrize(("graph", "stage"), [("fused-engine.onnx", "fused"), ("int8-engine-c512.onnx", "int8")])
def test_a_part_has_its_layers_in_its_name(graph: str, stage: str) -> None:
    names = [part_graph_name(graph, layers) for layers in ((0, 19), (0, 39), (100, 125))]
    assert names[0] == graph.replace(".onnx", "-layers-00-19.onnx")
    assert len({*names, graph}) == 4
    for name in names:
        assert (is_part(name.removesuffix(".onnx")), is_engine(name.removesuffix(".onnx")), built_from(name)) == (True, False, stage)
    assert not is_part(graph.removesuffix(".onnx"))
    assert not is_part("fused-layers-00-19")
