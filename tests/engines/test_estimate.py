"""engines/estimate.py, step_costs.py and build_cost.py: all steps of a precision, what is lacking, and the parts that fit."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.layout import parameter_count
from artifact.presets import preset
from engines.build_cost import PARENT_BYTES, SECONDS, BuildCost, Graph, build_cost
from engines.device_fit import Load, load_of
from engines.estimate import Machine, Question, device_report, estimate
from engines.placement_costs import FOLDS, OUTPUTS, ROWS, SCORED_TOKENS, SET_TOKENS, SETS, STATE_BYTES, TRIES, placement_costs
from engines.preflight import check_build
from engines.step_cost import REFERENCE, Rates
from engines.step_costs import DECODED_BELOW, READ_TOKENS, calibrate_cost, validate_cost, validate_memory
from engines.targets import find_target
from graphs.quantize import placement, smoothing, smoothing_trial
from validation import calibration, perplexity, placement_text, scenarios, scoring, sensitivity

GB = 10**9
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
)
ROOMY = Machine(1000 * GB, 10_000 * GB, REFERENCE)
MEASURED = [  # precision, layers, weights, levels of them that are turned, plan in bytes; peak anonymous MB
    ("fp16", 30, 270_078_818, 0, 284_264_612, 641),
    ("fp16", 22, 2_200_621_282, 0, 2_211_869_276, 2560),
    ("fp16", 2, 1_334_878_402, 0, 1_338_619_404, 1660),
    ("fp16", 2, 1_925_236_930, 0, 1_928_979_500, 2249),
    ("fp16", 16, 7_002_000_000, 0, 7_011_000_000, 7447),
    ("int8", 30, 164_221_538, 0, 196_000_000, 581),
    ("int8", 16, 5_734_000_000, 0, 5_752_000_000, 6196),
    ("int8", 2, 2_761_000_000, 0, 2_766_000_000, 3083),
    ("int8", 22, 1_232_525_538, 0, 1_256_651_916, 1624),
    ("int8", 22, 1_232_525_538, 968_884_224, 1_256_651_916, 2627),
    ("int4", 22, 762_433_762, 484_442_112, 786_534_116, 1977),
]
VALIDATED = [("7b", 32, 2197), ("13b", 40, 3154), ("13b", 4, 2734), ("7b", 2, 2398), ("7b", 6, 5786), ("13b", 2, 3578)]
"""Size, layers, peak anonymous MB of ``validate --streamed``; below 1.5 B parameters, of the reference's part alone (docs/full-size.md)."""


@pytest.mark.parametrize(("precision", "layers", "weights", "turned", "plan", "memory_mb"), MEASURED)
def test_predictions_are_within_a_tenth_of_measured_builds(precision: str, layers: int, weights: int, turned: int, plan: int, memory_mb: int) -> None:
    found = build_cost(Graph(weights, layers, precision, turned))
    assert found.compiler_bytes / 1e6 == pytest.approx(memory_mb, rel=0.1)
    assert found.plan_bytes == pytest.approx(plan, rel=0.01)


def test_unpacked_graphs_need_more() -> None:
    packed, unpacked = (build_cost(Graph(GB, 2, "fp16", packed=packed)) for packed in (True, False))
    assert unpacked.compiler_bytes > 1.5 * packed.compiler_bytes
    assert unpacked.plan_bytes > 1.5 * packed.plan_bytes


def ask(size: str, precision: str, target: str = "a100", machine: Machine = ROOMY, **options: Any) -> dict[str, Any]:
    config = preset(size)
    load = load_of(config, precision, "dynamic", max_batch=options.pop("max_batch", 4), max_length=None)
    return estimate(Question(config, load, find_target(target), **options), machine)


