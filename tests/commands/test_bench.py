"""bench and generate on a plan: the contract's keys, the same text as on the CPU, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import cli
from artifact.errors import ArtifactError, EngineError, ValidationError
from artifact.presets import preset
from commands import doctor, token_check
from commands.bench import BenchOptions, bench, beside_roofline
from commands.export import ExportOptions, export
from commands.generate import generate
from commands.summary import summarize
from engines import device
from engines.device import Device
from engines.engine_graph import write_engine_graph
from engines.profiles import make_profiles
from engines.roofline import roofline
from engines.targets import find_target
from exporter.checkpoints import CheckpointRequest, open_checkpoint

pytestmark = pytest.mark.trace
KEYS = {"stage", "backend", "prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_ms", "peak_rss_mb"}
"""Of the contract."""
SMALL = BenchOptions(prompt_tokens=12, new_tokens=3, batch=2, repeats=1)


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact with a tokenizer, traced.onnx and its engine graph."""
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = make_checkpoint(folder / "checkpoint", eos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    out, _ = export(CheckpointRequest(str(checkpoint)), folder / "artifact", ExportOptions())
    write_engine_graph(out / "traced.onnx", out / "traced-engine.onnx")
    return out


@pytest.fixture
def plan(artifact: Path, plan_on_cpu: ModuleType, runtime: Any, a100: Device) -> dict[str, Any]:
    """The entry of a plan of ``traced``, on a machine with its GPU."""
    config = open_checkpoint(str(artifact.parent / "checkpoint")).config
    profiles = make_profiles(config, "fp16", max_batch=2, max_length=64)
    made: dict[str, Any] = plan_on_cpu.write_plan(artifact, "traced-engine.onnx", {profile.name: dict(profile.axes) for profile in profiles})
    return made


@pytest.mark.parametrize("stage", ["traced", "traced-engine"])
def test_bench_measures_a_graph_on_the_cpu(artifact: Path, stage: str) -> None:
    report = bench(artifact, SMALL, stage=stage)
    assert report.keys() >= KEYS
    assert (report["stage"], report["backend"], report["device"], report["file"]) == (stage, "onnxruntime-cpu", "cpu", f"{stage}.onnx")
    assert report["prefill_tokens_per_s"] == pytest.approx(24_000 / report["time_to_first_token_ms"], rel=0.1)
    assert report["decode_tokens_per_s"] == pytest.approx(2000 / report["decode_ms"], rel=0.1)
    assert report["peak_rss_mb"] > 50


def test_bench_measures_a_plan(artifact: Path, plan: dict[str, Any], runtime: Any) -> None:
    report = bench(artifact, replace(SMALL, check_tokens=0), stage="traced", device="cuda")
    assert report.keys() >= KEYS
    assert (report["backend"], report["device"]) == ("tensorrt-rtx 1.7.1.116", "NVIDIA A100-SXM4-80GB")
    assert report["file"] == plan["file"]
    assert runtime.ran == [("prefill", 12), ("prefill", 12), *[("decode", 1)] * 7]  # one to warm up; four steps to warm up
    assert runtime.memory.owned == {}
    lines = "\n".join(sheet.title for sheet in summarize("bench", report))
    assert "part-00.plan on NVIDIA A100-SXM4-80GB, tensorrt-rtx 1.7.1.116; 2 × 12 prompt tokens, 3 steps" in lines


def test_bench_on_a_plan_is_judged_by_its_graph_and_stands_beside_the_roofline(artifact: Path, plan: dict[str, Any]) -> None:
    report = bench(artifact, SMALL, stage="traced", device="cuda")
    assert report["tokens"] == {"checked": 32, "equal": 32, "decisive": 0, "first": None, "passed": True}
    assert report["passed"] is True
    assert report["roofline"]["card"] == "a100-80gb"
    assert report["roofline"].keys() >= {"decode_tokens_per_s", "time_to_first_token_ms", "decode_share", "prefill_share"}
    lines = "\n".join(sheet.title for sheet in summarize("bench", report))
    assert "at best on a100-80gb: decode" in lines
    assert "32 of 32 tokens are those of the ONNX graph on the CPU" in lines
    assert not bench(artifact, SMALL, stage="traced").keys() & {"roofline", "tokens", "passed"}
    assert bench(artifact, replace(SMALL, check_tokens=0), stage="traced", device="cuda")["tokens"] is None


def test_the_shares_are_of_the_bounds_at_the_sizes_that_were_measured() -> None:
    """7B on an A100, a step of 10 ms and a prompt in 200 ms; a static cache is read to its capacity."""
    card, options = find_target("a100-80gb"), BenchOptions(prompt_tokens=2048, new_tokens=64)
    opened = SimpleNamespace(card=card, precision="fp16", device="any", decoder=SimpleNamespace(capacity=4096))
    report = beside_roofline(opened, preset("7b"), options, 0.2, 0.01)["roofline"]
    bounds = roofline(preset("7b"), "fp16", card, prompt=2048, cached=4096)
    assert report["decode_share"] == pytest.approx(bounds.decode_step_ms / 10, abs=1e-4)
    assert report["prefill_share"] == pytest.approx((bounds.time_to_first_token_ms or 0) / 200, abs=1e-4)
    assert 0.7 < report["decode_share"] < 0.8
    assert 0.4 < report["prefill_share"] < 0.5


def test_bench_names_a_plan_that_says_other_tokens(artifact: Path, plan: dict[str, Any], plan_on_cpu: ModuleType) -> None:
    """A plan of a graph whose logits are turned over."""
    model = ir.load(artifact / "traced-engine.onnx")
    logits = model.graph.outputs[0]
    opposite = ir.node("Neg", [logits])
    opposite.outputs[0].type, opposite.outputs[0].shape = logits.type, logits.shape
    logits.name, opposite.outputs[0].name = "inner", "logits"
    model.graph.append(opposite)
    model.graph.outputs[0] = opposite.outputs[0]
    ir.save(model, artifact / "turned-engine.onnx")
    plan_on_cpu.write_plan(artifact, "turned-engine.onnx", plan["profiles"])
    record = artifact / plan["file"].replace("part-00.plan", "build.json")
    record.write_text(record.read_text().replace("turned-engine.onnx", "traced-engine.onnx"))
    report = bench(artifact, SMALL, stage="traced", device="cuda")
    assert report["passed"] is False
    assert report["tokens"]["decisive"] > 20
    assert report["tokens"]["first"].keys() == {"row", "position", "plan", "graph", "margin"}
    assert "otherwise and not for rounding, first" in "\n".join(sheet.title for sheet in summarize("bench", report))


def test_figures_are_kept_where_memory_has_no_room_for_the_graph(artifact: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_check, "free_memory", lambda: 1000)
    report = bench(artifact, SMALL, stage="traced", device="cuda")
    assert report["decode_tokens_per_s"] > 0
    assert (report["passed"], report["tokens"]["passed"], report["tokens"]["checked"]) == (None, None, 0)
    assert report["tokens"]["reason"].endswith("GB of memory on the CPU, 0.0 GB are free")
    assert "no token was checked: the graph takes" in "\n".join(sheet.title for sheet in summarize("bench", report))


def test_a_graph_that_is_not_there_is_missed_before_the_clock_starts(artifact: Path, plan: dict[str, Any], runtime: Any) -> None:
    graph = artifact / "traced.onnx"
    graph.rename(artifact / "away")
    try:
        with pytest.raises(ArtifactError, match=r"has no traced\.onnx"):
            bench(artifact, SMALL, stage="traced", device="cuda")
    finally:
        (artifact / "away").rename(graph)
    assert runtime.ran == []


@pytest.fixture
def second(artifact: Path, plan: dict[str, Any], plan_on_cpu: ModuleType) -> Iterator[dict[str, Any]]:
    """Another plan of the same stage, which comes behind the first."""
    made = plan_on_cpu.write_plan(artifact, "traced-engine.onnx", plan["profiles"], suffix="-second")
    yield made
    shutil.rmtree((artifact / made["file"]).parent)


def test_a_plan_for_another_gpu_is_passed_over_and_said(artifact: Path, plan: dict[str, Any], second: dict[str, Any]) -> None:
    record = {"engines": [plan | {"compute_capability": "8.9", "target": "l4"}]}
    (artifact / "engines" / "a100-80gb-fp16" / "build.json").write_text(json.dumps(record))
    report = bench(artifact, replace(SMALL, check_tokens=0), stage="traced", device="cuda")
    assert report["file"] == second["file"]
    (reason,) = report["skipped"]
    assert reason.startswith(f"{plan['file']} can't run here: built for compute capability 8.9 (l4)")
    assert f"not taken: {reason}" in [sheet.title for sheet in summarize("bench", report)]
    assert generate(artifact, "w1", stage="traced", max_new_tokens=1, device="cuda")["skipped"] == [reason]


def test_a_plan_that_was_changed_is_refused_and_no_other_taken(artifact: Path, plan: dict[str, Any], second: dict[str, Any]) -> None:
    (artifact / plan["file"]).write_text("other")
    with pytest.raises(EngineError, match=r"fp16/part-00\.plan is not the plan that was built"):
        bench(artifact, SMALL, stage="traced", device="cuda")


def test_a_card_that_is_not_known_has_no_roofline(artifact: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "read_device", lambda: Device("NVIDIA PG506", (8, 0), 80 * 2**30))
    report = bench(artifact, SMALL, stage="traced", device="cuda")
    assert (report["roofline"], report["roofline_reason"]) == (None, "no data sheet of NVIDIA PG506: its bandwidth and peak are not known here")


def test_generate_says_the_same_on_a_plan(artifact: Path, plan: dict[str, Any], runtime: Any) -> None:
    on_cpu = generate(artifact, "w3 w1 w4", stage="traced", max_new_tokens=12)
    pieces: list[str] = []
    on_gpu = generate(artifact, "w3 w1 w4", stage="traced", max_new_tokens=12, device="cuda", say=pieces.append)
    assert on_gpu["text"] == on_cpu["text"] == "".join(pieces)
    assert (on_gpu["device"], on_cpu["device"]) == ("NVIDIA A100-SXM4-80GB", "cpu")
    assert runtime.ran == [("prefill", 3), *[("decode", 1)] * 11]
    assert runtime.memory.owned == {}


@pytest.mark.parametrize("run", [lambda artifact: bench(artifact, SMALL, stage="traced", device="cuda"),
                                 lambda artifact: generate(artifact, "w1", stage="traced", device="cuda")], ids=["bench", "generate"])  # fmt: skip
class TestRefusals:
    def test_without_a_gpu(self, artifact: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
        def absent() -> Device:
            raise EngineError("no NVIDIA driver here")

        monkeypatch.setattr(device, "read_device", absent)
        with pytest.raises(EngineError, match="no NVIDIA driver here"):
            run(artifact)

    def test_without_a_plan_of_the_stage(self, artifact: Path, plan: dict[str, Any], run: Any) -> None:
        (artifact / "engines" / "a100-80gb-fp16" / "build.json").write_text(json.dumps({"engines": [plan | {"graph": "fused-engine.onnx"}]}))
        with pytest.raises(EngineError, match="has no plan of traced") as error:
            run(artifact)
        assert "cli.py build" in str(error.value.hint)

    def test_with_a_plan_for_another_gpu(self, artifact: Path, plan: dict[str, Any], run: Any) -> None:
        record = {"engines": [plan | {"compute_capability": "8.9", "target": "l4"}]}
        (artifact / "engines" / "a100-80gb-fp16" / "build.json").write_text(json.dumps(record))
        with pytest.raises(EngineError, match=r"built for compute capability 8.9 \(l4\), this GPU"):
            run(artifact)


def test_bench_refuses_more_positions_than_the_model_or_the_plan_has(artifact: Path, plan: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"97 positions are needed \(4 of them to warm up\), the model has 96"):
        bench(artifact, BenchOptions(prompt_tokens=90, new_tokens=3), stage="traced")
    with pytest.raises(EngineError, match="admits 2 rows of 64 positions, asked for 1 of 65"):
        bench(artifact, BenchOptions(prompt_tokens=58, new_tokens=3), stage="traced", device="cuda")


def test_bench_refuses_a_stage_that_is_not_there(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no int4\.onnx"):
        bench(artifact, SMALL, stage="int4")


def test_bench_prints_one_json_object(artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--stage", "traced", "--prompt-tokens", "8", "--new-tokens", "2", "--batch", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["cli.py", "bench", str(artifact), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out).keys() >= KEYS


@pytest.mark.parametrize(
    ("capability", "targets", "hint"),
    [
        ((8, 0), ["a100-40gb", "a100-80gb", "a100-80gb-pcie", "a30"], None),
        ((9, 0), [], "no target has this GPU's compute capability; plans are built for 8.0, 8.6, 8.9"),
    ],
)
def test_doctor_names_the_gpu_and_whose_plans_run_on_it(monkeypatch: pytest.MonkeyPatch, capability: Any, targets: list[str], hint: Any) -> None:
    monkeypatch.setattr(device, "read_device", lambda: Device("NVIDIA X", capability, 80 * 2**30))
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    report = doctor.doctor()
    assert report["machine"]["gpu"] == f"NVIDIA X, compute capability {capability[0]}.{capability[1]}, 80.0 GiB"
    assert report["machine"]["targets"] == targets
    row = next(row for row in report["can"] if row["what"] == "run engines")
    assert (row["state"], row["hint"] if hint is None else row["hint"].startswith(hint)) == (("yes", None) if hint is None else ("no", True))
    assert any("NVIDIA X" in sheet.title for sheet in summarize("doctor", report))


def test_doctor_says_why_no_plan_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Device:
        raise EngineError("no NVIDIA driver here")

    monkeypatch.setattr(device, "read_device", absent)
    report = doctor.doctor()
    assert (report["machine"]["gpu"], report["machine"]["targets"]) == (None, [])
    assert next(row for row in report["can"] if row["what"] == "run engines")["hint"] == "no NVIDIA driver here"
