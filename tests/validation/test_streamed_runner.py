"""A graph run one layer at a time gives what it gives loaded whole: every form, every scenario, logits and caches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.calibration import CALIBRATION
from artifact.config import LlamaConfig
from artifact.errors import FusionError, ValidationError
from artifact.io_spec import Dtype, KvCache
from artifact.layout import MODULE_KEY
from artifact.steps import StepContext, run_step
from commands import graphs
from engines.engine_graph import fix_capacity
from engines.one_position import gather_last_position
from exporter.checkpoints import Checkpoint
from exporter.export import export_checkpoint
from graphs.quantize.int8_smoothquant import quantize_int8_smoothquant
from graphs.quantize.statistics import Statistics
from validation.artifact_weights import artifact_reader
from validation.calibration import write_statistics
from validation.calibration_text import CalibrationText
from validation.graph_runner import GraphRunner
from validation.local_ratio import layer_errors
from validation.reference import Reference
from validation.scenarios import Scenario, make_scenarios, split_sequences, tokens_needed
from validation.streamed_runner import Finished, StreamedRunner

pytestmark = pytest.mark.parity
SPARE = 8
PARTED = 1e-5
"""Largest difference of an onnxruntime graph, relative to the largest value: norms are parted from the sums they make (graphs/partition.py)."""
ROUNDED_INPUTS = 0.02
"""The same where the kernel rounds its inputs to eight bits: a last bit can be a whole level."""


@pytest.fixture(scope="module")
def float16(quantized: Path, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage of the tensorrt target with a dynamic cache but int4, whose blocks such small weights don't fill, and an engine graph."""
    artifact = Path(shutil.copytree(quantized, tmp_path_factory.mktemp("streamed") / "tiny"))
    sequences = tuple(np.random.default_rng(seed).integers(3, 64, 40) for seed in range(2))
    write_statistics(
        StepContext(artifact),
        Reference(checkpoint.config, artifact_reader(artifact)),
        CalibrationText(sequences, None, "ids", "", 1),
        "",
        CALIBRATION,
    )
    quantize_int8_smoothquant(StepContext(artifact), Statistics(artifact / "calibration.safetensors"))
    write_engine_graph(artifact, "int8")
    return artifact


