"""engines/preflight.py: a lack is refused before the step, with both numbers and what to do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from artifact.errors import EngineError, QuantizationError, ToolkitError, ValidationError
from artifact.layout import parameter_count
from artifact.presets import preset
from artifact.room import fits_whole
from engines.build_cost import Graph, build_cost
from engines.closer_cost import closer_memory
from engines.preflight import ERRORS, check_build, check_disk, check_memory, check_step
from engines.step_cost import Rates
from engines.step_costs import Work, quantize_cost, step_costs, validate_cost

GB = 10**9
BUILD = build_cost(Graph(13_476 * 10**6, 32, "fp16"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the machine says is free; a test changes it."""
    free = SimpleNamespace(memory=10**15, disk=10**15)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free.memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.disk))
    return free


def test_a_build_is_refused_without_memory(machine: SimpleNamespace, tmp_path: Path) -> None:
    machine.memory = 8 * GB
    with pytest.raises(EngineError, match=r"the build needs about 14\.0 GB of memory, 8\.0 GB are free") as error:
        check_build(BUILD, tmp_path)
    assert "--parts auto" in str(error.value.hint)


def test_a_build_is_refused_without_disk_where_its_folder_is_still_to_be_made(machine: SimpleNamespace, tmp_path: Path) -> None:
    machine.disk = GB
    with pytest.raises(EngineError, match=r"the build needs about 13\.5 GB of disk, .* has 1\.0 GB free"):
        check_build(BUILD, tmp_path / "engines" / "a100")


def test_max_memory_stands_in_the_place_of_what_is_free(machine: SimpleNamespace, tmp_path: Path) -> None:
    machine.memory = 8 * GB
    check_build(BUILD, tmp_path, max_memory=15 * GB)
    with pytest.raises(EngineError, match=r"--max-memory is 12\.0 GB"):
        check_build(BUILD, tmp_path, max_memory=12 * GB)


@pytest.mark.parametrize("lack", ["memory", "disk"])
def test_every_step_has_its_own_error(machine: SimpleNamespace, tmp_path: Path, lack: str) -> None:
    steps = [step for step in step_costs(preset("13b"), Work("int8-smoothquant")) if step.step in ERRORS]
    assert [step.step for step in steps] == list(ERRORS)
    setattr(machine, lack, 10_000)
    for step in steps:
        if lack == "disk" and not step.disk_bytes:
            continue
        with pytest.raises(ToolkitError, match=f"{step.step} needs about .* GB of {lack}") as error:
            check_step(step, tmp_path)
        assert type(error.value) is ERRORS[step.step]
        assert error.value.hint


def test_what_a_rerun_replaces_is_not_needed_twice(machine: SimpleNamespace, tmp_path: Path) -> None:
    cost = quantize_cost(preset("7b"), "int8")
    machine.disk = 5 * GB
    check_step(cost, tmp_path, replaced=3 * GB)
    with pytest.raises(QuantizationError, match=r"quantize needs about 6\.5 GB of disk"):
        check_step(cost, tmp_path)
    check_memory(cost, tmp_path)


def test_an_output_layer_that_is_quantised_too_counts() -> None:
    """[32000, 4096] in blocks of 32 and 128k vocabularies are larger than any linear of a layer."""
    config = replace(preset("7b"), vocab_size=128_000)
    alone, with_head = (quantize_cost(config, "int8", calibrated=False, head=head).memory_bytes for head in (False, True))
    assert with_head - alone > 128_000 * 4096


def test_plain_rounding_is_bound_by_the_disk_and_not_by_arithmetic() -> None:
    config = preset("7b")
    seconds = [quantize_cost(config, "int8", Rates(*rates), calibrated=False).seconds for rates in ((0.6, 20), (0.6, 2000), (0.3, 2000))]
    assert seconds[0] == seconds[1] < seconds[2]


def test_passes_where_there_is_room(tmp_path: Path) -> None:
    check_build(build_cost(Graph(10**6, 1, "fp16")), tmp_path / "engines")


def test_all_plans_together_need_the_disk(machine: SimpleNamespace, tmp_path: Path) -> None:
    machine.disk = 20 * GB
    check_disk(BUILD.plan_bytes, tmp_path)
    with pytest.raises(EngineError, match=r"the build needs about 27\.0 GB of disk"):
        check_disk(2 * BUILD.plan_bytes, tmp_path)


def test_graphs_that_are_to_be_loaded_whole_need_all_their_weights_in_float32() -> None:
    config = preset("7b")
    whole, streamed = (validate_cost(config, whole=whole).memory_bytes for whole in (True, False))
    assert whole - streamed > 4 * parameter_count(config)


@pytest.mark.parametrize("vocab_size", [32_000, 49_152, 128_256])
def test_a_graph_of_usual_widths_is_not_loaded_whole_where_that_would_be_refused(vocab_size: int) -> None:
    for size in ("7b", "70b"):
        for layers, hidden in ((1, 1024), (30, 576), (30, 2048), (32, 4096)):
            config = replace(preset(size), num_hidden_layers=layers, hidden_size=hidden, intermediate_size=3 * hidden, vocab_size=vocab_size)
            least = next(free for free in range(10**9, 400 * 10**9, 10**8) if fits_whole(4 * parameter_count(config), free))
            assert validate_cost(config, whole=True).memory_bytes <= least


@pytest.mark.parametrize(("size", "edges", "measured_mb"), [("13b", False, 3079), ("13b", True, 3701), ("7b", True, 3630)])
def test_a_closer_look_needs_what_full_widths_measured(size: str, edges: bool, measured_mb: int) -> None:
    """The larger of fused and int8, two layers; as many as there are cost no more."""
    assert 1 <= closer_memory(preset(size), edges=edges) / (measured_mb * 10**6) < 1.15


def test_a_closer_look_is_refused_before_it_starts_where_it_needs_more_than_the_rest(machine: SimpleNamespace, tmp_path: Path) -> None:
    config = preset("70b")
    plain, edges = validate_cost(config), closer_memory(config, edges=True)
    assert validate_cost(config, closer=plain.memory_bytes - 1) == plain
    cost = validate_cost(config, closer=plain.memory_bytes + edges)
    machine.memory = plain.memory_bytes + edges - 1
    check_memory(plain, tmp_path)
    with pytest.raises(ValidationError, match=r"validate needs about .* GB of memory"):
        check_memory(cost, tmp_path)
