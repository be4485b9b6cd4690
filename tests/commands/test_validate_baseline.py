"""``validate --baseline`` from the command line: exit codes, before anything is measured and after."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli
from artifact.errors import ToolkitError

PINNED = Path(__file__).resolve().parents[2] / "tests" / "graphs" / "foreign" / "pinned"
Run = Callable[..., str]


@pytest.fixture
def validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Validate a pinned graph with --json; its exit code must be the expected one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object, code: int = 0) -> str:
        command = ["validate", "--graph", PINNED / "optimum-18.onnx", "--checkpoint", PINNED / "checkpoint", "--out", tmp_path / "r", "--json"]
        result = CliRunner().invoke(cli.app, [*map(str, command), *map(str, arguments)])
        error = result.exception if isinstance(result.exception, ToolkitError) else None
        assert (error.exit_code if error else result.exit_code) == code, result.output
        return str(error) if error else result.stdout

    return run


@pytest.mark.parity
def test_validate_against_a_baseline_ends_with_0_or_3(validate: Run, tmp_path: Path) -> None:
    report: dict[str, Any] = json.loads(validate())
    old = tmp_path / "old.json"
    old.write_bytes((tmp_path / "r" / "parity.json").read_bytes())
    again = json.loads(validate("--baseline", old))
    assert (again["passed"], again["baseline"]["passed"], again["baseline"]["file"]) == (True, True, "old.json")
    report["stages"][0] |= {"cache_error": report["stages"][0]["cache_error"] - 1e-4}
    old.write_text(json.dumps(report))
    worse = json.loads(validate("--baseline", old, code=3))
    assert worse["verdict"].endswith("worse than the baseline")
    assert worse["headline"] == f"worse than the baseline: {worse['baseline']['words']}"
    assert "optimum-18.onnx cache_error" in worse["headline"]


def test_a_baseline_of_another_model_is_refused_before_anything_is_measured(validate: Run, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    keys = ("created", "texts", "stages", "not_run", "engines", "tolerances", "versions", "machine")
    old.write_text(json.dumps({"schema": 2, "model": {"fingerprint": "other"}} | dict.fromkeys(keys, ())))
    assert "another checkpoint: there other, here " in validate("--baseline", old, code=1)
    assert not (tmp_path / "r").exists()