@pytest.mark.parametrize(
    ("precision", "calibrated", "steps"),
    [
        ("fp16", True, ["export", "fuse", "build", "validate"]),
        ("fp32", True, ["export", "build", "validate"]),
        ("int8", True, ["export", "fuse", "calibrate", "quantize", "build", "validate"]),
        ("int8", False, ["export", "fuse", "quantize", "build", "validate"]),
    ],
)
def test_lists_the_steps_that_a_precision_needs(precision: str, calibrated: bool, steps: list[str]) -> None:
    report = ask("7b", precision, "a100-80gb", calibrated=calibrated)
    assert [step["step"] for step in report["steps"]] == steps
    assert report["disk_bytes"] == sum(step["disk_bytes"] for step in report["steps"])
    assert report["peak_memory_bytes"] == max(step["memory_bytes"] for step in report["steps"])
    assert all(step["seconds"] > 0 and step["assumption"] for step in report["steps"])
    assert (report["lacks"], report["fits"], report["parts"]["count"]) == ([], True, 1)


def test_placement_comes_before_rounding_and_is_not_done_twice() -> None:
    placed = [step["step"] for step in ask("7b", "int8-smoothquant")["steps"]]
    assert placed == ["export", "fuse", "calibrate", "smoothing", "sensitivity", "placement", "quantize", "build", "validate"]
    assert "placement" not in [step["step"] for step in ask("7b", "int8-smoothquant", done=frozenset({"quantize"}))["steps"]]
    assert "placement" not in [step["step"] for step in ask("7b", "int8-smoothquant", calibrated=False)["steps"]]


def test_what_measuring_takes_is_what_was_measured() -> None:
    """SmolLM2-135M on the reference machine beside other work: 13.6 s, 138 s; the whole command held at most 1.27 GB."""
    costs = {cost.step: cost for cost in placement_costs(SMOLLM2)}
    assert costs["smoothing"].seconds == pytest.approx(13.6, rel=0.5)
    assert costs["sensitivity"].seconds == pytest.approx(138, rel=0.2)
    assert "1,860 runs of a layer, 8 TFLOP" in costs["sensitivity"].assumption
    assert max(cost.memory_bytes for cost in costs.values()) == pytest.approx(1.27 * GB, rel=0.25)


def test_validating_takes_the_seconds_that_7b_took_on_two_idle_cores() -> None:
    """Four graphs, one of them an engine's, random ids in the place of a text: 1,330 s, another time 1,092 (docs/full-size.md)."""
    assert validate_cost(preset("7b"), 3, text=False).seconds == pytest.approx(1330, rel=0.2)
    steps = {step["step"]: step["seconds"] for step in ask("7b", "int8", calibrated=False)["steps"]}
    assert 1330 < steps["validate"] < 3 * 1330  # 3,072 tokens of text more, read by three stages, the reference and float16


@pytest.mark.parametrize(("size", "layers", "memory_mb"), VALIDATED)
def test_validating_takes_the_memory_that_was_measured(size: str, layers: int, memory_mb: int) -> None:
    assert validate_memory(replace(preset(size), num_hidden_layers=layers)) / 1e6 == pytest.approx(memory_mb, rel=0.1)


def test_validating_a_small_model_loads_its_graphs_whole() -> None:
    """SmolLM2-135M; traced, fused and int8: 2,041 MB. On a machine with little free it is streamed."""
    assert validate_cost(SMOLLM2, whole=True).memory_bytes / 1e6 == pytest.approx(2041, rel=0.1)
    much, little = (ask("7b", "fp16", machine=Machine(size * GB, 1000 * GB, REFERENCE))["steps"][-1]["memory_bytes"] for size in (200, 20))
    assert little == validate_cost(preset("7b")).memory_bytes
    assert much == validate_cost(preset("7b"), whole=True).memory_bytes > 4 * parameter_count(preset("7b"))


def test_a_calibration_takes_the_disk_that_was_measured() -> None:
    """SmolLM2-135M: 411 MB of 8,192 tokens, 424 of 24,576."""
    assert [calibrate_cost(SMOLLM2, tokens).disk_bytes / 1e6 for tokens in (8192, 24_576)] == pytest.approx([411, 424], rel=0.06)


