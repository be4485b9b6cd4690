"""Graphs with a static cache in the runner, as engine graphs, and in the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from engines.engine_graph import fix_capacity
from engines.one_position import gather_last_position
from exporter.checkpoints import Checkpoint
from validation.calls import Turn, right_padded
from validation.graph_runner import GraphRunner, call_feeds
from validation.reference import Reference
from validation.scenarios import Scenario, make_scenarios, split_sequences, tokens_needed

pytestmark = pytest.mark.parity
Report = dict[str, Any]
Measure = Callable[[Path, str], tuple[Report, dict[str, str | None]]]
Rewrite = Callable[..., None]
Edit = Callable[[ir.Model], None]


@pytest.fixture(scope="module")
def runner(static_artifact: Path, config: LlamaConfig) -> GraphRunner:
    return GraphRunner(static_artifact / "fused.onnx", config, "fp16", "static")


@pytest.fixture(scope="module")
def scenarios(config: LlamaConfig) -> dict[str, Scenario]:
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, tokens_needed(config))
    return {scenario.name: scenario for scenario in make_scenarios(config, *split_sequences(config, tokens, None))}


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("name", ["prefill", "decode", "chunked", "padded"])
def test_run_gives_each_row_the_logits_and_caches_it_has_alone(
    name: str, spare: int, runner: GraphRunner, scenarios: dict[str, Scenario], checkpoint: Checkpoint
) -> None:
    scenario = scenarios[name]
    runs = Reference(checkpoint.config, checkpoint.read).run(scenario.rows)
    for row, run in zip(runner.run(scenario, scenario.width + spare), runs, strict=True):
        assert row.positions.tolist() == list(range(len(row.logits)))
        assert row.strays == []
        assert np.abs(row.logits - run.logits()).max() < 0.02
        for ours, theirs in zip([*row.keys, *row.values], [*run.keys, *run.values], strict=True):
            assert np.abs(ours - theirs).max() < 0.02


def test_the_cache_is_written_in_place_as_it_is_between_two_buffers(runner: GraphRunner, config: LlamaConfig) -> None:
    (call,) = right_padded([Turn((np.arange(6), np.arange(3)), (0, 0))])
    cache = runner.new_cache(2, 9)
    feeds = call_feeds(config, "fp16", call, [tensor.copy() for tensor in cache])
    names = [value.name for value in io_spec.graph_outputs(config, "fp16", "static")]
    logits, *presents = runner._session.run(names, feeds)
    in_place, *written = runner.call(call, cache)
    assert all(ours is theirs for ours, theirs in zip(written, cache, strict=True))
    assert np.array_equal(in_place, logits)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(cache, presents, strict=True))
    assert cache[0][:, :, :3].any()


def test_logits_alone_need_just_the_slots_of_the_sequence(runner: GraphRunner, scenarios: dict[str, Scenario]) -> None:
    ids = scenarios["prefill"].rows[0]
    assert np.array_equal(runner.logits(ids), runner.run(scenarios["prefill"], len(ids))[0].logits)


def test_a_write_out_of_range_is_an_error_that_names_row_and_slots(runner: GraphRunner, scenarios: dict[str, Scenario]) -> None:
    with pytest.raises(ValidationError, match=r"fused\.onnx: row 0 of a batch would write slots 55 to 55 of a cache with 55"):
        runner.run(scenarios["padded"], 55)
    (call,) = right_padded([Turn((np.arange(2), np.arange(4)), (3, 6))])  # padding is written too
    with pytest.raises(ValidationError, match="row 1 of a batch would write slots 6 to 9 of a cache with 9"):
        runner.call(call, runner.new_cache(2, 9))


def test_onnx_runtime_refuses_an_index_out_of_range_by_itself(runner: GraphRunner, config: LlamaConfig) -> None:
    (call,) = right_padded([Turn((np.arange(2),), (3,))])
    with pytest.raises(ValidationError, match=r"ONNX Runtime stopped at a batch of 1 with 5 positions.*TensorScatter"):
        runner._run([io_spec.LOGITS], call, call_feeds(config, "fp16", call, runner.new_cache(1, 4)))


def test_runner_refuses_a_graph_of_the_other_cache_form(static_artifact: Path, sound_artifact: Path, config: LlamaConfig) -> None:
    with pytest.raises(ValidationError, match="no input attention_mask"):
        GraphRunner(static_artifact / "traced.onnx", config, "fp16")
    with pytest.raises(ValidationError, match=r"no input (cache_write_indices|key_value_lengths)"):
        GraphRunner(sound_artifact / "traced.onnx", config, "fp16", "static")


@pytest.fixture
def artifact(static_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(static_artifact, tmp_path / "tiny"))


def gather(capacity: int) -> Edit:
    """The edit that ``build --capacity`` makes."""

    def edit(model: ir.Model) -> None:
        gather_last_position(model.graph, "traced.onnx")
        fix_capacity(model.graph, capacity)

    return edit


def gather_the_column_before(model: ir.Model) -> None:
    gather(104)(model)
    (unsqueeze,) = [node for node in model.graph if io_spec.LAST_TOKEN_INDICES in {value.name for value in node.inputs if value is not None}]
    index, one = unsqueeze.inputs[0], ir.Value(name="one", const_value=ir.tensor(np.array([1], np.int64), name="one"))
    model.graph.initializers.add(one)
    before = ir.Node("", "Sub", [index, one])  # -1 in calls of one token: the same token
    model.graph.insert_before(unsqueeze, before)
    unsqueeze.replace_input_with(0, before.outputs[0])


def test_an_engine_graph_equals_its_stage_at_each_rows_last_token(artifact: Path, measure: Measure, rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, gather(104), to="traced-engine.onnx")
    report, failed = measure(artifact, "traced-engine")
    (entry,) = report["stages"]
    assert failed == {}
    assert entry["engine_difference"] <= 2**-9
    assert entry["cache_capacity"] == 104
    assert entry["top1_agreement"] == 1.0
    assert [scenario["positions"] for scenario in entry["scenarios"]] == [1, 3, 18]
    assert {check["check"]: check["passed"] for check in entry["checks"]} == dict.fromkeys(
        ("engine_difference", "engine_structure", "stray_slots"), True
    )


def test_an_engine_graph_that_gathers_another_token_is_found(artifact: Path, measure: Measure, rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, gather_the_column_before, to="traced-engine.onnx")
    _, failed = measure(artifact, "traced-engine")
    assert failed.keys() == {"engine_difference", "engine_structure"}


def test_an_engine_graph_too_small_for_a_scenario_says_so(artifact: Path, measure: Measure, rewrite_graph: Rewrite) -> None:
    rewrite_graph(artifact, gather(60), to="traced-engine.onnx")
    (entry,) = measure(artifact, "traced-engine")[0]["stages"]
    assert [scenario["scenario"] for scenario in entry["scenarios"]] == ["padded"]
    assert entry["warnings"] == ["not run on all scenarios: built for 60 slots, too few for prefill, chunked"]
    assert entry["engine_difference"] <= 2**-9
    assert entry["cache_capacity"] == 60
    rewrite_graph(artifact, gather(40), to="traced-engine.onnx")
    (entry,) = measure(artifact, "traced-engine")[0]["stages"]
    checks = {check["check"]: (check["passed"], check["reason"]) for check in entry["checks"]}
    assert checks["engine_difference"] == (None, "not judged: built for 40 slots, too few for prefill, chunked, padded")
    assert checks["engine_structure"][0] is True


def test_every_report_names_the_cache_form(artifact: Path, measure: Measure) -> None:
    measure(artifact, "traced")
    reports = {suffix: (artifact / f"reports/parity.{suffix}").read_text() for suffix in ("json", "md", "html", "xml")}
    assert json.loads(reports.pop("json"))["cache"] == {"form": "static", "capacity": 104}
    for text in reports.values():
        assert "static cache of 104 slots" in text
