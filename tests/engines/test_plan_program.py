"""engines/plan_program.py, on real plans: kernels are counted by launch, not by how often a name stands in the bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import EngineError
from engines.plan_program import interface_name, parse_program, read_programs

Built = Callable[..., tuple[Any, Path]]


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_counts_one_attention_kernel_a_layer_and_profile(built: Built, layers: int) -> None:
    _, plan = built(layers)
    prefill, decode = read_programs(plan)
    counts = [Counter(kernel.name for kernel in program.kernels) for program in (prefill, decode)]
    assert [count["_gemm_mha_v2"] for count in counts] == [layers, 0]
    assert [count["_gemv_mha_v1"] for count in counts] == [0, layers]
    attention = [kernel.layers for kernel in decode.kernels if kernel.name == "_gemv_mha_v1"]
    assert sorted(attention) == [(f"node_l{i}_attention",) for i in range(layers)]


def test_a_name_stands_more_often_than_its_kernel_runs(built: Built) -> None:
    _, plan = built(2)
    content = plan.read_bytes()
    assert len(re.findall(rb"_gemv_mha_v1", content)) > 2
    assert len(re.findall(rb"_gemm_mha_v2", content)) > 2


def test_profiles_share_their_constants(built: Built) -> None:
    _, plan = built(2)
    prefill, decode = read_programs(plan)
    large = [{constant.index for constant in program.constants if constant.size_bytes > 10_000} for program in (prefill, decode)]
    assert large[0] == large[1]
    assert len(large[0]) == 1 + 2 * 4 + 2  # the tied embedding, four linears a layer, cos and sin


def test_every_gemm_reads_its_weight(built: Built) -> None:
    stage, plan = built(2)
    sizes = {"qkv": 512 * 256, "o": 256 * 256, "gate_up": 768 * 256, "down": 256 * 384}
    for program in read_programs(plan):
        for layer in range(stage.config.num_hidden_layers):
            for name, parameters in sizes.items():
                kernels = [kernel for kernel in program.kernels if f"node_l{layer}_{name}" in kernel.layers]
                assert [sum(c.size_bytes for c in kernel.constants if c.size_bytes > 100) for kernel in kernels] == [2 * parameters]


TEXT = """header {
  version = 5
  inputs={ "input_ids [profile 1].1" }
}
descriptors {
  tensor={ alignment=128 const_payload_size=1152 dims={ 576 } name="__c1" offset=18 rank0=0 region=__mye1-consts strides={ 1 } type=half }
  tensor={ alignment=128 dims={ 1 } name="__x" offset=18 rank0=0 region="devmem" strides={ 1 } type=half }
  sub_tensor={ base="__c1" const_offset=0 dims={ 576 } name="__c1^deref" offset=0 type=half }
}
main {
 label bb1:
  function={ name=_gemv_mha_v1 fqn=_gemv_mha_v1_0x12 args={ "__x" } layers="[ONNX Layer: a]\x1f[ONNX Layer: b]" }
  fully_connected={ name="c" input={"__x" "__c1^deref" } layers="[ONNX Layer: c]" }
  assert={ name=check msg="function={ name=_gemv_mha_v1" }
  copy={ name="copy" output={"_gemv_mha_v1" } }
}
"""


def test_parses_profile_layers_and_constants_through_views() -> None:
    program = parse_program(TEXT)
    assert program.profile == 1
    assert [(kernel.name, kernel.layers) for kernel in program.kernels] == [("_gemv_mha_v1", ("a", "b")), ("fully_connected", ("c",))]
    assert [(c.index, c.size_bytes, c.dtype) for c in program.kernels[1].constants] == [(18, 1152, "half")]
    assert not program.kernels[0].constants


def test_refuses_what_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_bytes(b"header {\n  version = 5\n" * 1000)
    with pytest.raises(EngineError, match="holds no program"):
        read_programs(tmp_path / "x.plan")
    (tmp_path / "empty.plan").touch()
    with pytest.raises(EngineError, match="not there, or empty"):
        read_programs(tmp_path / "empty.plan")


def test_refuses_a_plan_that_is_cut_off(built: Built, tmp_path: Path) -> None:
    _, plan = built(1)
    content = plan.read_bytes()
    cut = tmp_path / "cut.plan"
    cut.write_bytes(content[: content.find(b"header {\n  version = 5") + 1000])
    with pytest.raises(EngineError, match="cut off"):
        read_programs(cut)


def test_says_what_is_read_and_written_at_the_callers_addresses(built: Built) -> None:
    for form, past in (("dynamic", "past_key_values"), ("static", "present")):
        _, plan = built(1, **({"kv_cache": "static"} if form == "static" else {}))
        for program in read_programs(plan):
            inputs, outputs = ({interface_name(name) for name in names} for names in (program.inputs, program.outputs))
            assert {"input_ids", "position_ids", f"{past}.0.key", f"{past}.0.value"} <= inputs
            assert {"present.0.key", "present.0.value"} <= outputs
