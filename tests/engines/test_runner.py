"""engines/runner.py: the session's caches, shapes and errors, held against the graph its plan was built from; real plans where there is a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from artifact import io_spec
from artifact.errors import EngineError
from artifact.hashing import sha256_of
from artifact.progress import silent
from artifact.steps import StepContext
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.device import Device, read_device
from engines.engine_graph import write_engine_graph
from engines.plan import Plan
from engines.profiles import make_profiles
from engines.runnable import why_not_here
from engines.runner import PlanSession
from engines.targets import TARGETS, Target
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from validation.calls import Call, left_padded
from validation.graph_runner import GraphRunner
from validation.scenarios import Scenario

A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * 2**30)
LAYERS, LENGTH = 2, 24
PROMPTS = (np.arange(9) * 37 % 512, np.arange(6) * 91 % 512)
"""Two rows; the second is padded on the left."""
CAPACITY = 16


@pytest.fixture(scope="module")
def stage(make_stage: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = make_stage(tmp_path_factory.mktemp("runner"), LAYERS, "fp16")
    assert made.engine_graph.is_file()
    return made


def profiles_of(stage: Any, *, max_batch: int = 2) -> dict[str, Any]:
    made = make_profiles(stage.config, "fp16", max_batch=max_batch, max_length=LENGTH)
    return {profile.name: dict(profile.axes) for profile in made}


@pytest.fixture
def entry(stage: Any, plan_on_cpu: ModuleType) -> dict[str, Any]:
    made: dict[str, Any] = plan_on_cpu.write_plan(stage.path.parent, stage.engine_graph.name, profiles_of(stage))
    return made


@pytest.fixture
def plan(stage: Any, entry: dict[str, Any], runtime: Any) -> Plan:
    return Plan(stage.path.parent, entry, A100)


def calls(*chunks: int) -> list[Call]:
    """A padded batch of two rows, cut into calls."""
    width = sum(chunks)
    rows = tuple(np.resize(prompt, width - 3 * row) for row, prompt in enumerate(PROMPTS))
    return list(left_padded(Scenario("any", rows, (0, 1), chunks).turns()))


@pytest.mark.parametrize("chunks", [(9,), (9, 1, 1, 1), (4, 5, 1, 3, 1), (1, 1, 1, 1, 1, 1)])
def test_session_gives_what_the_graph_gives_call_by_call(stage: Any, plan: Plan, runtime: Any, chunks: tuple[int, ...]) -> None:
    """Logits and caches, bit for bit: shapes grow, buffers change places, padding stays masked."""
    graph = GraphRunner(stage.engine_graph, stage.config, "fp16", one_position=True)
    session = PlanSession(plan, stage.config, "fp16", batch=2, length=LENGTH)
    cache = None
    for call in calls(*chunks):
        logits, *cache = graph.call(call, cache)
        np.testing.assert_array_equal(session.call(call.inputs()), logits)
        for ours, theirs in zip(session.caches(), cache, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert runtime.ran == [("decode" if size == 1 else "prefill", size) for size in chunks]


def test_restart_forgets(stage: Any, plan: Plan) -> None:
    session = PlanSession(plan, stage.config, "fp16", batch=2, length=LENGTH)
    first, second = calls(5, 4)
    expected = session.call(first.inputs())
    session.call(second.inputs())
    session.restart()
    np.testing.assert_array_equal(session.call(first.inputs()), expected)


def test_kernels_are_for_any_shape_and_a_context_is_made_once_a_profile(stage: Any, plan: Plan, runtime: Any) -> None:
    session = PlanSession(plan, stage.config, "fp16", batch=2, length=LENGTH)
    for call in calls(5, 1, 3, 1):
        session.call(call.inputs())
    assert runtime.strategies == [("NONE", "DISABLED")] * 2


def test_closing_gives_all_memory_back(stage: Any, plan: Plan, runtime: Any) -> None:
    with PlanSession(plan, stage.config, "fp16", batch=2, length=LENGTH) as session:
        session.call(calls(5)[0].inputs())
        assert len(runtime.memory.owned) == 2 * 2 * LAYERS + 4  # two sets of keys and values; three inputs and logits
        assert runtime.memory.streams == 1
    assert (len(runtime.memory.owned), runtime.memory.streams) == (0, 0)


def test_refuses_more_than_the_plan_admits(stage: Any, plan: Plan) -> None:
    with pytest.raises(EngineError, match=r"admits 2 rows of 24 positions, asked for 3 of 24") as error:
        PlanSession(plan, stage.config, "fp16", batch=3, length=LENGTH)
    assert "--max-batch" in str(error.value.hint)
    with pytest.raises(EngineError, match=r"admits 2 rows of 24 positions, asked for 2 of 25"):
        PlanSession(plan, stage.config, "fp16", batch=2, length=LENGTH + 1)


def test_refuses_a_call_that_its_buffers_do_not_hold(stage: Any, plan: Plan, runtime: Any) -> None:
    session = PlanSession(plan, stage.config, "fp16", batch=2, length=9)
    first, second = calls(9, 1)
    session.call(first.inputs())
    with pytest.raises(EngineError, match="the caches hold 2 rows of 9 positions, the call has 2 rows up to position 10"):
        session.call(second.inputs())
    with pytest.raises(EngineError, match="the call has 1 rows"):
        session.call({name: values[:1] for name, values in first.inputs().items()})
    assert len(runtime.ran) == 1


def test_a_shape_outside_the_profile_is_named(stage: Any, entry: dict[str, Any], plan_on_cpu: ModuleType, runtime: Any) -> None:
    narrow = profiles_of(stage)
    narrow["prefill"]["sequence_length"] = (1, 4, 4)
    plan = Plan(stage.path.parent, plan_on_cpu.write_plan(stage.path.parent, stage.engine_graph.name, narrow), A100)
    session = PlanSession(plan, stage.config, "fp16", batch=2, length=LENGTH)
    with pytest.raises(EngineError, match=r"input_ids \[2, 5\] is outside the prefill profile"):
        session.call(calls(5)[0].inputs())


@pytest.mark.parametrize(
    ("at", "words"),
    [("load", "the runtime can't load it"), ("context", "no execution context for prefill"), ("run", "prefill of 5 tokens did not run")],
)
def test_what_the_runtime_refuses_is_an_error_with_its_reason(stage: Any, entry: dict[str, Any], runtime: Any, at: str, words: str) -> None:
    runtime.broken = at
    with pytest.raises(EngineError, match=f"part-00.plan: {words}: broken at {at}"):
        PlanSession(Plan(stage.path.parent, entry, A100), stage.config, "fp16", batch=2, length=LENGTH).call(calls(5)[0].inputs())


def test_a_plan_that_fits_may_run(stage: Any, entry: dict[str, Any], runtime: Any) -> None:
    assert why_not_here(stage.path.parent, entry, A100) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"compute_capability": "8.9", "target": "l4"}, r"built for compute capability 8.9 \(l4\), this GPU \(NVIDIA A100-SXM4-80GB\) has 8.0"),
        ({"file": "engines/nowhere.plan"}, r"engines/nowhere.plan is not there"),
        ({"plan_sha256": "0" * 64}, r"is not the plan that was built \(SHA-256 .*…, expected 000000000000…\)"),
        ({"tensorrt_version": "1.6.0"}, r"built by tensorrt-rtx 1.6.0, here is 1.7.1.116"),
        ({"backend": "tvm"}, "no runtime is known for plans of 'tvm'"),
    ],
)
def test_says_why_a_plan_cannot_run_here(stage: Any, entry: dict[str, Any], runtime: Any, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words) as error:
        Plan(stage.path.parent, entry | changed, A100)
    assert "cli.py build" in str(error.value.hint)


@pytest.mark.parametrize(("built", "compatible", "runs"), [("1.6.9", True, True), ("1.6.9", False, False), ("1.8.0", True, False)])
def test_a_version_compatible_plan_runs_on_a_later_release(
    stage: Any, entry: dict[str, Any], runtime: Any, built: str, compatible: bool, runs: bool
) -> None:
    changed = entry | {"tensorrt_version": built, "flags": {"version_compatible": compatible}}
    assert (why_not_here(stage.path.parent, changed, A100) is None) == runs


def test_says_that_the_runtime_is_not_installed(stage: Any, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "its runtime can't be imported" in str(why_not_here(stage.path.parent, entry, A100))


def test_nothing_is_loaded_before_it_was_found_to_be_the_plan_that_was_built(
    stage: Any, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = stage.path.parent / entry["file"]
    plan.write_bytes(plan.read_bytes() + b" ")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace())  # whatever is asked of it fails
    with pytest.raises(EngineError, match="is not the plan that was built"):
        Plan(stage.path.parent, entry, A100)


@pytest.fixture(scope="module")
def static_graph(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The engine graph of a static cache, as the exporter wrote it."""
    artifact, checkpoint = tmp_path_factory.mktemp("static"), open_checkpoint(str(tiny_checkpoint))
    export_checkpoint(StepContext(artifact), checkpoint, kv_cache="static")
    write_engine_graph(artifact / "traced.onnx", artifact / "traced-engine.onnx", capacity=CAPACITY)
    return artifact, checkpoint.config


