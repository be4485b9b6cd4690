"""engines/static_checks.py and the limits of a static cache, on real plans: what is right passes, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.progress import silent
from engines.audit import audit_plan
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.plan_program import Program, read_programs
from engines.profiles import make_profiles
from engines.static_checks import static_checks
from engines.targets import find_target

Built = Callable[..., tuple[Any, Path]]
PROFILES = ["prefill", "decode"]


def failures(stage: Any, plan: Path, graph: Path) -> list[str]:
    audit = audit_plan(plan, graph, precision="fp16", profiles=PROFILES, config=stage.config)["audit"]
    return [f"{check['check']}: {check['value']}" for check in audit["checks"] if check["passed"] is False]


def verdicts(programs: list[Program], layers: int) -> list[bool]:
    return [check["passed"] for check in static_checks(programs, PROFILES, range(layers))]


def test_a_mask_that_all_layers_share_belongs_to_none(built: Built) -> None:
    """Seven kernels in prefill and a cast in decode make of the lengths what every layer reads."""
    stage, plan = built(2, kv_cache="static")
    result = audit_plan(plan, stage.engine_graph, precision="fp16", profiles=PROFILES, config=stage.config)
    assert [len(group["kernels"]) for group in result["kernels_by_layer"]["prefill"]["layers"]] == [12, 12]
    assert [len(group["kernels"]) for group in result["kernels_by_layer"]["decode"]["layers"]] == [9, 9]
    assert [kernel["kind"] for kernel in result["kernels_by_layer"]["decode"]["outside"]].count("cast") == 1
    assert failures(stage, plan, stage.engine_graph) == []


def test_grouped_keys_and_values_without_their_reshape_are_repeated(built: Built, tmp_path: Path, make_stage: Callable[..., Any]) -> None:
    stage = make_stage(tmp_path, 1, "fp16", kv_cache="static")
    model = ir.load(stage.engine_graph)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        for index in (1, 2):
            node.replace_input_with(index, node.inputs[index].producer().inputs[0])
    ir.save(model, tmp_path / "direct.onnx")
    profiles = make_profiles(stage.config, "fp16", "static", max_batch=2, max_length=128)
    request = BuildRequest(tmp_path / "direct.onnx", tmp_path / "direct.plan", find_target("a100"), tuple(profiles))
    TensorRTRTX().build(request, silent)
    assert "repeated_caches_per_layer_prefill: 2" in failures(stage, tmp_path / "direct.plan", tmp_path / "direct.onnx")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda program: program, [True] * 4),
        (lambda program: replace(program, inputs=tuple(name for name in program.inputs if "lengths" not in name)), [False, True] * 2),
        (lambda program: replace(program, outputs=tuple(name for name in program.outputs if "0.key" not in name)), [True, False] * 2),
        (lambda program: replace(program, inputs=tuple(name.replace("present", "past") for name in program.inputs)), [True, False] * 2),
        (lambda program: replace(program, profile=program.profile + 1), [False, False, True, True]),
    ],
    ids=["sound", "no-lengths", "no-output", "two-buffers", "no-such-profile"],
)
def test_each_profile_reads_lengths_and_writes_in_place(built: Built, edit: Callable[[Program], Program], expected: list[bool]) -> None:
    _, plan = built(1, kv_cache="static")
    assert verdicts([edit(program) for program in read_programs(plan)], 1) == expected
