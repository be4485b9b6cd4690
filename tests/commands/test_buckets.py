"""Several capacities of a static cache: an engine each, and the smallest that holds a run is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from artifact.engine_names import Bucket
from artifact.errors import EngineError, UsageError
from artifact.stale import command_of
from commands import buckets
from commands.bench import BenchOptions, bench
from commands.buckets import build_all, check_lengths, parse_capacities, with_capacities
from commands.build import BuildOptions
from commands.export import ExportOptions, export
from commands.run import RunOptions, run
from engines.backends.flags import BuildFlags
from engines.device import Device
from engines.engine_graph import write_engine_graph
from engines.profiles import make_profiles
from exporter.checkpoints import CheckpointRequest, open_checkpoint
from validation.stage_choice import choose_stages

CAPACITIES = (24, 40, 64)


def test_capacities_are_numbers_each_once_smallest_first() -> None:
    assert parse_capacities(None) == ()
    assert parse_capacities("2048, 512,1024") == (512, 1024, 2048)
    assert with_capacities(BuildOptions(), parse_capacities("512")) == BuildOptions(capacity=512)
    assert with_capacities(BuildOptions(), parse_capacities("64,32")) == BuildOptions(buckets=(Bucket(32), Bucket(64)))
    assert type(with_capacities(BuildOptions(), parse_capacities("512")).capacity) is int
    assert with_capacities(BuildOptions(), parse_capacities("512,")) == BuildOptions(buckets=(Bucket(512),))


@pytest.mark.parametrize("text", ["", ",", "512,,", "1", "0,2", "-4", "512;1024", "²,4", "512,512"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--capacity"):
        parse_capacities(text)


def test_every_capacity_is_checked_before_anything_is_built(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config = open_checkpoint(str(make_checkpoint(tmp_path / "tiny"))).config
    options = BuildOptions(buckets=(Bucket(64), Bucket(97)))
    with pytest.raises(EngineError, match="--capacity 97 is more than the model's 96 positions"):
        check_lengths(options, "static", config)
    with pytest.raises(EngineError, match="--capacity is for a static cache"):
        check_lengths(options, "dynamic", config)


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny static artifact with an engine graph for each capacity."""
    folder = tmp_path_factory.mktemp("buckets")
    out, _ = export(CheckpointRequest(str(make_checkpoint(folder / "checkpoint"))), folder / "artifact", ExportOptions(kv_cache="static"))
    for capacity in CAPACITIES:
        write_engine_graph(out / "traced.onnx", out / f"traced-engine-c{capacity}.onnx", capacity=capacity)
    return out


@pytest.fixture
def plans(artifact: Path, plan_on_cpu: ModuleType, runtime: Any, a100: Device) -> None:
    config = open_checkpoint(str(artifact.parent / "checkpoint")).config
    for capacity in CAPACITIES:
        profiles = {one.name: dict(one.axes) for one in make_profiles(config, "fp16", "static", max_batch=2, max_length=capacity)}
        plan_on_cpu.write_plan(artifact, f"traced-engine-c{capacity}.onnx", profiles, capacity=capacity, suffix=f"-c{capacity}")


@pytest.mark.trace
@pytest.mark.parametrize(("prompt", "capacity"), [(17, 24), (18, 40), (40, 64)])
def test_the_smallest_that_holds_it_is_taken(artifact: Path, plans: None, prompt: int, capacity: int) -> None:
    report = bench(artifact, BenchOptions(prompt_tokens=prompt, new_tokens=3, batch=2, repeats=1), stage="traced", device="cuda")
    assert (report["file"], report["capacity"]) == (f"engines/a100-80gb-fp16-c{capacity}/part-00.plan", capacity)


@pytest.mark.trace
def test_what_no_bucket_holds_is_refused_with_the_largest(artifact: Path, plans: None) -> None:
    with pytest.raises(EngineError, match=r"fp16-c64/part-00\.plan admits 2 rows of 64 positions, asked for 1 of 67"):
        bench(artifact, BenchOptions(prompt_tokens=60, new_tokens=3, batch=1, repeats=1), stage="traced", device="cuda")