def static_feeds(start: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    rows, new = ids.shape
    return {
        io_spec.INPUT_IDS: ids,
        io_spec.POSITION_IDS: np.broadcast_to(np.arange(start, start + new), (rows, new)),
        io_spec.CACHE_WRITE_INDICES: np.full(rows, start),
        io_spec.KEY_VALUE_LENGTHS: np.full(rows, start + new),
        io_spec.LAST_TOKEN_INDICES: np.full(rows, new - 1),
    }


@pytest.fixture
def static_session(static_graph: tuple[Path, Any], plan_on_cpu: ModuleType, runtime: Any) -> PlanSession:
    artifact, config = static_graph
    axes = {io_spec.BATCH: (1, 2, 2), io_spec.CAPACITY: (CAPACITY,) * 3}
    profiles = {"prefill": axes | {io_spec.SEQUENCE: (1, 8, CAPACITY)}, "decode": axes | {io_spec.SEQUENCE: (1, 1, 1)}}
    entry = plan_on_cpu.write_plan(artifact, "traced-engine.onnx", profiles, capacity=CAPACITY)
    return PlanSession(Plan(artifact, entry, A100), config, "fp16", batch=2, length=CAPACITY)


@pytest.mark.trace
def test_a_fixed_cache_is_written_in_place(static_graph: tuple[Path, Any], static_session: PlanSession) -> None:
    """Against the same graph with the whole sequence in one call, and caches that start as zeros."""
    ids = np.random.default_rng(0).integers(0, 64, (2, 10))
    whole = static_session.call(static_feeds(0, ids))
    expected = static_session.caches()
    assert all(cache.shape == (2, 2, CAPACITY, 8) and cache[:, :, :10].any() and not cache[:, :, 10:].any() for cache in expected)
    static_session.restart()
    assert not any(cache.any() for cache in static_session.caches())
    for start, end in ((0, 5), (5, 8), (8, 9), (9, 10)):
        logits = static_session.call(static_feeds(start, ids[:, start:end]))
    np.testing.assert_allclose(logits, whole, atol=2e-3)
    for ours, theirs in zip(static_session.caches(), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.trace
def test_a_fixed_cache_is_never_written_past_its_end(static_session: PlanSession) -> None:
    ids = np.zeros((2, 7), np.int64)
    static_session.call(static_feeds(9, ids))
    with pytest.raises(EngineError, match="the caches hold 2 rows of 16 positions, the call has 2 rows up to position 17"):
        static_session.call(static_feeds(10, ids))


def target_here() -> Target:
    """A target of this GPU; a GPU for which none is built skips with that reason."""
    gpu = read_device()
    fitting = [target for target in TARGETS.values() if target.compute_capability == gpu.compute_capability]
    if not fitting:
        pytest.skip(f"no target has compute capability {gpu.compute_capability} ({gpu.name})")
    return fitting[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_real_plan_gives_what_its_graph_gives(make_stage: Callable[..., Any], tmp_path: Path, precision: str) -> None:
    """Built for the GPU that is there and run on it: prefill, chunk and decode, with the caches that they leave."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    target, stage = target_here(), make_stage(tmp_path, LAYERS, precision)
    made = make_profiles(stage.config, "fp16", max_batch=2, max_length=LENGTH)
    plan = tmp_path / "part-00.plan"
    result = TensorRTRTX().build(BuildRequest(stage.engine_graph, plan, target, tuple(made)), silent)

    entry = {
        "file": plan.name, "backend": "tensorrt-rtx", "tensorrt_version": result.version, "plan_sha256": sha256_of(plan), "target": target.name,
        "compute_capability": ".".join(map(str, target.compute_capability)), "profiles": {profile.name: dict(profile.axes) for profile in made},
    }  # fmt: skip
    graph = GraphRunner(stage.engine_graph, stage.config, "fp16", one_position=True)
    cache = None
    with PlanSession(Plan(tmp_path, entry, read_device()), stage.config, "fp16", batch=2, length=LENGTH) as session:
        for call in calls(6, 3, 1, 1):
            logits, *cache = graph.call(call, cache)
            np.testing.assert_allclose(session.call(call.inputs()), logits, rtol=0, atol=0.02 * np.abs(logits).max())
        pad = np.array([0, 3])
        for ours, theirs in zip(session.caches(), cache, strict=True):
            for row in (0, 1):  # what padding holds is nobody's business
                np.testing.assert_allclose(ours[row, :, pad[row] :], theirs[row, :, pad[row] :], rtol=0, atol=0.02 * np.abs(theirs).max())
