from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import ValidationError
from engines.device import Device
from validation.engines import NOT_ASKED, engine_entries, split_engines


def write_record(artifact: Path, folder: str, record: Any) -> None:
    path = artifact / "engines" / folder / "build.json"
    path.parent.mkdir(parents=True)
    path.write_text(record if isinstance(record, str) else json.dumps(record))


def test_engine_entries_are_those_of_every_build(tmp_path: Path) -> None:
    write_record(tmp_path, "a100-80gb-fp16", {"engines": [{"file": "part-00.plan"}, {"file": "part-01.plan", "bytes": 7}]})
    write_record(tmp_path, "a100-80gb-int8", {"engines": [{"file": "part-00.plan", "audit": {"passed": True}}]})
    entries = engine_entries(tmp_path)
    assert [(entry["folder"], entry["file"]) for entry in entries] == [
        ("a100-80gb-fp16", "part-00.plan"),
        ("a100-80gb-fp16", "part-01.plan"),
        ("a100-80gb-int8", "part-00.plan"),
    ]


A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30)
ENTRY = {"folder": "a100-80gb-fp16", "file": "engines/a100-80gb-fp16/part-00.plan", "compute_capability": "8.0", "target": "a100-80gb"}


def test_plans_are_not_run_unless_they_are_asked_for(tmp_path: Path) -> None:
    reason = f"{NOT_ASKED}; the plan's ONNX graph was checked instead"
    assert split_engines(tmp_path, [ENTRY], None) == ([], [{"stage": "engine a100-80gb-fp16", "reason": reason}])


def test_plans_are_not_run_without_a_gpu_and_the_reason_is_the_machines(tmp_path: Path) -> None:
    runnable, (other,) = split_engines(tmp_path, [ENTRY], "no NVIDIA driver here: libcuda.so.1")
    assert runnable == []
    assert other["reason"] == "no NVIDIA driver here: libcuda.so.1; the plan's ONNX graph was checked instead"


def test_plans_that_cannot_run_here_say_why_each_for_itself(tmp_path: Path) -> None:
    other_gpu = ENTRY | {"folder": "l4-fp16", "file": "engines/l4-fp16/part-00.plan", "target": "l4", "compute_capability": "8.9"}
    runnable, others = split_engines(tmp_path, [ENTRY, other_gpu], A100)
    assert runnable == []
    assert [other["stage"] for other in others] == ["engine a100-80gb-fp16", "engine l4-fp16"]
    assert "part-00.plan is not there" in others[0]["reason"]
    assert "built for compute capability 8.9 (l4), this GPU (NVIDIA A100-SXM4-80GB) has 8.0" in others[1]["reason"]


@pytest.mark.parametrize("record", ["{", {}, [], {"engines": [{}]}, {"engines": 3}])
def test_a_record_that_cannot_be_read_is_an_error(record: Any, tmp_path: Path) -> None:
    write_record(tmp_path, "a100-80gb-fp16", record)
    with pytest.raises(ValidationError, match=r"build\.json can't be read"):
        engine_entries(tmp_path)


def test_an_artifact_without_engines_has_none(tmp_path: Path) -> None:
    assert engine_entries(tmp_path) == []
    assert split_engines(tmp_path, [], A100) == ([], [])
