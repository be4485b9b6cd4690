"""engines/backends/static_network.py, on networks that TensorRT parsed: lengths are put back, and a build without them is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.errors import EngineError
from artifact.progress import silent
from engines.audit import audit_plan
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.lengths import lengths_by_attention
from engines.profiles import make_profiles
from engines.targets import find_target

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
static_network = pytest.importorskip("engines.backends.static_network")
Make = Callable[..., Any]
LAYERS = 2
ROOT = Path(__file__).resolve().parents[3]


def static_stage(make_stage: Make, folder: Path) -> Any:
    return make_stage(folder, LAYERS, "fp16", kv_cache="static")


@pytest.fixture
def parsed(make_stage: Make, tmp_path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A network as the parser leaves it, and what the graph says of lengths."""
    graph = static_stage(make_stage, tmp_path).engine_graph
    logger = trt.Logger(trt.ILogger.Severity.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph))
    yield network, lengths_by_attention(ir.load(graph).graph)
    del network, parser, builder  # in this order: each owns what the one before uses


def test_the_parser_drops_the_lengths(parsed: tuple[Any, dict[str, str]]) -> None:
    """Once it does not, this file has nothing left to do."""
    network, lengths_of = parsed
    assert [one.name for one in static_network.attentions(network)] == list(lengths_of) == ["node_l0_attention", "node_l1_attention"]
    assert {one.causal_kind for one in static_network.attentions(network)} == {trt.CausalMaskKind.UPPER_LEFT}
    assert [one.key_value_lengths for one in static_network.attentions(network)] == [None] * LAYERS


def test_gives_every_attention_its_lengths(parsed: tuple[Any, dict[str, str]]) -> None:
    network, lengths_of = parsed
    assert static_network.prepare_static(network, lengths_of, 2 * LAYERS) == {"attention_by_lengths": LAYERS, "caches_in_place": 2 * LAYERS}
    for one in static_network.attentions(network):
        assert one.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
        assert one.key_value_lengths.dtype == trt.int32
        assert not one.decomposable


def test_a_layer_without_lengths_is_refused_by_name(parsed: tuple[Any, dict[str, str]]) -> None:
    network, lengths_of = parsed
    static_network.give_lengths(network, {"node_l0_attention": lengths_of["node_l0_attention"]})
    words = r"1 attention layers of the network are masked by lengths, 2 of the graph: 'node_l1_attention' lacks them"
    with pytest.raises(EngineError, match=words):
        static_network.check_static(network, lengths_of, 2 * LAYERS)


def test_lengths_that_the_graph_does_not_ask_for_are_refused(parsed: tuple[Any, dict[str, str]]) -> None:
    network, lengths_of = parsed
    static_network.give_lengths(network, lengths_of)
    with pytest.raises(EngineError, match="2 attention layers of the network are masked by lengths, 1 of the graph"):
        static_network.check_static(network, {"node_l0_attention": "key_value_lengths"}, 2 * LAYERS)


def test_a_mask_aligned_to_the_wrong_corner_is_refused(parsed: tuple[Any, dict[str, str]]) -> None:
    network, lengths_of = parsed
    static_network.give_lengths(network, lengths_of)
    next(iter(static_network.attentions(network))).causal_kind = trt.CausalMaskKind.UPPER_LEFT
    with pytest.raises(EngineError, match="'node_l0_attention' lacks them"):
        static_network.check_static(network, lengths_of, 2 * LAYERS)


def test_a_cache_that_is_no_output_is_refused(parsed: tuple[Any, dict[str, str]]) -> None:
    network, lengths_of = parsed
    network.unmark_output(next(tensor for tensor in map(network.get_output, range(network.num_outputs)) if tensor.name == "present.1.key"))
    with pytest.raises(EngineError, match="updates 3 caches in place, from a network input to a network output; the graph has 4"):
        static_network.prepare_static(network, lengths_of, 2 * LAYERS)


def test_the_worker_refuses_a_graph_whose_lengths_it_cannot_give(make_stage: Make, tmp_path: Path) -> None:
    graph = static_stage(make_stage, tmp_path).engine_graph
    model = ir.load(graph)
    for node in model.graph:
        node.name = "same" if node.op_type == "Attention" else node.name
    ir.save(model, graph)
    with pytest.raises(EngineError, match="attention 'same' can't be masked by lengths in TensorRT: another node has its name"):
        TensorRTRTX().build(BuildRequest(graph, tmp_path / "x.plan", find_target("a100"), ()), silent)
    assert not (tmp_path / "x.plan").exists()


FORGETFUL = """
import engines.backends.static_network as network
network.give_lengths = lambda network, lengths_of: None
{more}
import engines.backends.tensorrt_rtx_worker as worker
worker.answer(worker.build)
"""


def forgetful_worker(stage: Any, plan: Path, more: str = "") -> dict[str, Any]:
    """The last word of a worker that gives no lengths."""
    profiles = make_profiles(stage.config, "fp16", "static", max_batch=2, max_length=128)
    shapes = [dict(profile.shapes) for profile in profiles]
    request = {"graph": str(stage.engine_graph), "plan": str(plan), "compute_capability": [8, 0], "profiles": shapes}
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORGETFUL.format(more=more)]
    result = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_a_worker_that_forgets_the_lengths_builds_nothing(make_stage: Make, tmp_path: Path) -> None:
    answer = forgetful_worker(static_stage(make_stage, tmp_path), tmp_path / "x.plan")
    assert "0 attention layers of the network are masked by lengths, 2 of the graph" in answer["error"]
    assert not (tmp_path / "x.plan").exists()


def test_a_plan_without_lengths_fails_the_audit(make_stage: Make, built: Callable[..., tuple[Any, Path]], tmp_path: Path) -> None:
    """If the check of the network were gone too, the plan itself would tell."""
    stage = static_stage(make_stage, tmp_path)
    answer = forgetful_worker(stage, tmp_path / "x.plan", "network.check_static = lambda network, lengths_of, n_caches: {}")
    assert "result" in answer
    options = {"precision": "fp16", "profiles": ["prefill", "decode"], "config": stage.config}
    audit = audit_plan(tmp_path / "x.plan", stage.engine_graph, **options)["audit"]
    assert [check["check"] for check in audit["checks"] if check["passed"] is False] == ["lengths_read_prefill", "lengths_read_decode"]
    sound_stage, sound_plan = built(LAYERS, kv_cache="static")
    sound = audit_plan(sound_plan, sound_stage.engine_graph, **options)["audit"]
    assert sound["passed"]
    assert {check["check"]: check["value"] for check in sound["checks"] if "in_place" in check["check"]} == {
        "caches_in_place_prefill": 2 * LAYERS,
        "caches_in_place_decode": 2 * LAYERS,
    }
