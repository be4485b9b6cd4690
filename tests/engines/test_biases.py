"""A model with biases, from its checkpoint to a real plan: the packed form stays, and the audit looks for every bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from artifact.config import LlamaConfig
from artifact.progress import silent
from artifact.steps import run_step
from engines.audit import audit_plan
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.engine_graph import write_engine_graph
from engines.graph_weights import find_biases
from engines.profiles import make_profiles
from engines.targets import find_target
from engines.weight_search import Copies, count_copies
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact

pytestmark = pytest.mark.trace
LAYERS = 2
SHAPE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 256, "num_hidden_layers": LAYERS}
BIAS = "model.layers.1.mlp.gate_up_proj.bias"


@pytest.fixture(scope="module")
def engine_graph(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("biased")
    checkpoint = open_checkpoint(str(make_checkpoint(root / "checkpoint", **SHAPE, attention_bias=True, mlp_bias=True)))
    run_step(root / "artifact", "export", {}, lambda step: export_checkpoint(step, checkpoint))
    run_step(root / "artifact", "fuse", {}, fuse_artifact)
    write_engine_graph(root / "artifact" / "fused.onnx", root / "artifact" / "fused-engine.onnx")
    return root / "artifact" / "fused-engine.onnx"


@pytest.fixture(scope="module")
def config(engine_graph: Path) -> LlamaConfig:
    return open_checkpoint(str(engine_graph.parent.parent / "checkpoint")).config


@pytest.fixture(scope="module")
def plan(engine_graph: Path, config: LlamaConfig) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    path = engine_graph.with_name("model.plan")
    profiles = make_profiles(config, "fp16", max_batch=2, max_length=256)
    TensorRTRTX().build(BuildRequest(engine_graph, path, find_target("a100"), tuple(profiles)), silent)
    return path


def test_every_bias_is_found_in_the_graph_and_nothing_else(engine_graph: Path) -> None:
    names = [bias.name for bias in find_biases(ir.load(engine_graph).graph)]
    modules = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert sorted(names) == sorted(f"model.layers.{layer}.{module}.bias" for layer in range(LAYERS) for module in modules)


def test_a_bias_of_zeros_is_not_asked_for(engine_graph: Path) -> None:
    graph = ir.load(engine_graph).graph
    zeros = np.zeros(graph.initializers[BIAS].const_value.shape.numpy(), np.float16)
    graph.initializers[BIAS].const_value = ir.tensor(zeros, name=BIAS)
    assert BIAS not in [bias.name for bias in find_biases(graph)]


def test_a_plan_holds_packed_weights_once_and_every_bias(engine_graph: Path, plan: Path, config: LlamaConfig) -> None:
    result = audit_plan(plan, engine_graph, precision="fp16", profiles=["prefill", "decode"], config=config)
    assert [check for check in result["audit"]["checks"] if check["passed"] is False] == []
    assert result["bytes_per_weight"] == pytest.approx(2.0, abs=0.02)


def test_a_bias_that_is_not_in_the_plan_is_named(engine_graph: Path, plan: Path, config: LlamaConfig, tmp_path: Path) -> None:
    stored = ir.load(engine_graph).graph.initializers[BIAS].const_value.tobytes()
    content = plan.read_bytes()
    assert content.count(stored) == 1
    other = tmp_path / "other.plan"
    other.write_bytes(content.replace(stored, np.random.default_rng(3).bytes(len(stored))))
    result = audit_plan(other, engine_graph, precision="fp16", profiles=["prefill", "decode"], config=config)
    assert [(check["check"], check["where"]) for check in result["audit"]["checks"] if check["passed"] is False] == [("weights_missing", BIAS)]


def test_a_vector_counts_in_both_layouts(engine_graph: Path, tmp_path: Path) -> None:
    bias = find_biases(ir.load(engine_graph).graph)[0]
    path = tmp_path / "x.plan"
    path.write_bytes(bytes(16) + bias.tensor.tobytes())
    assert count_copies(path, [bias]) == [Copies(bias.name, 1, 1)]
