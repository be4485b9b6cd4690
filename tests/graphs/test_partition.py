"""graphs/partition.py: cuts joined are the whole, nothing is lost or repeated, and a graph that can't be cut says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from artifact.layout import MODULE_KEY, layer_of
from artifact.steps import StepContext
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.partition import cut_layer, cut_shared, cut_tail, layer_count
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
from validation.node_runner import run_nodes

LAYERS = 3
STAGES = ["traced", "fused", "int8"]
SMALL = """<ir_version: 10, opset_import: ["" : 23]>
g (int64[1,N] ids, float[1,M,4] past0, float[1,M,4] past1) => (float[1,N,4] logits, float[1,T,4] present0, float[1,T,4] present1)
<float[2,4] table = {0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0}, float[1] two = {2.0}>
{
    embedded = Gather(table, ids)
    shared = Cast<to=1>(ids)
    mask = Unsqueeze(shared, axis)
    a0 = Mul(embedded, mask)
    present0 = Concat<axis=1>(past0, a0)
    h0 = Add(embedded, a0)
    a1 = Mul(h0, mask)
    present1 = Concat<axis=1>(past1, a1)
    h1 = Add(h0, a1)
    normed = Mul(h1, two)
    logits = Sigmoid(normed)
}""".replace("float[1] two", "int64[1] axis = {2}, float[1] two")
MODULES = {"embedded": "model.embed_tokens", "a0": "model.layers.0.mlp", "present0": "model.layers.0", "h0": "model.layers.0"}
MODULES |= {"a1": "model.layers.1.mlp", "present1": "model.layers.1", "h1": "model.layers.1", "normed": "model.norm", "logits": "lm_head"}


def small(text: str = SMALL, **modules: str) -> ir.Model:
    """A two-layer graph; ``modules`` says which value is computed by which module."""
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.name = str(node.outputs[0].name)
        node.metadata_props[MODULE_KEY] = (MODULES | modules).get(node.name, "")
    return model


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer artifact, traced, fused and quantised."""
    folder = tmp_path_factory.mktemp("artifact")
    step = StepContext(folder)
    export_checkpoint(step, open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "three", num_hidden_layers=LAYERS))))
    fuse_artifact(step)
    quantize_int8(step)
    return folder


def cuts(model: ir.Model) -> list[ir.Model]:
    return [cut_shared(model), *(cut_layer(model, layer) for layer in range(layer_count(model))), cut_tail(model)]