def test_the_constants_are_those_of_what_is_done() -> None:
    assert scenarios.LARGE == DECODED_BELOW
    texts = [perplexity.make_windows(np.arange(1500), scored, perplexity.WINDOW, 1) for scored in perplexity.shares(perplexity.DEFAULT_TOKENS, 2)]
    assert sum(len(window.inputs) for windows in texts for window in windows) == READ_TOKENS
    assert (SCORED_TOKENS, STATE_BYTES) == (scoring.TOKENS, sensitivity.STATE_BYTES)
    assert (SETS, SET_TOKENS) == (placement.TRIES + 1, placement_text.TOKENS)
    assert (calibration.PARTS, 1 + len(smoothing.ALPHAS) * len(smoothing.HEADROOMS)) == (FOLDS, TRIES)
    assert (ROWS, OUTPUTS) == (smoothing_trial.ROWS + smoothing_trial.FIRST_ROWS, smoothing_trial.OUTPUTS)


def test_sizes_on_disk_are_the_weights() -> None:
    disk = {step["step"]: step["disk_bytes"] / GB for step in ask("13b", "int8")["steps"]}
    assert disk["export"] == pytest.approx(26.03, abs=0.1)
    assert disk["quantize"] == pytest.approx(12.69, abs=0.02)
    assert disk["build"] == pytest.approx(13.39, abs=0.05)


def test_a_build_that_does_not_fit_is_cut_and_the_disk_is_asked_for() -> None:
    report = ask("13b", "fp16", machine=Machine(20 * GB, 30 * GB, REFERENCE))
    assert (report["parts"]["count"], report["fits"]) == (2, False)
    assert report["parts"]["reason"].endswith("more than 20.0 GB of free memory")
    (lack,) = report["lacks"]
    assert lack.startswith("disk: about 52.")
    assert next(step for step in report["steps"] if step["step"] == "build")["memory_bytes"] < 20 * GB


def test_the_parts_together_take_their_time_and_disk_and_the_largest_its_memory() -> None:
    whole, parts = (ask("13b", "fp16", machine=Machine(free * GB, 10_000 * GB, REFERENCE))["steps"] for free in (100, 8))
    (one,), (cut,) = ([step for step in steps if step["step"] == "build"] for steps in (whole, parts))
    assert cut["seconds"] == pytest.approx(one["seconds"] + 3 * SECONDS, abs=1)
    assert 0 < cut["disk_bytes"] - one["disk_bytes"] < 0.02 * GB
    assert cut["memory_bytes"] < one["memory_bytes"] / 3


@pytest.mark.parametrize(
    ("asked", "free", "count", "words"), [(20, 10, 1, "within --max-memory 20.0 GB, though 10.0 GB are free"), (8, 100, 2, "8.0 GB")]
)
def test_max_memory_is_the_one_limit_of_a_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: int, free: int, count: int, words: str
) -> None:
    """What estimate lets pass, the build's own check lets pass too, and the other way round."""
    report = ask("7b", "fp16", machine=Machine(free * GB, 10_000 * GB, REFERENCE), max_memory=asked * GB)
    assert (report["lacks"], report["fits"], report["parts"]["count"]) == ([], True, count)
    assert report["parts"]["reason"].endswith(words)
    monkeypatch.setattr("engines.preflight.free_memory", lambda: free * GB)
    monkeypatch.setattr("engines.preflight.free_disk", lambda folder: 10_000 * GB)
    needed = next(step["memory_bytes"] for step in report["steps"] if step["step"] == "build")
    for limit, refused in ((needed, False), (needed - 1, True)):
        tight = ask("7b", "fp16", max_memory=limit)["parts"]["count"] > count
        assert tight == refused
        cost = BuildCost(needed - PARENT_BYTES, 0, 0.0)
        with pytest.raises(EngineError) if refused else nullcontext():
            check_build(cost, tmp_path, max_memory=limit)


