from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import ValidationError
from validation import engines
from validation.engines import engine_entries, plans_not_run


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


def test_plans_are_not_run_and_the_reason_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"folder": "a100-80gb-fp16", "file": "part-00.plan"}, {"folder": "a100-80gb-fp16", "file": "part-01.plan"}]
    monkeypatch.setattr(engines, "GPU_DEVICE", tmp_path / "absent")
    (entry,) = plans_not_run(found)
    assert entry["stage"] == "engine a100-80gb-fp16"
    assert entry["reason"].startswith("no GPU")
    monkeypatch.setattr(engines, "GPU_DEVICE", tmp_path)
    assert "not run by this version" in plans_not_run(found)[0]["reason"]


@pytest.mark.parametrize("record", ["{", {}, [], {"engines": [{}]}, {"engines": 3}])
def test_a_record_that_cannot_be_read_is_an_error(record: Any, tmp_path: Path) -> None:
    write_record(tmp_path, "a100-80gb-fp16", record)
    with pytest.raises(ValidationError, match=r"build\.json can't be read"):
        engine_entries(tmp_path)


def test_an_artifact_without_engines_has_none(tmp_path: Path) -> None:
    assert engine_entries(tmp_path) == []
    assert plans_not_run([]) == []