def chunk_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """A chunk of six tokens behind four cached ones, two rows, the second padded on the left."""
    rng = np.random.default_rng(0)
    mask = np.ones((2, 10), np.int64)
    mask[1, :3] = 0
    feeds = {"input_ids": rng.integers(0, 64, (2, 6)), "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, 4:]}
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            assert value.shape is not None
            feeds[str(value.name)] = rng.standard_normal((2, int(value.shape[1]), 4, int(value.shape[3]))).astype(np.float16)
    return feeds


@pytest.mark.trace
@pytest.mark.parametrize("stage", STAGES)
def test_joined_cuts_are_the_whole_graph_bit_for_bit(artifact: Path, stage: str) -> None:
    model = ir.load(artifact / f"{stage}.onnx")
    feeds = chunk_feeds(model)
    whole = run_nodes(model, feeds)
    values, outputs = dict(feeds), {}
    for part in cuts(model):
        outputs |= run_nodes(part, values)
        values |= outputs
    assert len(whole) == 1 + 2 * LAYERS
    for name, expected in whole.items():
        np.testing.assert_array_equal(outputs[name], expected, err_msg=name)


@pytest.mark.trace
@pytest.mark.parametrize("stage", STAGES)
def test_every_node_is_in_one_cut(artifact: Path, stage: str) -> None:
    model = ir.load(artifact / f"{stage}.onnx")
    before = [str(node.name) for node in model.graph]
    found = Counter(str(node.name) for part in cuts(model) for node in part.graph)
    assert found == Counter(before)
    assert [str(node.name) for node in model.graph] == before  # cutting leaves the model as it is


@pytest.mark.trace
@pytest.mark.parametrize("stage", STAGES)
def test_layer_cut_begins_and_ends_with_the_hidden_state(artifact: Path, stage: str) -> None:
    model = ir.load(artifact / f"{stage}.onnx")
    previous = cut_shared(model).graph.outputs[0].name
    for layer in range(LAYERS):
        part = cut_layer(model, layer).graph
        assert part.inputs[0].name == previous
        assert [value.name for value in part.outputs[1:]] == [f"present.{layer}.key", f"present.{layer}.value"]
        assert {f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"} <= {value.name for value in part.inputs}
        assert {layer_of(node.metadata_props[MODULE_KEY]) for node in part} == {layer}
        assert all(layer_of(name) in (None, layer) for name in part.initializers)
        previous = part.outputs[0].name
    tail = cut_tail(model).graph
    assert (tail.inputs[0].name, [value.name for value in tail.outputs]) == (previous, ["logits"])


@pytest.mark.trace
@pytest.mark.parametrize("stage", STAGES)
def test_cut_weights_point_into_the_same_files(artifact: Path, stage: str) -> None:
    model = ir.load(artifact / f"{stage}.onnx")
    for name, value in cut_layer(model, 1).graph.initializers.items():
        ours, theirs = value.const_value, model.graph.initializers[name].const_value
        if isinstance(theirs, ir.ExternalTensor):
            assert isinstance(ours, ir.ExternalTensor)
            assert (ours.path, ours.offset, ours.length) == (theirs.path, theirs.offset, theirs.length)


def test_shared_cut_gives_the_embedded_tokens_first_and_reads_no_cache() -> None:
    part = cut_shared(small()).graph
    assert [value.name for value in part.inputs] == ["ids"]
    assert [value.name for value in part.outputs] == ["embedded", "mask"]


def test_cut_lists_what_a_layer_reads() -> None:
    part = cut_layer(small(), 1).graph
    assert [value.name for value in part.inputs] == ["h0", "mask", "past1"]
    assert [value.name for value in part.outputs] == ["h1", "present1"]


def test_graph_without_module_paths_is_refused_with_a_hint() -> None:
    model = small()
    for node in model.graph:
        node.metadata_props.clear()
    with pytest.raises(FusionError, match="no node of the graph names its layer") as caught:
        layer_count(model)
    assert caught.value.hint


def test_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(FusionError, match="no nodes of layer 2; it has 2 layers"):
        cut_layer(small(), 2)


def test_gap_in_the_layers_is_refused() -> None:
    model = small(a1="model.layers.2", present1="model.layers.2", h1="model.layers.2")
    with pytest.raises(FusionError, match="nodes of layer 2, but none of layer 1"):
        layer_count(model)


@pytest.mark.parametrize(
    ("text", "modules", "cut", "message"),
    [
        (
            SMALL.replace("h1 = Add(h0, a1)", "h1 = Add(a0, a1)"),
            {},
            1,
            r"layer 1 must read one value of model.layers.0, .*; it reads h0 .*, a0 \(Mul",
        ),
        (SMALL.replace("h1 = Add(h0, a1)", "h1 = Add(a0, a1)"), {}, 0, r"layer 0 must give one value .*; it gives those of a0 .*, h0 \(Add"),
        (SMALL, {"embedded": "model.other"}, 0, r"layer 0 must read one value of model.embed_tokens, .*; it reads none"),
        (SMALL, {"h0": ""}, 1, r"layer 1 must read one value of model.layers.0, .*; it reads none"),
    ],
    ids=["two-in", "two-out", "no-embedding", "lost-module"],
)
def test_layer_without_one_hidden_state_is_refused_by_name(text: str, modules: dict[str, str], cut: int, message: str) -> None:
    with pytest.raises(FusionError, match=message):
        cut_layer(small(text, **modules), cut)


def test_shared_value_that_depends_on_a_layer_is_refused_by_name() -> None:
    model = small(SMALL.replace("a1 = Mul(h0, mask)", "late = Neg(a0)\n    a1 = Mul(h0, late)"))
    with pytest.raises(FusionError, match=r"must not depend on a layer; they do on a0 \(Mul, model.layers.0.mlp\)"):
        cut_shared(model)
