"""What rounds its activations to eight bits is sound in float16, and what overflows is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from artifact.calibration import CALIBRATION
from artifact.errors import ValidationError
from artifact.layout import MODULE_KEY
from artifact.steps import StepContext, run_step
from commands import graphs
from exporter.checkpoints import Checkpoint, open_checkpoint
from exporter.export import export_checkpoint
from graphs.quantize.int8_smoothquant import quantize_int8_smoothquant
from graphs.quantize.statistics import Statistics
from validation.artifact_weights import artifact_reader
from validation.bisect.walk import _limit
from validation.calibration import write_statistics
from validation.calibration_text import CalibrationText
from validation.oracle import Oracle
from validation.reference import Reference

pytestmark = pytest.mark.parity
Narrow = Callable[..., dict[str, Any]]
KEPT = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def rounded(stages: Path, three_layers: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages that round activations too; the input of one linear is kept."""
    artifact = Path(shutil.copytree(stages, tmp_path_factory.mktemp("rounded") / "three"))
    sequences = tuple(np.random.default_rng(seed).integers(3, 64, 40) for seed in range(2))
    reference = Reference(three_layers.config, artifact_reader(artifact))
    write_statistics(StepContext(artifact), reference, CalibrationText(sequences, None, "ids", "", 1), "", CALIBRATION)
    quantize_int8_smoothquant(StepContext(artifact), Statistics(artifact / "calibration.safetensors"), kept={KEPT: "to differ from the others"})
    graphs.fuse(artifact, target="onnxruntime")
    for scheme in ("int8", "int4"):
        graphs.quantize(artifact, scheme=scheme, target="onnxruntime")
    return artifact


@pytest.mark.parametrize("stage", ["int8-smoothquant", "int8-onnxruntime", "int4-onnxruntime"])
def test_rounded_activations_are_no_fault_of_float16(rounded: Path, oracle: Oracle, narrower: Callable[[Oracle, Path], Narrow], stage: str) -> None:
    report = narrower(oracle, rounded)(stage, worst_local_layer=2)
    assert (report["found"], report["complete"]) == (None, True)
    assert report["looked_at"]["tensors"] > 200


def test_a_linear_that_is_kept_in_one_layer_is_no_culprit(rounded: Path, oracle: Oracle, narrower: Callable[[Oracle, Path], Narrow]) -> None:
    """Its spelling is unlike the other layers', and it computes what it should: the Mul behind it does not."""

    def scale(model: ir.Model) -> None:
        product = next(node for node in model.graph if node.metadata_props.get(MODULE_KEY) == KEPT and node.op_type == "MatMul")
        output, factor = product.outputs[0], np.array(1.01, product.outputs[0].dtype.numpy())
        users = list(output.uses())
        value = ir.Value(name="factor", const_value=ir.tensor(factor, name="factor"))
        model.graph.register_initializer(value)
        node = ir.node("Mul", [output, value], name="scaled", metadata_props=dict(product.metadata_props))
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "scaled.out", output.type, output.shape
        model.graph.append(node)
        for user, index in users:
            user.replace_input_with(index, node.outputs[0])
        model.graph.sort()

    found = narrower(oracle, rounded)("int8-smoothquant", scale, first_layer_outside=1)["found"]
    assert (found["kind"], found["layer"], found["node"]) == ("arithmetic", 1, "scaled")


def test_what_overflows_in_float16_is_named_though_the_trace_overflows_too(
    make_checkpoint: Callable[..., Path], oracle_of: Callable[..., Oracle], narrower: Callable[[Oracle, Path], Narrow], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "large", num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 5e3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint, artifact = open_checkpoint(str(folder)), tmp_path / "artifact"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    report = narrower(oracle_of(checkpoint, artifact, "dynamic"), artifact)("traced", worst_local_layer=0)
    found = report["found"]
    assert (found["kind"], found["op"], found["module"], found["error"], found["allowed"]) == ("rounding", "Mul", "model.layers.0.mlp", None, None)
    assert "is off by not finite (no limit)" in report["words"]
    assert report["looked_at"]["notes"] == ["layer 0: from mlp on nothing has a limit in prefill: the model's own trace overflows float16 there"]


def test_a_packed_projection_has_the_largest_limit_of_its_members_and_none_is_an_error() -> None:
    allowed = {"mlp.gate_proj": 0.1, "mlp.up_proj": 0.3}
    assert _limit("mlp.gate_up_proj", allowed) == 0.3
    with pytest.raises(ValidationError, match="mlp has no limit: the model's own trace has no such tensor"):
        _limit("mlp", allowed)
