"""Saboteurs inside a layer: each is put into a real graph, found, and named with its layer; the whole graph in ONNX Runtime is shown to miss it.

The damage is nodes inserted into the graph, as a wrong fusion would leave them: the weights are sound, so no checksum can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from artifact.layout import MODULE_KEY
from artifact.steps import StepContext
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
from validation.calls import left_padded
from validation.graph_runner import call_feeds
from validation.local_ratio import float16_layer_errors, local_ratios
from validation.ranges import audit_ranges
from validation.reference import Reference
from validation.scenarios import Scenario
from validation.strict import run_strict

pytestmark = pytest.mark.parity
LAYERS, MIDDLE, TOKENS = 5, 2, 64
LINEARS = {
    "traced": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "fused": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}
CASES = [(stage, linear) for stage, linears in LINEARS.items() for linear in linears]


@dataclass(frozen=True)
class Subject:
    """A five-layer artifact with what the reference computed on one text."""

    artifact: Path
    hidden: list[np.ndarray]
    float16_errors: list[float]
    logits: np.ndarray
    feeds: dict[str, np.ndarray]

    def ratios(self, model: ir.Model) -> list[float]:
        ratios = local_ratios(model, self.hidden, self.float16_errors)
        assert ratios is not None
        return ratios

    def whole_graph_error(self, model: ir.Model, name: str) -> float:
        """mean |logit − reference| as ONNX Runtime computes the whole graph, at its default optimisation."""
        path = self.artifact / f"{name}.onnx"
        ir.save(model, path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        logits = np.asarray(session.run(["logits"], self.feeds)[0])[0].astype(np.float32)
        return float(np.abs(logits - self.logits).mean())


@pytest.fixture(scope="module")
def subject(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Subject:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": LAYERS}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "five", **shape)))
    artifact = tmp_path_factory.mktemp("artifact")
    step = StepContext(artifact)
    export_checkpoint(step, checkpoint)
    fuse_artifact(step)
    quantize_int8(step)
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, TOKENS)
    reference = Reference(checkpoint.config, checkpoint.read)
    run = reference.run([ids], keep_hidden=[0])[0]
    assert run.hidden is not None
    feeds = call_feeds(checkpoint.config, "fp16", next(left_padded(Scenario("prefill", (ids,), (0,), (TOKENS,)).turns())))
    return Subject(artifact, run.hidden, float16_layer_errors(reference, run.hidden), run.logits(), feeds)


def scale_linear(model: ir.Model, module: str, factor: float, *, entering: bool = False) -> None:
    """Multiply what leaves a linear (or what enters it) by a constant, in a node of its own."""
    product = next(node for node in model.graph if node.op_type == "MatMul" and node.metadata_props.get(MODULE_KEY) == module)
    linear = beside_casts(product)[0 if entering else 1]
    value = linear.inputs[0] if entering else linear.outputs[0]
    assert value is not None
    name = f"saboteur_{factor}"
    constant = ir.Value(name=name, const_value=ir.tensor(np.float16(factor), name=name), type=value.type, shape=ir.Shape([]))
    model.graph.register_initializer(constant)
    scaled = ir.Node("", "Mul", [value, constant], name=f"{name}.Mul", metadata_props={MODULE_KEY: module})
    scaled.outputs[0].name, scaled.outputs[0].type, scaled.outputs[0].shape = f"{name}.scaled", value.type, value.shape
    users = [(linear, 0)] if entering else [(node, index) for node, index in value.uses() if node is not scaled]
    for node, index in users:
        node.replace_input_with(index, scaled.outputs[0])
    (model.graph.insert_before if entering else model.graph.insert_after)(linear, scaled)


def beside_casts(product: ir.Node) -> tuple[ir.Node, ir.Node]:
    """Where float16 enters and leaves a product that adds up in float32: its casts; the product itself where it has none."""
    before, after = product.inputs[0].producer(), product.outputs[0].consumers()[0]
    return before if before.op_type == "Cast" else product, after if after.op_type == "Cast" else product


def load(subject: Subject, stage: str) -> ir.Model:
    return ir.load(subject.artifact / f"{stage}.onnx")


@pytest.mark.parametrize("stage", ["traced", "fused"])
def test_undamaged_layers_are_below_float16s_own_error(subject: Subject, stage: str) -> None:
    assert max(subject.ratios(load(subject, stage))) < 1.2


@pytest.mark.parametrize(("stage", "linear"), CASES)
@pytest.mark.parametrize("factor", [1.05, 1.01])
def test_scaled_linear_is_found_in_its_layer_and_in_no_other(subject: Subject, stage: str, linear: str, factor: float) -> None:
    model = load(subject, stage)
    scale_linear(model, f"model.layers.{MIDDLE}.{linear}", factor)
    ratios = subject.ratios(model)
    assert ratios[MIDDLE] > 2.0
    assert max(ratio for layer, ratio in enumerate(ratios) if layer != MIDDLE) < 1.2


def test_quantised_layers_show_their_own_error_evenly(subject: Subject) -> None:
    """INT8 costs about ten times what float16 does, in every layer alike; a layer that stands out is damaged."""
    ratios = subject.ratios(load(subject, "int8"))
    assert min(ratios) > 2
    assert max(ratios) < 2 * min(ratios)
    damaged = load(subject, "int8")
    scale_linear(damaged, f"model.layers.{MIDDLE}.mlp.down_proj", 1.05)
    assert subject.ratios(damaged)[MIDDLE] > 2 * max(ratios)


@pytest.mark.parametrize("stage", ["traced", "fused"])
def test_overflow_is_found_by_strict_mode_and_ranges_where_the_whole_graph_hides_it(subject: Subject, stage: str) -> None:
    """× 2^15 before down_proj and ÷ 2^15 after it: nothing changes in float32, and float16 overflows in between."""
    sound, damaged = load(subject, stage), load(subject, stage)
    prefix = f"model.layers.{MIDDLE}.mlp"
    scale_linear(damaged, f"{prefix}.down_proj", 2.0**15, entering=True)
    scale_linear(damaged, f"{prefix}.down_proj", 2.0**-15)

    sound_error = subject.whole_graph_error(sound, "sound")
    assert subject.whole_graph_error(damaged, "damaged") == pytest.approx(sound_error, rel=0.1)  # finite and as good: missed

    clean, overflowed = run_strict(sound, subject.feeds), run_strict(damaged, subject.feeds)
    assert clean.first_nonfinite is None
    assert overflowed.first_nonfinite is not None
    assert prefix in overflowed.first_nonfinite
    assert overflowed.first_nonfinite_layer == MIDDLE
    assert not np.isfinite(overflowed.outputs["logits"]).all()

    audit = audit_ranges(damaged, subject.feeds)
    assert audit_ranges(sound, subject.feeds).peak_fraction < 0.5
    assert audit.peak_fraction >= 1.0
    assert audit.layer == MIDDLE
    assert audit.tensor.startswith(("saboteur", prefix))
    assert [line for line in audit.warnings if line.startswith(f"layer {MIDDLE}: {audit.tensor} reaches")]


def test_lost_attention_scale_is_found_in_its_layer(subject: Subject) -> None:
    """Queries left unscaled: softmax sharpens, every number stays finite."""
    model = load(subject, "traced")
    module = f"model.layers.{MIDDLE}.self_attn"
    scale_linear(model, f"{module}.q_proj", 4.0)  # head_dim^0.5: undoes the scale of the graph
    ratios = subject.ratios(model)
    assert int(np.argmax(ratios)) == MIDDLE
    assert ratios[MIDDLE] > 20
