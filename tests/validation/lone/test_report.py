"""Graphs of other exporters pass, what can't be asked of them is said, and a damaged one is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from artifact.errors import UsageError
from artifact.hashing import sha256_of
from exporter.checkpoints import open_checkpoint
from graphs.foreign.fuse import fuse_graph
from graphs.foreign.precision import Precision
from validation.lone.limits import GROUPED
from validation.lone.report import reports_folder, validate_graph

pytestmark = pytest.mark.parity
SOUND = ("optimum-14", "optimum-18", "dynamo-18-eager-float32", "dynamo-18-sdpa-float32", "dynamo-23-sdpa-float32")


def failed(report):
    return {check["check"] for check in report["stages"][0]["checks"] if check["passed"] is False}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_graph_passes_before_and_after_fusion(pinned, judge, tmp_path, name) -> None:
    fuse_graph(pinned(f"{name}.onnx"), tmp_path / "fused.onnx")
    for path in (pinned(f"{name}.onnx"), tmp_path / "fused.onnx"):
        report = judge(path)
        assert report["passed"] is True, report["headline"]
        assert (report["graph"]["precision"], report["not_run"]) == ("float32", [])
        assert report["stages"][0]["stage"] == path.name
        assert report["verdict"] == "passed: 4 of 4 scenarios ran whole"


@pytest.mark.parametrize("name", ["dynamo-18-eager-float16", "optimum-18-float16"])
def test_a_float16_graph_is_judged_by_the_floor_and_by_its_roundings(pinned, judge, name) -> None:
    report = judge(pinned(f"{name}.onnx"))
    checks = {check["check"]: check for check in report["stages"][0]["checks"]}
    assert report["passed"] is True
    assert all(checks[name]["value"] > 0 for name in ("noise_ratio", "part_noise_ratio", "strict_noise_ratio", "cache_error"))
    assert checks["worst_local_ratio"]["passed"] is None
    assert [entry["stage"] for entry in report["not_run"]] == [f"{name}.onnx, local ratios"]
    assert report["floor"]["source"].startswith("transformers ")


def test_a_graph_of_grouped_attention_is_not_asked_for_left_padding(pinned, tmp_path) -> None:
    checkpoint = open_checkpoint(str(pinned("checkpoint-32")))
    report = validate_graph(pinned("genai.onnx"), checkpoint, out=tmp_path, text=None, tokens=None)
    assert report["passed"] is True
    assert report["verdict"] == "passed: 3 of 4 scenarios ran whole, 1 not run"
    assert [entry["stage"] for entry in report["not_run"]] == ["genai.onnx, padded"]
    assert GROUPED in report["not_run"][0]["reason"]
    assert report["headline"].startswith("structure proven for prefill, decode, chunked, quality not: ")


def test_a_graph_without_past_is_run_where_it_can_be(pinned, tmp_path) -> None:
    report = validate_graph(pinned("dynamo-18-bare.onnx"), open_checkpoint(str(pinned("checkpoint-bare"))), out=tmp_path, text=None, tokens=None)
    assert report["passed"] is True, report["headline"]
    assert {entry["stage"].partition(", ")[2] for entry in report["not_run"]} == {"decode", "chunked", "padded, steps"}
    assert {entry["reason"] for entry in report["not_run"]} == {"it takes no past keys and values"}
    assert [entry["scenario"] for entry in report["stages"][0]["scenarios"]] == ["prefill", "padded"]
    assert report["verdict"] == "passed: 1 of 4 scenarios ran whole, 3 not run"


def change_one_weight(model):
    value = next(value for value in model.graph.initializers.values() if list(value.shape or ()) == [24, 16])
    weight = value.const_value.numpy().copy()
    weight[5, 3] *= 1.5
    value.const_value = ir.tensor(weight, name=value.name)


def drop_mask(model):
    """Every position is real, whatever the mask says."""
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    users = list(mask.uses())
    shape = ir.Node("", "Shape", [mask], name="mask.shape")
    ones = ir.Node("", "ConstantOfShape", [shape.outputs[0]], [ir.AttrTensor("value", ir.tensor(np.ones(1, np.int64)))], name="mask.ones")
    for node, index in users:
        node.replace_input_with(index, ones.outputs[0])
    model.graph.extend([shape, ones])
    model.graph.sort()


def swap_outputs(first, second):
    def edit(model):
        values = {value.name: value for value in model.graph.outputs}
        values[first].name, values[second].name = "swapped", first
        next(value for value in model.graph.outputs if value.name == "swapped").name = second

    return edit


SABOTEURS = {
    "one weight": (change_one_weight, "max_abs_relative", "prefill"),
    "mask dropped": (drop_mask, "max_abs_relative", "padded"),
    "keys and values swapped": (swap_outputs("present.0.key", "present.0.value"), "cache_error", None),
    "layers swapped": (swap_outputs("present.0.key", "present.1.key"), "cache_error", None),
}


@pytest.mark.parametrize("name", ["optimum-18", "dynamo-23-sdpa-float32"])
@pytest.mark.parametrize("saboteur", list(SABOTEURS))
def test_a_damaged_graph_is_found(damaged, judge, name, saboteur) -> None:
    edit, check, where = SABOTEURS[saboteur]
    report = judge(damaged(name, edit))
    assert report["passed"] is False
    assert check in failed(report)
    if where is not None:
        assert next(each["where"] for each in report["stages"][0]["checks"] if each["check"] == check) == where


def test_positions_shifted_in_decode_are_found(damaged, judge, shift_decode_positions) -> None:
    report = judge(damaged("optimum-18", shift_decode_positions))
    errors = {entry["scenario"]: entry["max_abs"] for entry in report["stages"][0]["scenarios"]}
    assert "max_abs_relative" in failed(report)
    assert errors["decode"] > 100 * errors["prefill"]


def test_a_cache_that_does_not_grow_is_found(damaged, judge) -> None:
    def keep_the_past(model: ir.Model) -> None:
        past = next(value for value in model.graph.inputs if value.name == "past_key_values.1.value")
        node = ir.Node("", "Identity", [past], name="stale")
        old = next(value for value in model.graph.outputs if value.name == "present.1.value")
        node.outputs[0].name, old.name = old.name, "unused"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(["batch", 2, "past", 8]), old.type
        model.graph.append(node)
        model.graph.outputs[list(model.graph.outputs).index(old)] = node.outputs[0]

    report = judge(damaged("optimum-18", keep_the_past))
    assert report["passed"] is False
    assert report["headline"].endswith("output present.1.value is [1, 2, 0, 8] after 0 past and 64 new tokens, expected [1, 2, 64, 8]")


def test_the_reports_say_what_was_judged(pinned, judge, tmp_path) -> None:
    report = judge(pinned("optimum-18.onnx"))
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["parity.html", "parity.json", "parity.md", "parity.xml"]
    written = json.loads((tmp_path / "reports" / "parity.json").read_text())
    assert written["graph"]["hashes"] == {"optimum-18.onnx": sha256_of(pinned("optimum-18.onnx"))} == written["hashes"]
    assert written | {"reports": report["reports"]} == report
    for suffix in ("html", "md"):
        assert "caches and logits are 9 float32" in (tmp_path / "reports" / f"parity.{suffix}").read_text()
    assert 'testsuite name="optimum-18.onnx"' in (tmp_path / "reports" / "parity.xml").read_text()


def test_weights_beside_the_graph_are_hashed(pinned, judge, tmp_path) -> None:
    ir.save(ir.load(pinned("optimum-18.onnx")), tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=500)
    hashes = judge(tmp_path / "model.onnx")["graph"]["hashes"]
    assert hashes == {name: sha256_of(tmp_path / name) for name in ("model.onnx", "weights.bin")}


def test_reports_go_beside_the_graph_and_never_over_an_artifacts_own(tmp_path) -> None:
    assert reports_folder(Path("exports/model.onnx"), None) == Path("exports/reports/model")
    (tmp_path / "manifest.json").write_text("{}")
    assert reports_folder(tmp_path / "fused.onnx", None) == tmp_path / "reports" / "fused"
    with pytest.raises(UsageError, match="holds the reports of an artifact"):
        reports_folder(tmp_path / "fused.onnx", tmp_path / "reports")


def round_weights(model: ir.Model) -> None:
    """To 15 levels, as int4 does: errors that no order of summation changes."""
    for value in model.graph.initializers.values():
        weight = value.const_value.numpy()
        if weight.ndim == 2 and weight.dtype == np.float32:
            scale = np.abs(weight).max() / 7
            value.const_value = ir.tensor((np.rint(weight / scale) * scale).astype(np.float32), name=value.name)


def round_weights_and_drop_mask(model: ir.Model) -> None:
    round_weights(model)
    drop_mask(model)


def test_int4_may_fail_and_never_passes(damaged, judge, monkeypatch) -> None:
    monkeypatch.setattr("validation.lone.graph.read_precision", lambda *_: Precision("int4", "float32", "said so"))
    sound = judge(damaged("optimum-18", round_weights))
    assert (sound["passed"], sound["stages"][0]["passed"]) == (None, None)
    assert sound["headline"] == "damaged.onnx: measured, not judged: int4 has no limit for quality"
    assert "scenario_spread" in failed(judge(damaged("optimum-18", round_weights_and_drop_mask)))
