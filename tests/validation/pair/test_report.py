"""Two graphs against each other: nothing between a graph and itself, the damaged layer between two, and one error where they can't be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.errors import UsageError, ValidationError
from artifact.layout import MODULE_KEY
from artifact.manifest import fingerprint, read_manifest, write_manifest
from commands.against import Against, read_against
from commands.compare import compare
from commands.validate import ValidateOptions
from engines.engine_graph import write_engine_graph
from validation.pair import measure
from validation.pair.report import agree
from validation.scenarios import make_scenarios, scenario_lengths
from validation.side import stage_side

Compare = Callable[..., dict[str, Any]]
Sabotage = Callable[[Path, Path, str, Callable[[Any], None]], Path]


@pytest.fixture
def judge(quantized: Path, tmp_path: Path) -> Compare:
    """The comparison of something with what ``against`` names, as the command makes it; on a text of number words."""
    words = np.random.default_rng(3).integers(0, 64, 700).astype(str)
    (tmp_path / "numbers.txt").write_text(" ".join(words))

    def run(against: Path, target: Path = quantized, **options: Any) -> dict[str, Any]:
        asked = {"texts": (tmp_path / "numbers.txt",), "tokens": 256} | options
        return compare(target, ValidateOptions(against=read_against(str(against)), **asked), out=tmp_path / "reports")

    return run


def scale_layer(number: int, factor: float = 1.01) -> Callable[[Any], None]:
    """An edit: what leaves a layer's down projection × a factor."""

    def edit(editor: Any) -> None:
        module = f"model.layers.{number}.mlp.down_proj"
        node = [node for node in editor.graph if node.metadata_props.get(MODULE_KEY) == module][-1]
        constant = ir.Value(name="saboteur", const_value=ir.tensor(np.float16(factor), name="saboteur"))
        editor.graph.register_initializer(constant)

        def scaled() -> ir.Value:
            made = ir.node("Mul", [node.outputs[0], constant], metadata_props={MODULE_KEY: module})
            editor.made.append(made)
            return made.outputs[0]

        editor.replace(node.outputs[0], scaled)

    return edit


def test_a_graph_differs_from_itself_by_nothing(quantized: Path, judge: Compare) -> None:
    found = judge(quantized / "int8.onnx", stages=("int8",), max_kl=0.0)
    (stage,) = found["stages"]
    assert found["passed"] is True
    assert [stage[key] for key in ("max_abs", "mean_abs", "mean_kl", "perplexity_increase_pct", "cache_error")] == [0, 0, 0, 0, 0]
    assert stage["top1_agreement"] == 1
    layers = found["against"]["pairs"][0]["layers"]
    assert layers["layers"] == [0, 0]
    assert (layers["identical"], layers["first"], layers["worst"]) == (2, None, None)
    assert "every layer the same" in found["headline"]


def test_two_stages_are_compared_and_not_judged(quantized: Path, judge: Compare, tmp_path: Path) -> None:
    found = judge(quantized / "fused.onnx", stages=("int8",))
    (stage,) = found["stages"]
    assert found["passed"] is None
    assert stage["mean_kl"] > 0
    assert stage["perplexity_se_pct"] > 0
    assert {"max_abs", "mean_abs", "top1_agreement"} <= {key for key, value in stage.items() if value is not None}
    assert found["against"]["pairs"][0]["with"] == "fused"
    assert found["headline"].endswith("compared, not judged (--max-kl NATS makes it a gate)")
    written = (tmp_path / "reports" / "parity.md").read_text()
    assert "Against another graph" in written
    assert json.loads((tmp_path / "reports" / "parity.json").read_text())["against"]["kind"] == "graph"
    assert "Against another graph" in (tmp_path / "reports" / "parity.html").read_text()


def test_a_limit_that_was_asked_for_is_a_gate(quantized: Path, judge: Compare) -> None:
    close, wide = (judge(quantized / "fused.onnx", stages=("int8",), max_kl=limit)["passed"] for limit in (1e-9, 1.0))
    assert (close, wide) == (False, True)


def test_the_layer_that_differs_is_named(quantized: Path, judge: Compare, sabotage: Sabotage, tmp_path: Path) -> None:
    damaged = sabotage(quantized, tmp_path / "damaged", "fused", scale_layer(1, 1.1))
    found = judge(quantized, damaged, stages=("fused",))
    layers = found["against"]["pairs"][0]["layers"]
    assert layers["layers"][0] == 0
    assert (layers["first"], layers["worst"], layers["identical"]) == (1, 1, 1)
    assert "first layer that differs 1" in found["headline"]
    assert found["against"]["model"]["name"] == "tiny"


def test_a_graph_that_is_not_finite_fails_without_a_limit(quantized: Path, judge: Compare, sabotage: Sabotage, tmp_path: Path) -> None:
    broken = sabotage(quantized, tmp_path / "broken", "fused", scale_layer(0, float("inf")))
    found = judge(quantized, broken, stages=("fused",))
    assert found["passed"] is False
    assert found["headline"].startswith("fused does not match: nonfinite_logits")


