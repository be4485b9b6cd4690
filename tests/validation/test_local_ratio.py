"""validation/local_ratio.py on a real trace; what damage does to it is in test_saboteurs_local.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from artifact.errors import ValidationError
from exporter.checkpoints import Checkpoint
from exporter.model import attention_allowed
from exporter.rope import rotary_tables
from validation import local_ratio
from validation.local_ratio import float16_layer_errors, local_ratios
from validation.reference import Reference

pytestmark = pytest.mark.trace
LENGTH = 40
Hidden = list[np.ndarray]


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference(checkpoint.config, checkpoint.read)


@pytest.fixture(scope="module")
def hidden(reference: Reference) -> Hidden:
    ids = np.arange(LENGTH) * 7 % reference.config.vocab_size
    states = reference.run([ids], keep_hidden=[0])[0].hidden
    assert states is not None
    return states


@pytest.fixture(scope="module")
def float16_errors(reference: Reference, hidden: Hidden) -> list[float]:
    return float16_layer_errors(reference, hidden)


def test_undamaged_layers_are_no_worse_than_float16(sound_artifact: Path, hidden: Hidden, float16_errors: list[float]) -> None:
    ratios = local_ratios(sound_artifact / "traced.onnx", hidden, float16_errors)
    assert ratios is not None
    assert len(ratios) == len(float16_errors) == 2
    assert 0.2 < min(ratios) <= max(ratios) < 1.2


def test_float16_layer_errors_are_those_of_pytorch_float16(reference: Reference, hidden: Hidden, float16_errors: list[float]) -> None:
    cos, sin = (table[None, None, :LENGTH] for table in rotary_tables(reference.config, torch.float16))
    mask = attention_allowed(torch.ones(1, LENGTH, dtype=torch.int64), LENGTH)
    past = torch.empty(1, reference.config.num_key_value_heads, 0, reference.config.head_dim, dtype=torch.float16)
    with torch.inference_mode():
        output, _ = reference.decoder_layer(1, torch.float16)(torch.from_numpy(hidden[1])[None].half(), cos, sin, mask, (past, past))
    assert float16_errors[1] == pytest.approx(np.abs(output[0].float().numpy() - hidden[2]).mean(), rel=0.05)


def test_only_the_first_tokens_count(
    monkeypatch: pytest.MonkeyPatch, reference: Reference, sound_artifact: Path, hidden: Hidden, float16_errors: list[float]
) -> None:
    """Causal: what later tokens are changes nothing, so a longer run need not be cut by the caller."""
    monkeypatch.setattr(local_ratio, "TOKENS", 16)
    cut = [state[:16] for state in hidden]
    assert float16_layer_errors(reference, hidden) == float16_layer_errors(reference, cut) != float16_errors
    assert local_ratios(sound_artifact / "traced.onnx", hidden, float16_errors) == local_ratios(sound_artifact / "traced.onnx", cut, float16_errors)


def test_model_in_memory_gives_the_same_as_its_file(sound_artifact: Path, hidden: Hidden, float16_errors: list[float]) -> None:
    path = sound_artifact / "traced.onnx"
    assert local_ratios(ir.load(path), hidden, float16_errors) == local_ratios(path, hidden, float16_errors)


FLOAT32 = """<ir_version: 10, opset_import: ["" : 23]>
g (int64[batch_size,sequence_length] input_ids) => (float[batch_size,sequence_length,4] logits)
<float[1,4] embedding = {1.0, 2.0, 3.0, 4.0}>
{
    embedded = Gather(embedding, input_ids)
    hidden = Sigmoid(embedded)
    logits = Neg(hidden)
}"""


def test_float32_graph_has_no_local_ratio() -> None:
    model = ir.from_onnx_text(FLOAT32)
    for node, module in zip(model.graph, ("model.embed_tokens", "model.layers.0.mlp", "lm_head"), strict=True):
        node.metadata_props["module"] = module
        node.outputs[0].dtype = ir.DataType.FLOAT
    assert local_ratios(model, [np.zeros((3, 4), np.float32)] * 2, [1.0]) is None


def test_another_number_of_layers_is_refused(sound_artifact: Path, hidden: Hidden, float16_errors: list[float]) -> None:
    with pytest.raises(ValidationError, match="the graph has 2 layers; the reference has 1"):
        local_ratios(sound_artifact / "traced.onnx", hidden[:2], float16_errors[:1])


def test_layer_that_cannot_be_run_is_named(sound_artifact: Path, hidden: Hidden, float16_errors: list[float]) -> None:
    model = ir.load(sound_artifact / "traced.onnx")
    node = next(node for node in model.graph if node.metadata_props["module"] == "model.layers.1.mlp")
    node.op_type = "NoSuchOperator"
    with pytest.raises(ValidationError, match="ONNX Runtime can't run layer 1 alone"):
        local_ratios(model, hidden, float16_errors)
