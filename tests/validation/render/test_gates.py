from __future__ import annotations

from typing import Any

import pytest

from validation.render.gates import METRICS, counts, failing, gate_of, gate_text, groups, value_text

COLUMNS = {column.key: column for column in METRICS}


def test_groups_come_in_the_order_they_are_checked(report: dict[str, Any]) -> None:
    names = [group.name for group in groups(report)]
    assert names == [
        "checksums", "reference", "traced", "fused", "int8", "fused-engine", "int8-engine",
        "audit of engines/a100-80gb-fp16/part-00.plan", "audit of engines/a100-80gb-int8/part-00.plan",
    ]  # fmt: skip


def test_failing_names_stage_layer_and_value(build_report: Any) -> None:
    ((stage, check),) = failing(build_report(broken_layer=15))
    assert (stage, check["check"], check["where"], check["value"]) == ("fused", "worst_local_ratio", "layer 15", 15.2)


def test_failing_checksum_is_a_check_with_its_tensor(report: dict[str, Any]) -> None:
    failed = {"file": "weights/layer-003.safetensors", "tensor": "model.layers.3.mlp.up_proj.weight", "expected": "ab" * 32, "got": "cd" * 32}
    report["checksums"] = {"verified": 271, "failed": [failed], "passed": False}
    ((group, check),) = failing(report)
    assert (group, check["where"]) == ("checksums", "weights/layer-003.safetensors model.layers.3.mlp.up_proj.weight")
    assert (check["value"], check["limit"]) == ("cdcdcdcdcdcd", "abababababab")


@pytest.mark.parametrize(
    "spoil", [lambda report: report["stages"][2], lambda report: report["checksums"], lambda report: report["engines"][0]["audit"]]
)
def test_failed_group_without_a_failed_check_still_fails(report: dict[str, Any], spoil: Any) -> None:
    spoil(report)["passed"] = False
    ((_, check),) = failing(report)
    assert check["check"] == "verdict"


def test_counts_hold_every_check_once(build_report: Any) -> None:
    report = build_report(broken_layer=3)
    report["stages"][0]["checks"][0]["passed"] = None
    total = 2 + sum(len(stage["checks"]) for stage in report["stages"]) + sum(len(engine["audit"]["checks"]) for engine in report["engines"])
    found = counts(report)
    assert (found[False], found[None], sum(found.values())) == (1, 1, total)


def test_gate_of_another_number_is_named(report: dict[str, Any]) -> None:
    stage = report["stages"][0]
    gate = gate_of(stage, COLUMNS["top1_agreement"])
    assert gate is not None
    assert gate_text(gate, COLUMNS["top1_agreement"]) == "decisive 0"
    assert gate_text(gate | {"value": 3}, COLUMNS["top1_agreement"]) == "decisive 3"
    engine = report["stages"][3]
    gate = gate_of(engine, COLUMNS["max_abs"])
    assert gate is not None
    assert gate_text(gate, COLUMNS["max_abs"]) == "stage 0.000400 ≤ 0.00195"
    relative = {"check": "max_abs_relative", "value": 3.1e-6, "limit": 1e-4, "comparison": "<=", "passed": True}
    assert gate_text(relative, COLUMNS["max_abs"]) == "relative 3.10e-6 ≤ 0.0001"


def test_value_gets_the_digits_its_gate_needs(report: dict[str, Any]) -> None:
    stage = report["stages"][0] | {"noise_ratio": 1.0004}
    assert value_text(stage, COLUMNS["noise_ratio"]) == "1.0004"
    assert value_text(stage | {"checks": []}, COLUMNS["noise_ratio"]) == "1.00"


def test_report_without_optional_parts_has_no_groups() -> None:
    assert groups({"stages": [], "engines": None, "checksums": None}) == []