@pytest.fixture(scope="module")
def static(static_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifact = Path(shutil.copytree(static_artifact, tmp_path_factory.mktemp("streamed") / "static"))
    write_engine_graph(artifact, "fused", 112)
    return artifact


@pytest.fixture(scope="module")
def float32(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of the onnxruntime target, whose sums are computed by the next layer's norm."""
    artifact = tmp_path_factory.mktemp("streamed") / "fp32"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32"))
    graphs.fuse(artifact, target="onnxruntime")
    for scheme in ("int8", "int4"):
        graphs.quantize(artifact, scheme=scheme, target="onnxruntime")
    return artifact


def write_engine_graph(artifact: Path, stage: str, capacity: int | None = None) -> None:
    model = ir.load(artifact / f"{stage}.onnx")
    gather_last_position(model.graph, stage)
    if capacity:
        fix_capacity(model.graph, capacity)
    ir.save(model, artifact / f"{stage}-engine.onnx")


@pytest.fixture(scope="module")
def scenarios(config: LlamaConfig) -> tuple[Scenario, ...]:
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, tokens_needed(config))
    return make_scenarios(config, *split_sequences(config, tokens, None))


Form = tuple[str, str, Dtype, KvCache]
FORMS: list[Form] = [
    *(("float16", stage, "fp16", "dynamic") for stage in ("traced", "fused", "int8", "int8-smoothquant", "int8-engine")),
    *(("static", stage, "fp16", "static") for stage in ("traced", "fused", "int8", "fused-engine")),
    *(("float32", stage, "fp32", "dynamic") for stage in ("traced", "fused-onnxruntime", "int8-onnxruntime", "int4-onnxruntime")),
]
WITH_LAYER_ERRORS = [form for form in FORMS if form[2] == "fp16" and form[1] in ("traced", "fused", "int8")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def test_streamed_gives_what_the_whole_graph_gives(
    form: Form, request: pytest.FixtureRequest, config: LlamaConfig, scenarios: tuple[Scenario, ...]
) -> None:
    folder, stage, dtype, kv_cache = form
    graph = request.getfixturevalue(folder) / f"{stage}.onnx"
    one_position = stage.endswith("-engine")
    whole = GraphRunner(graph, config, dtype, kv_cache, one_position=one_position)
    streamed = StreamedRunner(graph, config, dtype, kv_cache, one_position=one_position)
    capacity = max(scenario.width for scenario in scenarios) + SPARE
    streamed.expect(scenarios, () if one_position else [scenarios[-1].rows[1]], capacity)
    assert (streamed.joined, streamed.capacity) == ([], whole.capacity)
    for scenario in scenarios:
        for theirs, ours in zip(whole.run(scenario, capacity), streamed.run(scenario, capacity), strict=True):
            assert np.array_equal(ours.positions, theirs.positions)
            assert ours.logits.dtype == theirs.logits.dtype
            assert (ours.strays, theirs.strays) == ([], [])
            for mine, other in zip([ours.logits, *ours.keys, *ours.values], [theirs.logits, *theirs.keys, *theirs.values], strict=True):
                assert agree(mine, other, stage), scenario.name
    if not one_position:
        alone = scenarios[-1].rows[1]
        assert agree(streamed.logits(alone), whole.logits(alone), stage)


@pytest.mark.parametrize("form", WITH_LAYER_ERRORS, ids=lambda form: f"{form[0]}-{form[1]}")
def test_layers_alone_are_wrong_by_what_they_are_by_themselves(form: Form, request: pytest.FixtureRequest, checkpoint: Checkpoint) -> None:
    folder, stage, dtype, kv_cache = form
    graph = request.getfixturevalue(folder) / f"{stage}.onnx"
    (run,) = Reference(checkpoint.config, checkpoint.read).run([np.arange(40) * 7 % 64], keep_hidden={0}, keep_cache=())
    assert run.hidden is not None
    runner = StreamedRunner(graph, checkpoint.config, dtype, kv_cache)
    runner.expect((), (), alone=run.hidden)
    assert runner.layer_errors == layer_errors(graph, run.hidden)


def agree(ours: np.ndarray, theirs: np.ndarray, stage: str) -> bool:
    """Bit for bit, but for graphs whose boundaries had to be parted."""
    if "onnxruntime" not in stage:
        return np.array_equal(ours, theirs)
    limit = PARTED if stage == "fused-onnxruntime" else ROUNDED_INPUTS
    return bool(np.abs(ours.astype(float) - theirs.astype(float)).max() <= limit * np.abs(theirs.astype(float)).max())


def test_a_scenario_that_was_not_expected_is_run_when_it_is_asked_for(float16: Path, config: LlamaConfig, scenarios: tuple[Scenario, ...]) -> None:
    asked, expecting = (StreamedRunner(float16 / "fused.onnx", config, "fp16") for _ in range(2))
    expecting.expect(scenarios[:2], ())
    assert np.array_equal(asked.run(scenarios[1])[0].logits, expecting.run(scenarios[1])[0].logits)
    assert np.array_equal(asked.logits(scenarios[0].rows[0]), expecting.run(scenarios[0])[0].logits)


def test_an_engine_graph_takes_the_layers_of_its_stage(float16: Path, config: LlamaConfig, scenarios: tuple[Scenario, ...]) -> None:
    finished, told = Finished(), list[str]()
    stage = StreamedRunner(float16 / "int8.onnx", config, "fp16", finished=finished)
    stage.expect(scenarios, ())
    arguments: dict[str, Any] = {"one_position": True, "finished": finished, "progress": lambda what, done, total: told.append(what)}
    engine = StreamedRunner(float16 / "int8-engine.onnx", config, "fp16", **arguments)
    engine.expect(scenarios[:1], ())
    assert told == []
    (ours,), (theirs,) = engine.run(scenarios[0]), stage.run(scenarios[0])
    assert np.array_equal(ours.logits, theirs.gathered(ours.positions).logits)
    StreamedRunner(float16 / "fused.onnx", config, "fp16", finished=finished, progress=arguments["progress"]).expect(scenarios[:1], ())
    assert [what.partition(" of ")[0] for what in told] == ["fused: layer 0", "fused: layer 1"]


def test_a_hidden_state_beyond_float16_is_an_infinity_between_cuts(
    float16: Path, config: LlamaConfig, overflow_around: Callable[..., None], tmp_path: Path
) -> None:
    """As in the graph, whose value it is: loaded whole, ONNX Runtime carries it on in float32."""
    artifact = Path(shutil.copytree(float16, tmp_path / "tiny"))
    model = ir.load(artifact / "traced.onnx")
    last = next(node for node in model.graph if node.metadata_props.get(MODULE_KEY) == "model.layers.0" and node.op_type == "Add").outputs[0]
    large = ir.Value(name="large", const_value=ir.tensor(np.float16(60000), name="large"))
    model.graph.initializers.add(large)
    first, second = (ir.node("Add", [last, large], metadata_props={MODULE_KEY: "model.layers.0"}) for _ in range(2))
    for user, index in list(last.uses()):
        if user is not first and user is not second:
            user.replace_input_with(index, second.outputs[0])
    second.replace_input_with(0, first.outputs[0])
    for node in (first, second):
        node.outputs[0].type, node.outputs[0].shape, node.outputs[0].name = last.type, last.shape, f"large.{node is second}"
    model.graph.extend([first, second])
    model.graph.sort()
    ir.save(model, artifact / "traced.onnx")
    logits = StreamedRunner(artifact / "traced.onnx", config, "fp16").logits(np.arange(5))
    assert not np.isfinite(logits).any()


def test_a_graph_that_is_not_the_contracts_is_refused(float16: Path, static: Path, config: LlamaConfig) -> None:
    with pytest.raises(ValidationError, match=r"fused\.onnx: no input (cache_write_indices|key_value_lengths)"):
        StreamedRunner(float16 / "fused.onnx", config, "fp16", "static")
    with pytest.raises(ValidationError, match=r"fused\.onnx: output logits is tensor\(float16\)"):
        StreamedRunner(float16 / "fused.onnx", config, "fp16", one_position=True)
    tokens = np.arange(96) % 64
    with pytest.raises(ValidationError, match=r"fused: row 0 of a batch would write slots 0 to 95 of a cache with 48"):
        StreamedRunner(static / "fused.onnx", config, "fp16", "static").run(Scenario("prefill", (tokens,), (0,), (96,)), 48)


def test_a_graph_that_does_not_name_its_layers_is_refused(float16: Path, config: LlamaConfig, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(float16, tmp_path / "tiny"))
    model = ir.load(artifact / "fused.onnx")
    for node in model.graph:
        node.metadata_props.pop(MODULE_KEY, None)
    ir.save(model, artifact / "fused.onnx")
    with pytest.raises(FusionError, match="no node of the graph names its layer"):
        StreamedRunner(artifact / "fused.onnx", config, "fp16")