def test_a_fault_that_no_text_shows_breaks_the_limit(
    quantized: Path, judge: Compare, sabotage: Sabotage, open_padding_in_steps: Callable[[Any], None], tmp_path: Path
) -> None:
    found = judge(quantized, sabotage(quantized, tmp_path / "leaking", "fused", open_padding_in_steps), stages=("fused",), max_kl=1e-6)
    (stage,) = found["stages"]
    assert stage["mean_kl"] == 0
    assert [(check["check"], check["where"]) for check in stage["checks"] if check["passed"] is False] == [("part_kl", "padded, row 1, steps")]
    assert {row["check"] for row in found["tolerances"]} == {"nonfinite_logits", "mean_kl", "part_kl"}


def test_the_other_graph_must_be_finite_too(quantized: Path, judge: Compare, sabotage: Sabotage, tmp_path: Path) -> None:
    broken = sabotage(quantized, tmp_path / "broken", "fused", scale_layer(0, float("inf")))
    found = judge(broken / "fused.onnx", quantized, stages=("fused",))
    check = next(check for check in found["stages"][0]["checks"] if check["check"] == "nonfinite_logits")
    assert check["passed"] is False
    assert check["where"] == "broken/fused.onnx: prefill"


def test_an_engine_graph_is_held_against_a_stage(quantized: Path, judge: Compare, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(quantized, tmp_path / "engines"))
    write_engine_graph(artifact / "fused.onnx", artifact / "fused-engine.onnx")
    manifest = read_manifest(artifact)
    manifest["steps"]["fuse"]["outputs"]["fused-engine.onnx"] = fingerprint(artifact / "fused-engine.onnx")
    write_manifest(artifact, manifest)
    found = judge(quantized / "fused.onnx", artifact, stages=("fused-engine",), max_kl=0.0)
    (stage,) = found["stages"]
    assert found["passed"] is True, found["headline"]
    assert (stage["max_abs"], stage["nonfinite_logits"], stage["part_kl"]) == (0, 0, 0)


def test_int4_passes_what_was_asked_for() -> None:
    checks = [{"check": "nonfinite_logits", "passed": True}, {"check": "mean_kl", "passed": True}, {"check": "part_kl", "passed": True}]
    assert measure.pair_verdict(checks) is True
    assert measure.pair_verdict(checks[:1]) is None
    assert measure.pair_verdict([*checks, {"check": "stray_slots", "passed": False}]) is False


def test_scenarios_are_what_both_graphs_take(quantized: Path) -> None:
    """One without a cache is given padded rows in one call, and so is the other."""
    whole: Any = stage_side(quantized, read_manifest(quantized), "fused")
    config = whole.config
    ids = np.arange(96) % 64
    scenarios = make_scenarios(config, ids, ids[: scenario_lengths(config)["short"] + scenario_lengths(config)["padded_decode"]])
    ports = SimpleNamespace(past=(), attention_mask="mask", position_ids=None, input_ids=SimpleNamespace(shape=("B", "S")))
    graph: Any = SimpleNamespace(ports=ports, one_position=False, model=SimpleNamespace(graph=()))
    uncached: Any = replace(whole, name="uncached", lone=graph)
    for theirs, ours in ((whole, uncached), (uncached, whole)):
        both, left_out = agree(theirs, ours, scenarios)
        assert [(one.name, len(one.chunks)) for one in both] == [("prefill", 1), ("padded", 1)]
        assert {one["scenario"] for one in left_out} == {"decode", "chunked", "padded, steps"}
    single: Any = replace(whole, name="single", lone=SimpleNamespace(**{**vars(graph), "one_position": True}))
    with pytest.raises(ValidationError, match=r"uncached and single take no scenario that is the same: .*prefill: a call gives one position"):
        agree(uncached, single, scenarios)


def test_stored_bytes_of_the_other_artifact_are_checked(sound_artifact: Path, judge: Compare, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sound_artifact, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    found = judge(other, sound_artifact, texts=(), tokens=None)
    assert found["passed"] is False
    assert found["against"]["checksums"]["failed"][0]["file"] == "config.json"
    assert found["headline"].startswith("against other: stored bytes are not those that were written")


def test_no_room_is_said_before_a_graph_is_opened(quantized: Path, judge: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cost: Any, folder: Path) -> None:
        raise ValidationError(f"{cost.step} needs {cost.memory_bytes} bytes")

    monkeypatch.setattr("commands.compare.check_memory", refuse)
    with pytest.raises(ValidationError, match="validate needs"):
        judge(quantized / "fused.onnx", stages=("int8",))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"stages": ("fused",)}, "--stage"),
        ({"streamed": True}, "--streamed"),
        ({"top_k": 16}, "--top-k"),
        ({"edges": True}, "--edges"),
    ],
)
def test_an_option_that_would_be_dropped_is_refused(options: dict[str, Any], name: str, quantized: Path, judge: Compare) -> None:
    with pytest.raises(UsageError, match=f"{name} don't go together"):
        judge(quantized / "fused.onnx", quantized / "int8.onnx", **options)


