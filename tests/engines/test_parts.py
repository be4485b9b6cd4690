"""An engine in parts: run one after another on the buffers of one session, they give what their graphs give, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from artifact.errors import EngineError
from artifact.io_spec import cache_names
from engines.device import Device
from engines.plan import Plan, PlanChain, open_engine
from engines.profiles import make_profiles
from engines.runner import PlanSession
from validation.calls import Call, left_padded
from validation.engines import split_engines, whole_engines
from validation.graph_runner import GraphRunner
from validation.scenarios import Scenario

A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30)
LAYERS, LENGTH = 3, 24
FLOAT16 = ir.TensorType(ir.DataType.FLOAT16)


def cut(graph: Path, layers: range) -> Path:
    """The engine graph's part of some layers, whose hidden states enter and leave as inputs and outputs."""
    model = ir.load(graph)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    outputs = [value for value in model.graph.outputs if any(f".{layer}." in str(value.name) for layer in layers)]
    if layers.start:
        entering = values[f"l{layers.start - 1}_out"]
        hidden = ir.Value(name=f"hidden_states.{layers.start}", type=FLOAT16, shape=ir.Shape(["batch_size", "sequence_length", 256]))
        entering.replace_all_uses_with(hidden)
        model.graph.inputs.append(hidden)
    if layers.stop < LAYERS:
        leaving = values[f"l{layers.stop - 1}_out"]
        leaving.name, leaving.type = f"hidden_states.{layers.stop}", FLOAT16
        outputs.insert(0, leaving)
    else:
        outputs.insert(0, next(value for value in model.graph.outputs if value.name == "logits"))
    model.graph.outputs[:] = outputs
    RemoveUnusedNodesPass()(model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses()]
    path = graph.with_name(f"{graph.stem}-layers-{layers.start:02d}-{layers.stop - 1:02d}.onnx")
    ir.save(model, path)
    return path


@pytest.fixture(scope="module")
def stage(make_stage: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = make_stage(tmp_path_factory.mktemp("parts"), LAYERS, "fp16")
    assert made.engine_graph.is_file()
    return made


@pytest.fixture
def entries(stage: Any, plan_on_cpu: ModuleType) -> list[dict[str, Any]]:
    """Three parts of a layer each."""
    artifact = stage.path.parent
    profiles = {one.name: dict(one.axes) for one in make_profiles(stage.config, "fp16", max_batch=2, max_length=LENGTH)}
    made = []
    for layer in reversed(range(LAYERS)):  # each is written as the first, and renamed
        graph = cut(stage.engine_graph, range(layer, layer + 1))
        interface = ir.load(graph).graph
        names = {side: [str(value.name) for value in getattr(interface, side)] for side in ("inputs", "outputs")}
        entry = plan_on_cpu.write_plan(artifact, graph.name, profiles, part=layer, folder="a100-80gb-fp16", **names)
        plan = artifact / "engines/a100-80gb-fp16" / f"part-{layer:02d}.plan"
        (artifact / entry["file"]).rename(plan)
        made.append({**entry, "file": str(plan.relative_to(artifact))})
    return made[::-1]


def calls(*chunks: int) -> list[Call]:
    rows = (np.arange(sum(chunks)) * 37 % 512, np.arange(sum(chunks) - 3) * 91 % 512)
    return list(left_padded(Scenario("any", rows, (0, 1), chunks).turns()))


def by_hand(artifact: Path, entries: list[dict[str, Any]], feeds: dict[str, Any], caches: dict[str, Any]) -> dict[str, Any]:
    """The parts' graphs one after another, every tensor on the host: logits and presents."""
    known = {**feeds, **caches}
    for entry in entries:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = ort.InferenceSession(artifact / entry["graph"], options, providers=["CPUExecutionProvider"])
        known |= dict(zip(entry["outputs"], session.run(entry["outputs"], {name: known[name] for name in entry["inputs"]}), strict=True))
    return known


def test_parts_in_sequence_give_what_their_graphs_give(stage: Any, entries: list[dict[str, Any]], runtime: Any) -> None:
    """Bit for bit, call by call; and what the whole graph gives, but for the rounding of hidden states that a cut brings."""
    artifact, names = stage.path.parent, cache_names(stage.config)
    graph = GraphRunner(stage.engine_graph, stage.config, "fp16", one_position=True)
    caches, whole = {past: np.zeros((2, 2, 0, 64), np.float16) for past, _ in names}, None
    with PlanSession(open_engine(artifact, entries, A100), stage.config, "fp16", batch=2, length=LENGTH) as session:
        for call in calls(7, 1, 3, 1):
            expected = by_hand(artifact, entries, call.inputs(), caches)
            caches = {past: expected[present] for past, present in names}
            logits = session.call(call.inputs())
            np.testing.assert_array_equal(logits, expected["logits"])
            for ours, theirs in zip(session.caches(), caches.values(), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            near, *whole = graph.call(call, whole)
            np.testing.assert_allclose(logits, near, rtol=0, atol=0.02 * np.abs(near).max())
    assert runtime.memory.owned == {}
    assert runtime.ran == [("prefill", 7)] * 3 + [("decode", 1)] * 3 + [("prefill", 3)] * 3 + [("decode", 1)] * 3


def test_one_plan_is_no_chain(stage: Any, entries: list[dict[str, Any]], runtime: Any) -> None:
    assert isinstance(open_engine(stage.path.parent, entries[:1], A100), Plan)
    chain = open_engine(stage.path.parent, entries, A100)
    assert isinstance(chain, PlanChain)
    assert (chain.name, len(chain.parts)) == (entries[0]["file"], 3)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((0, 2), r"part-00\.plan gives hidden_states\.1, what follows reads hidden_states\.2"),
        ((0, 1), r"part-01\.plan gives hidden_states\.2, what follows reads none"),
        ((1, 0, 2), "the parts are not of one engine"),
    ],
)
def test_parts_that_do_not_follow_one_another_are_refused(
    stage: Any, entries: list[dict[str, Any]], runtime: Any, order: tuple[int, ...], words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        open_engine(stage.path.parent, [entries[index] for index in order], A100)


def test_a_part_that_cannot_run_keeps_the_engine_from_running(stage: Any, entries: list[dict[str, Any]], runtime: Any) -> None:
    other = {**entries[1], "tensorrt_version": "1.6.0"}
    runnable, others = split_engines(stage.path.parent, [entries[2], entries[0], other], A100)
    assert not runnable
    assert [one["stage"] for one in others] == ["engine a100-80gb-fp16"]
    assert "built by tensorrt-rtx 1.6.0" in others[0]["reason"]
    (engine,), _ = split_engines(stage.path.parent, entries[::-1], A100)
    assert [plan["part"] for plan in engine["plans"]] == [0, 1, 2]


def test_engines_in_one_plan_stand_alone() -> None:
    entries = [{"file": "engines/a/part-00.plan", "folder": "a"}, {"file": "engines/b/part-00.plan", "folder": "b"}]
    assert whole_engines(entries) == [[entries[0]], [entries[1]]]
