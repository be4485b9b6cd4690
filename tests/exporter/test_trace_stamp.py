"""The one-layer trace, and the stamp that makes it a whole model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx_ir as ir
import pytest

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.layout import MODULE_KEY, tensor_shapes
from exporter.stamp import stamp_layers
from exporter.trace import trace_model
from graphs.diff import compare_graphs

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
VARIANTS = [
    pytest.param(CONFIG, 1, id="grouped-untied-1"),
    pytest.param(CONFIG, 3, id="grouped-untied-3"),
    pytest.param(replace(CONFIG, num_key_value_heads=4, tie_word_embeddings=True), 2, id="multi-head-tied-2"),
    pytest.param(replace(CONFIG, attention_bias=True), 1, id="grouped-attention-bias-1"),
    pytest.param(replace(CONFIG, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), 3, id="grouped-all-biases-tied-3"),
    pytest.param(replace(CONFIG, num_key_value_heads=4, mlp_bias=True, head_dim=16), 2, id="multi-head-mlp-bias-wide-heads-2"),
]


def stamped(config: LlamaConfig, layers: int) -> ir.Model:
    return stamp_layers(trace_model(config, "fp16"), replace(config, num_hidden_layers=layers))


@pytest.mark.trace
@pytest.mark.parametrize(("config", "layers"), VARIANTS)
def test_stamped_graph_is_isomorphic_to_the_full_trace(config: LlamaConfig, layers: int) -> None:
    full, ours = trace_model(replace(config, num_hidden_layers=layers), "fp16"), stamped(config, layers)
    difference = compare_graphs(full, ours)
    assert difference.same, difference
    assert ours.graph.num_nodes() == full.graph.num_nodes()
    assert {name for name in ours.graph.initializers if name.startswith(("model.", "lm_head"))} - set(
        tensor_shapes(replace(config, num_hidden_layers=layers))
    ) == {"model.rotary_emb.cos", "model.rotary_emb.sin"}


@pytest.mark.trace
def test_trace_is_plain_operations_with_the_contract_io() -> None:
    model = stamped(CONFIG, 2)
    kinds = Counter(node.op_type for node in model.graph)
    assert not {"RMSNormalization", "RotaryEmbedding", "Attention", "Swish"} & kinds.keys()
    assert kinds["Softmax"] == 2
    assert kinds["Sqrt"] == 5  # two norms a layer and the final one
    deep = replace(CONFIG, num_hidden_layers=2)
    for values, specs in ((model.graph.inputs, io_spec.graph_inputs(deep, "fp16")), (model.graph.outputs, io_spec.graph_outputs(deep, "fp16"))):
        assert [value.name for value in values] == [spec.name for spec in specs]
        assert [tuple(size if isinstance(size, int) else size.value for size in value.shape or ()) for value in values] == [
            spec.shape for spec in specs
        ]
    assert all(set(node.metadata_props) == {MODULE_KEY} for node in model.graph)
    assert {node.metadata_props[MODULE_KEY] for node in model.graph} >= {"model.layers.1.self_attn.q_proj", "model.layers.1", "model.norm", "lm_head"}
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


@pytest.mark.trace
def test_trace_is_the_same_every_time() -> None:
    texts = [ir.to_proto(stamped(CONFIG, 2)).SerializeToString(deterministic=True) for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.trace
def test_softmax_runs_in_float32() -> None:
    softmax = next(node for node in stamped(CONFIG, 1).graph if node.op_type == "Softmax")
    assert softmax.inputs[0] is not None
    assert softmax.inputs[0].dtype == ir.DataType.FLOAT
