"""``validate --graph`` from the command line: exit codes, the report on stdout, and options that don't go together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import cli
from artifact.errors import ToolkitError
from commands.graphs import fuse_file

ROOT = Path(__file__).resolve().parents[2]
PINNED = ROOT / "tests" / "graphs" / "foreign" / "pinned"
CHECKPOINT = PINNED / "checkpoint"


@pytest.fixture
def validate(tmp_path, monkeypatch):
    """Run the command in this process; its exit code must be the expected one. Returns stdout, or what it says on stderr."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, ["validate", *map(str, arguments)], env={"COLUMNS": "200"})
        error = result.exception if isinstance(result.exception, ToolkitError) else None
        assert (error.exit_code if error else result.exit_code) == code, result.output
        return str(error) if error else result.stdout if code in (0, 3) else result.output

    return run


def test_fuse_and_validate_a_foreign_graph(validate, tmp_path) -> None:
    fused = tmp_path / "fused.onnx"
    fuse_file(PINNED / "optimum-18.onnx", fused)
    report = json.loads(validate("--graph", fused, "--checkpoint", CHECKPOINT, "--json"))
    assert report["passed"] is True
    assert [stage["stage"] for stage in report["stages"]] == ["fused.onnx"]
    assert (tmp_path / "reports" / "fused" / "parity.html").is_file()


def test_a_graph_that_does_not_match_ends_with_3(validate, tmp_path) -> None:
    model = ir.load(PINNED / "optimum-18.onnx")
    norm = next(value for name, value in model.graph.initializers.items() if name.endswith("model.norm.weight"))
    norm.const_value = ir.tensor(norm.const_value.numpy() * np.float32(1.01), name=norm.name)
    ir.save(model, tmp_path / "damaged.onnx")
    shown = validate("--graph", tmp_path / "damaged.onnx", "--checkpoint", CHECKPOINT, "--out", tmp_path / "here", code=3)
    assert "failed: 4 of 4 scenarios ran whole — damaged.onnx does not match: max_abs_relative" in shown
    assert "judged as float32: caches and logits are 9 float32" in shown
    assert (tmp_path / "here" / "parity.xml").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give an artifact folder, or --graph FILE and --checkpoint SRC"),
        (("artifact", "--graph", "model.onnx"), "give an artifact folder, or --graph FILE and --checkpoint SRC"),
        (("artifact", "--out", "folder"), "give an artifact folder, or --graph FILE and --checkpoint SRC"),
        (("--graph", PINNED / "optimum-18.onnx"), "--graph FILE is checked against a checkpoint"),
        (("--graph", PINNED / "optimum-18.onnx", "--checkpoint", CHECKPOINT, "--stage", "fused"), "is its only stage"),
        (("--graph", PINNED / "optimum-18.onnx", "--checkpoint", CHECKPOINT, "--device", "cuda"), "against a checkpoint on the CPU"),
        (("--graph", PINNED / "optimum-18.onnx", "--checkpoint", PINNED / "checkpoint-32"), "head_dim is 32, the graph's 8"),
    ],
)
def test_options_that_contradict_each_other_are_usage_errors(validate, arguments, said) -> None:
    assert said in " ".join(validate(*arguments, code=2).replace("│", "").split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--graph", "nowhere.onnx", "--checkpoint", CHECKPOINT), "there is no file nowhere.onnx"),
        (("--graph", PINNED / "optimum-18.onnx", "--checkpoint", "nowhere.gguf"), "nowhere.gguf"),
        (("--graph", PINNED / "optimum-18.onnx", "--checkpoint", CHECKPOINT, "--text", "nowhere.txt"), "nowhere.txt is not a file"),
        (("--graph", PINNED / "optimum-18.onnx", "--checkpoint", CHECKPOINT, "--text", __file__), "has no tokenizer.json, so"),
    ],
)
def test_bad_input_is_one_error(validate, arguments, said) -> None:
    assert said in validate(*arguments, code=1)
