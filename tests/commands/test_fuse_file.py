"""`fuse --graph FILE --out FILE`, as a user types it: what is printed and how it ends."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

Fuse = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
PINNED = ROOT / "tests" / "graphs" / "foreign" / "pinned"
KEYS = {"nodes_before", "nodes_after", "rules", "passed", "source", "out", "model", "opset_before", "weights_bytes", "nothing_to_do"}


@pytest.fixture
def fuse(run_cli: Fuse) -> Fuse:
    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = run_cli("fuse", *arguments, code=code)
        assert "Traceback" not in result.stderr
        return result

    return run


def test_json_is_the_fusion_report(tmp_path: Path, fuse: Fuse) -> None:
    out = tmp_path / "fused.onnx"
    report = json.loads(fuse("--graph", PINNED / "optimum-18.onnx", "--out", out, "--json").stdout)
    assert report.keys() >= KEYS
    assert [(rule["rule"], rule["fired"], rule["expected"]) for rule in report["rules"]][:3] == [
        ("rms_norm", 5, 5),
        ("rotary", 4, 4),
        ("attention", 2, 2),
    ]
    assert set(report["rules"][-1]["refused"][0]) == {"node", "reason"}
    assert out.is_file()


def test_a_person_sees_the_rules(tmp_path: Path, fuse: Fuse) -> None:
    out = tmp_path / "fused.onnx"
    shown = fuse("--graph", PINNED / "optimum-18.onnx", "--out", out).stdout
    assert "fused.onnx:621→116nodes" in "".join(shown.split())
    assert "5 of 5" in shown
    assert "layers 0–1 (2 alike): RMSNormalization 2" in shown
    assert "needs TensorRT ≥ 10.15 because of RMSNormalization, RotaryEmbedding" in shown


def test_an_older_release_is_served_and_an_unknown_one_is_a_usage_error(tmp_path: Path, fuse: Fuse) -> None:
    arguments = ("--graph", PINNED / "optimum-18.onnx", "--out", tmp_path / "fused.onnx", "--min-tensorrt")
    shown = fuse(*arguments, "10.0").stdout
    assert "needs TensorRT ≥ 10.0; written in older operators: RMSNormalization 5, RotaryEmbedding 4, Attention 2" in shown
    assert "it knows: 10.0, 10.1, " in fuse(*arguments, "9.3", code=2).stderr


def test_a_graph_that_is_fused_already_says_so(tmp_path: Path, fuse: Fuse) -> None:
    arguments = ("--graph", PINNED / "genai.onnx", "--out", tmp_path / "out.onnx")
    shown = fuse(*arguments).stdout
    assert "nothing to do: attention is com.microsoft::GroupQueryAttention already" in shown
    assert "no known TensorRT release takes SimplifiedLayerNormalization, com.microsoft::GroupQueryAttention" in shown
    assert json.loads(fuse(*arguments, "--json").stdout)["rules"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [(), ("artifact", "--graph", "a.onnx", "--out", "b.onnx"), ("--graph", "a.onnx"), ("--out", "b.onnx"), ("artifact", "--out", "b.onnx")],
)
def test_an_artifact_and_a_graph_or_neither_is_a_usage_error(arguments: tuple[str, ...], fuse: Fuse) -> None:
    assert "give an artifact folder, or --graph FILE and --out FILE" in " ".join(fuse(*arguments, code=2).stderr.replace("│", "").split())


def test_bad_input_is_one_error_line(tmp_path: Path, fuse: Fuse) -> None:
    (tmp_path / "page.onnx").write_text("<html>")
    lines = fuse("--graph", tmp_path / "page.onnx", "--out", tmp_path / "out.onnx", code=1).stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [line for line in lines if "page.onnx is not a readable ONNX file" in line] != []


def test_partial_fusion_ends_with_3_unless_it_is_allowed(tmp_path: Path, fuse: Fuse) -> None:
    model = ir.load(PINNED / "dynamo-18-eager-float32.onnx")
    next(node for node in model.graph if node.op_type == "Softmax").attributes["axis"] = ir.AttrInt64("axis", 2)
    ir.save(model, tmp_path / "spoiled.onnx")
    arguments = ("--graph", tmp_path / "spoiled.onnx", "--out", tmp_path / "out.onnx")
    result = fuse(*arguments, code=3)
    assert "fusion attention fired 1 times, expected 2" in result.stderr
    assert "--allow-partial" in result.stderr
    assert not (tmp_path / "out.onnx").exists()
    assert json.loads(fuse(*arguments, "--allow-partial", "--json").stdout)["passed"] is False
    assert (tmp_path / "out.onnx").is_file()