@pytest.mark.trace
def test_every_buckets_graph_is_a_stage_of_the_report(artifact: Path) -> None:
    chosen, _ = choose_stages(artifact, None, "fp16")
    assert chosen == ["traced", *(f"traced-engine-c{capacity}" for capacity in CAPACITIES)]


@pytest.mark.trace
def test_each_is_a_step_and_the_disk_is_asked_once_for_all(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def one(artifact: Path, precision: str, options: BuildOptions, **_: Any) -> Any:
        built.append(options.capacity)
        report = {"engines": [{"file": f"c{options.capacity}"}], "passed": options.capacity != 40, "parts": [], "parts_reason": f"{options.capacity}"}
        return buckets.Outcome(report, "not done yet" if options.capacity == 64 else "")

    monkeypatch.setattr(buckets, "build", one)
    monkeypatch.setitem(buckets.STAGES, "fp16", "traced")
    outcome = build_all(artifact, "fp16", BuildOptions("l4", buckets=tuple(map(Bucket, CAPACITIES))))
    assert built == list(CAPACITIES)
    assert all(isinstance(capacity, Bucket) for capacity in built)
    assert (outcome.reason, outcome.report["passed"], outcome.report["buckets"]) == ("not done yet", False, list(CAPACITIES))
    assert [engine["file"] for engine in outcome.report["engines"]] == ["c24", "c40", "c64"]
    assert outcome.report["parts_by_capacity"] == {str(capacity): {"parts": [], "parts_reason": str(capacity)} for capacity in CAPACITIES}
    assert not outcome.report.keys() & {"parts", "parts_reason"}
    monkeypatch.setattr(buckets, "free_disk", lambda folder: 1000)
    with pytest.raises(EngineError, match=re.escape("3 plans need about")):
        build_all(artifact, "fp16", BuildOptions("l4", buckets=tuple(map(Bucket, CAPACITIES))))
    assert len(built) == len(CAPACITIES)
    assert json.loads(json.dumps(outcome.report))["buckets"] == list(CAPACITIES)


@pytest.mark.trace
def test_the_disk_is_asked_for_what_is_not_up_to_date(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is there may be of another graph: it is built again, beside the old one."""
    stale, options = {24, 40, 64}, BuildOptions("l4", buckets=tuple(map(Bucket, CAPACITIES)))
    report = {"engines": [], "passed": True, "parts": [], "parts_reason": ""}
    monkeypatch.setattr(buckets, "build", lambda *_, **__: buckets.Outcome(report, ""))
    monkeypatch.setattr(buckets, "why_to_build", lambda artifact, precision, one: "changed" if one.capacity in stale else "")
    monkeypatch.setitem(buckets.STAGES, "fp16", "traced")
    for capacity in (24, 40):
        (artifact / f"engines/l4-fp16-c{capacity}").mkdir(parents=True)
    monkeypatch.setattr(buckets, "free_disk", lambda folder: 1000)
    with pytest.raises(EngineError, match=re.escape("3 plans (2 of them in an old one's place) need about")):
        build_all(artifact, "fp16", options)
    stale.clear()
    assert build_all(artifact, "fp16", options).up_to_date
    with pytest.raises(EngineError, match=re.escape("3 plans (2 of them")):
        build_all(artifact, "fp16", options, force=True)


def test_the_command_that_builds_a_bucket_again_names_it_as_one(tmp_path: Path) -> None:
    options = {"precision": "fp16", "target": "l4", "capacity": "512,", **BuildFlags(False, False, True, 4, 2 * 10**9).recorded()}
    assert command_of(tmp_path, "build-l4-fp16-c512", options).endswith("--capacity 512, --strip-weights --optimization-level 4 --workspace 2.0")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu12 is not installed")
def test_run_refuses_what_its_backend_lacks_before_anything_is_exported(tmp_path: Path) -> None:
    options = RunOptions(build=BuildOptions(flags=BuildFlags(strip_weights=True)))
    with pytest.raises(EngineError, match="tensorrt-rtx has no --strip-weights"):
        run(CheckpointRequest("random:0", "7b"), tmp_path / "out", ("fp16",), options)
    assert not (tmp_path / "out").exists()
