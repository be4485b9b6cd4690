"""`--min-tensorrt` on graphs that the real exporter made: only operators of that release, the same numbers, and refusals in words."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact import io_spec
from artifact.errors import FusionError, UsageError
from artifact.layout import layer_of
from artifact.manifest import read_manifest
from artifact.steps import StepContext
from commands.export import ExportOptions, export
from commands.graphs import fuse
from exporter.checkpoints import CheckpointRequest
from graphs import pipeline
from graphs.lower import OLD_IR_VERSION, OLD_OPSET, lower_to
from graphs.partition import cut_layer, cut_shared, cut_tail, layer_count
from graphs.tensorrt_releases import LATER, takes
from validation.node_runner import run_nodes
from validation.strict import run_strict

LAYERS = 2
VARIANTS = {"grouped-fp32": ({}, "fp32"), "multi-head-fp16": ({"num_key_value_heads": 4}, "fp16"), "grouped-fp16": ({}, "fp16")}
NEW = {"RMSNormalization": 2 * LAYERS + 1, "RotaryEmbedding": 2 * LAYERS, "Attention": LAYERS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_checkpoint):
    """Variant → a folder with `fused`, as by default, and `lowered`, for TensorRT 10.0; both with the report of the latter."""
    made = {}

    def make(variant):
        if variant not in made:
            fields, dtype = VARIANTS[variant]
            folder = tmp_path_factory.mktemp(variant)
            source = make_checkpoint(folder / "checkpoint", num_hidden_layers=LAYERS, **fields)
            export(CheckpointRequest(str(source)), folder / "fused", ExportOptions(dtype))
            shutil.copytree(folder / "fused", folder / "lowered")
            fuse(folder / "fused")
            made[variant] = folder, fuse(folder / "lowered", min_tensorrt="10.0").report
        return made[variant]

    return make


def feeds(artifact, past, new):
    model = read_manifest(artifact)["model"]
    generator, config = np.random.default_rng(0), model["config"]
    shape = (1, config["num_key_value_heads"], past, config["head_dim"])
    dtype = np.float16 if model["dtype"] == "fp16" else np.float32
    cache = {io_spec.past_name(i, kind): generator.standard_normal(shape).astype(dtype) for i in range(LAYERS) for kind in io_spec.CACHE_KINDS}
    ids = generator.integers(0, config["vocab_size"], (1, new))
    return {io_spec.INPUT_IDS: ids, io_spec.ATTENTION_MASK: np.ones((1, past + new), np.int64)} | {
        io_spec.POSITION_IDS: np.arange(past, past + new)[None],
        **cache,
    }


@pytest.mark.trace
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_operators_of_the_release_are_left(folders, variant) -> None:
    folder, report = folders(variant)
    path = folder / "lowered" / "fused.onnx"
    model = ir.load(path)
    assert report["lowered"] == NEW
    assert (report["min_tensorrt"], report["needs_tensorrt"]["release"], report["passed"]) == ("10.0", "10.0", True)
    assert all(takes("10.0", node.op_type) for node in model.graph)
    assert not LATER.keys() & {node.op_type for node in model.graph}
    assert (dict(model.opset_imports), model.ir_version) == ({"": OLD_OPSET}, OLD_IR_VERSION)
    assert all(value.dtype is not None and value.shape is not None for node in model.graph for value in node.outputs)
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.trace
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("past", "new"), [(0, 7), (5, 1), (5, 4)])
def test_numbers_stay(folders, variant, past, new) -> None:
    folder, _ = folders(variant)
    made, outputs = feeds(folder / "fused", past, new), []
    for stage in ("fused", "lowered"):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(folder / stage / "fused.onnx", options, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, made))
    limit = 1e-5 if variant.endswith("fp32") else 5e-3
    for fused, lowered in zip(*outputs, strict=True):
        assert fused.dtype == lowered.dtype
        assert np.abs(fused.astype(np.float64) - lowered).max() <= limit * np.abs(fused).max()


@pytest.mark.trace
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith("fp16")])
def test_float16_noise_does_not_grow(folders, variant) -> None:
    """Against the trace, whose form it takes again."""
    folder, _ = folders(variant)
    traced, lowered = (ir.load(folder / "lowered" / f"{stage}.onnx") for stage in ("traced", "fused"))
    noise = {"traced": 0.0, "lowered": 0.0}
    for past, new in ((0, 32), (7, 24), (40, 8)):
        made = feeds(folder / "fused", past, new)
        exact = run_nodes(traced, made, float32=True)["logits"]
        for name, model in (("traced", traced), ("lowered", lowered)):
            noise[name] += float(np.abs(run_strict(model, made).outputs["logits"].astype(np.float64) - exact).mean())
    assert 0 < noise["lowered"] <= 1.1 * noise["traced"]


@pytest.mark.trace
def test_what_layers_share_stays_outside_them_and_is_computed_once(folders) -> None:
    folder, report = folders("grouped-fp16")
    model = ir.load(folder / "lowered" / "fused.onnx")
    assert layer_count(model) == LAYERS
    for cut in (cut_shared(model), *(cut_layer(model, layer) for layer in range(LAYERS)), cut_tail(model)):
        assert cut.graph.num_nodes()
    assert len(report["layer_operators"]["groups"]) == 1
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    assert len(gathers) == 3  # the embedding, cosines, sines
    assert all(layer_of(node.metadata_props["module"]) is None for node in gathers)


@pytest.mark.trace
def test_a_release_keeps_the_operators_it_takes(folders, tmp_path) -> None:
    folder, _ = folders("grouped-fp16")
    kinds = {}
    for release in ("10.13", "10.14", "10.15", "11.4"):
        artifact = tmp_path / release
        shutil.copytree(folder / "fused", artifact)
        report = fuse(artifact, min_tensorrt=release).report
        kinds[release] = report["lowered"], report["needs_tensorrt"]["release"], ir.load(artifact / "fused.onnx").opset_imports[""]
    rest = {name: count for name, count in NEW.items() if name != "Attention"}
    assert kinds == {"10.13": (NEW, "10.0", OLD_OPSET), "10.14": (rest, "10.14", 23), "10.15": ({}, "10.15", 23), "11.4": ({}, "10.15", 23)}
    assert (tmp_path / "11.4" / "fused.onnx").read_bytes() == (folder / "fused" / "fused.onnx").read_bytes()


@pytest.mark.trace
def test_the_release_is_an_option_of_the_step(folders, tmp_path) -> None:
    folder, _ = folders("grouped-fp16")
    shutil.copytree(folder / "lowered", tmp_path / "artifact")
    assert fuse(tmp_path / "artifact", min_tensorrt="10.0").up_to_date
    assert fuse(tmp_path / "artifact").reason == "options changed: min_tensorrt"
    assert (tmp_path / "artifact" / "fused.onnx").read_bytes() == (folder / "fused" / "fused.onnx").read_bytes()


@pytest.mark.trace
def test_an_unknown_release_and_one_of_another_target_are_usage_errors(folders, monkeypatch) -> None:
    folder, _ = folders("grouped-fp16")
    with pytest.raises(UsageError, match=r"'9\.3' is not a release that this version knows; it knows: 10\.0, "):
        fuse(folder / "fused", min_tensorrt="9.3")
    monkeypatch.setitem(pipeline.PIPELINES, "other", ())
    with pytest.raises(UsageError, match="--min-tensorrt is of --target tensorrt, not of other"):
        pipeline.fuse_artifact(StepContext(folder / "fused"), target="other", min_tensorrt="10.0")


X = "float16[B,4,S,8] x, float16[B,2,T,8] k"
REFUSED = {
    "interleaved": ("y = RotaryEmbedding <interleaved=1> (x, c, c, p)", "interleaved=1"),
    "a part of the head": ("y = RotaryEmbedding <rotary_embedding_dim=4> (x, c, c, p)", "rotary_embedding_dim=4"),
    "another scale": ("y = Attention <scale=0.5> (x, k, k, m)", "scale=0.5"),
    "causal": ("y = Attention <scale=1.0, is_causal=1> (x, k, k)", "is_causal=1"),
    "no scale": ("y = Attention (x, k, k, m)", "scale is not 1, but the default"),
    "softcap": ("y = Attention <scale=1.0, softcap=3.0> (x, k, k, m)", "softcap=3.0"),
    "a past": ("y = Attention <scale=1.0> (x, k, k, m, k, k)", "it has a past, lengths or a second output"),
    "a mask that is added": ("y = Attention <scale=1.0> (x, k, k, a)", "its mask FLOAT16"),
    "axis of a norm": ("y = RMSNormalization <axis=1> (x, w)", "it is not over the last axis, in float32"),
    "stash type of a norm": ("y = RMSNormalization <axis=-1, stash_type=10> (x, w)", "it is not over the last axis, in float32"),
    "dtype of a norm's weight": ("y = RMSNormalization <axis=-1> (x, v)", "the weight is FLOAT, the input FLOAT16"),
    "an operator without an older form": ("y = Swish (x)", "TensorRT 11.0 is the first that takes it, and it has no older form here"),
    "an operator of no release": ('y = TfIdfVectorizer <mode="TF"> (x)', "no known release takes it"),
    "a newer form of an old operator": ('y = Cast <to=10, round_mode="up"> (x)', "has no such form in opset 19"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_rule_of_ours_makes_is_refused_with_the_node(case) -> None:
    body, reason = REFUSED[case]
    others = "float16[9,4] c, int64[B,S] p, bool[B,1,S,T] m, float16[B,1,S,T] a, float16[8] w, float[8] v"
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["" : 24]> g ({X}, {others}) => (float16[B,4,S,8] y) {{ {body} }}')
    node = next(iter(model.graph))
    node.name = "the node"
    with pytest.raises(FusionError, match="the node") as caught:
        lower_to(model, "10.0")
    assert reason in str(caught.value)
    assert caught.value.hint is None or caught.value.hint.startswith(("--min-tensorrt 1", "fuse without --min-tensorrt"))
    assert (caught.value.hint is None) == (case == "a newer form of an old operator")