def test_an_artifact_needs_no_checkpoint(quantized: Path, judge: Compare) -> None:
    with pytest.raises(UsageError, match=r"--checkpoint don't go together: .* says which model it is"):
        judge(quantized / "fused.onnx", checkpoint="somewhere")


def test_artifacts_are_compared_stage_by_stage(quantized: Path, sound_artifact: Path, judge: Compare) -> None:
    found = judge(sound_artifact)
    assert [stage["stage"] for stage in found["stages"]] == ["traced"]
    assert {entry["stage"]: entry["reason"] for entry in found["not_run"]} == {"fused": "tiny has no fused.onnx", "int8": "tiny has no int8.onnx"}
    assert found["stages"][0]["mean_kl"] == 0


def test_a_static_cache_is_compared_with_a_dynamic_one(static_artifact: Path, quantized: Path, judge: Compare) -> None:
    found = judge(quantized / "fused.onnx", static_artifact, stages=("fused",), texts=(), tokens=None)
    assert found["stages"][0]["mean_kl"] < 1e-6
    assert found["stages"][0]["cache_error"] < 0.01
    assert found["against"]["pairs"][0]["layers"]["first"] is None


def test_streamed_gives_the_same(quantized: Path, judge: Compare) -> None:
    whole, streamed = (judge(quantized / "traced.onnx", stages=("fused",), streamed=way) for way in (False, True))
    assert whole["stages"][0]["scenarios"] == streamed["stages"][0]["scenarios"]
    assert whole["stages"][0]["mean_kl"] == streamed["stages"][0]["mean_kl"]


def test_a_lone_file_takes_its_model_from_the_artifact(quantized: Path, judge: Compare, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    lone = tmp_path / "alone" / "model.onnx"
    ir.save(ir.load(quantized / "fused.onnx"), lone, external_data="model.data")
    found = judge(quantized / "fused.onnx", lone)
    assert found["stages"][0]["stage"] == "model.onnx"
    assert found["stages"][0]["mean_kl"] == 0
    assert found["graph"]["file"] == "model.onnx"
    assert set(judge(lone, stages=("fused",))["against"]["hashes"]) == {"model.onnx", "model.data"}


def test_two_lone_files_need_a_checkpoint(quantized: Path, judge: Compare, tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(tmp_path / name / "model.onnx")
        ir.save(ir.load(quantized / "fused.onnx"), files[-1], external_data="model.data")
    with pytest.raises(UsageError, match="nothing says which model"):
        judge(files[0], files[1])
    found = judge(files[0], files[1], checkpoint=str(tiny_checkpoint), texts=(), tokens=None)
    assert found["stages"][0]["max_abs"] == 0


def test_another_shape_is_one_error(quantized: Path, judge: Compare, tmp_path: Path) -> None:
    other = Path(shutil.copytree(quantized, tmp_path / "other"))
    manifest = read_manifest(other)
    manifest["model"]["config"] |= {"vocab_size": 128, "num_hidden_layers": 3}
    write_manifest(other, manifest)
    with pytest.raises(ValidationError, match=r"can't be compared: vocab_size is 128 there, 64 here; num_hidden_layers is 3 there, 2 here"):
        judge(other)


def test_another_tokenizer_is_one_error(quantized: Path, judge: Compare, tmp_path: Path) -> None:
    other = Path(shutil.copytree(quantized, tmp_path / "other"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ValidationError, match=r"can't be compared: another tokenizer.json: \w{12} there, \w{12} here"):
        judge(other)


def test_what_against_names_must_be_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_against(None) is None
    assert read_against("torch") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "transformers").mkdir()
    assert read_against("transformers") == Against("transformers")
    with pytest.raises(UsageError, match="no artifact folder"):
        read_against("./transformers")
    for name, message in (("nowhere", "neither transformers"), ("x.onnx", "no such file"), (str(tmp_path), "no artifact folder")):
        with pytest.raises(UsageError, match=message) as refused:
            read_against(name)
        assert "--against transformers" in str(refused.value.hint)


def test_a_stage_that_the_other_lacks_is_an_error_where_it_was_asked_for(sound_artifact: Path, judge: Compare) -> None:
    with pytest.raises(ValidationError, match=r"has no int8.onnx"):
        judge(sound_artifact, stages=("int8",))


def test_a_folder_is_no_answer_for_a_lone_file(quantized: Path, judge: Compare) -> None:
    with pytest.raises(UsageError, match="which of its stages"):
        judge(quantized, quantized / "fused.onnx")