@pytest.mark.parametrize(
    ("free", "cache_free", "lacking"),
    [
        (77, None, ["disk: about 78."]),
        (79, None, []),
        (53, 27, []),
        (80, 20, ["disk of the hub's cache: about 26.0 GB, 20.0 GB are free"]),
        (52, 27, ["disk: about 52."]),
    ],
)
def test_a_download_needs_its_disk(free: int, cache_free: int | None, lacking: list[str]) -> None:
    """13B INT8 adds 52 GB to the artifact, 26 GB to the cache; together where they share a disk."""
    machine = Machine(1000 * GB, free * GB, REFERENCE, None if cache_free is None else cache_free * GB)
    report = ask("13b", "int8", "a100-80gb", machine, download_bytes=26 * GB, calibrated=False)
    first = report["steps"][0]
    assert (first["step"], first["disk_bytes"], first["seconds"]) == ("download", 26 * GB, 520)
    assert "not measured" in first["assumption"]
    assert (len(report["lacks"]), report["fits"]) == (len(lacking), not lacking)
    assert all(map(str.startswith, report["lacks"], lacking)), report["lacks"]


def test_what_is_done_takes_nothing() -> None:
    report = ask("13b", "int8", machine=Machine(1000 * GB, 14 * GB, REFERENCE), done=frozenset({"export", "fuse", "calibrate", "quantize"}))
    assert [step["step"] for step in report["steps"]] == ["build", "validate"]
    assert (report["done"], report["lacks"]) == (["calibrate", "export", "fuse", "quantize"], [])
    short = ask("13b", "int8", machine=Machine(1000 * GB, GB, REFERENCE), done=frozenset({"export"}))
    assert "--weights reference" not in short["lacks"][0]


def test_a_machine_that_is_too_small_for_any_cut_is_told() -> None:
    report = ask("70b", "fp16", machine=Machine(2 * GB, 10_000 * GB, REFERENCE))
    assert report["lacks"][0].startswith("build: the largest of 80 parts needs about")
    assert report["fits"] is False


def test_a_model_too_large_for_its_gpu_does_not_fit_though_the_machine_has_room() -> None:
    report = ask("70b", "fp16")
    assert report["parts"]["reason"] == "2 parts: a100-80gb needs 2 GPUs, one part each; this runner uses one, and a100-80gb does not hold the whole"
    assert (report["lacks"], report["fits"], report["device"]["fit"]["gpus"], report["parts"]["count"]) == ([], False, 2, 2)


def test_a_model_that_fits_no_number_of_gpus_is_said_to_be_cut_for_the_build_alone() -> None:
    report = ask("70b", "fp32", "l4")
    assert (report["device"]["fit"]["gpus"], report["fits"]) == (None, False)
    assert report["parts"]["reason"].endswith("; it fits l4 in no number of parts")


def test_one_row_of_int8_is_estimated_as_it_is_built() -> None:
    assert ask("7b", "int8", max_batch=1)["max_batch"] == 2


def test_a_static_cache_is_read_up_to_its_capacity_at_every_step() -> None:
    config, target = preset("7b"), find_target("a100-80gb")
    growing, static = (device_report(config, Load("fp16", 4, 4096, form), target) for form in ("dynamic", "static"))
    assert list(static["roofline"]) == ["one row, 4,096 tokens of capacity read", "4 rows, 4,096 tokens of capacity read"]
    assert static["roofline"]["one row, 4,096 tokens of capacity read"]["decode_tokens_per_s"] == pytest.approx(133, abs=1)
    assert len(growing["roofline"]) == 3
    int8 = [next(line["decode"] for line in report["faster"] if line["precision"] == "int8") for report in (growing, static)]
    assert int8[1] < int8[0]


def test_times_scale_with_the_machine() -> None:
    slow = Machine(1000 * GB, 10_000 * GB, Rates(REFERENCE.disk_gb_s / 4, REFERENCE.gflops / 4))
    assert 3 < ask("7b", "int8", machine=slow)["seconds"] / ask("7b", "int8")["seconds"] < 4.1
