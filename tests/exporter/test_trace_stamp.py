"""The one-layer trace, and the stamp that makes it a whole model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import onnx_ir as ir
import pytest

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.io_spec import KvCache
from artifact.layout import MODULE_KEY, tensor_shapes
from exporter.stamp import stamp_layers
from exporter.trace import trace_model
from exporter.trace_cache import traced_layer
from graphs.diff import compare_graphs

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=96,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
VARIANTS: list[tuple[KvCache, int, dict[str, Any]]] = [
    ("dynamic", 2, {}),
    ("static", 3, {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("static", 2, {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 16}),
    ("static", 2, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("dynamic", 3, {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 16}),
    ("dynamic", 3, {"tie_word_embeddings": True, "mlp_bias": True}),
]
"""Cache form, depth, and what differs from CONFIG (grouped, untied, no bias, heads of 8): each pair of choices is in one of them.
`python -m benchmarks.stamp_every_variant` tries all of them, and other depths."""


def stamped(config: LlamaConfig, layers: int, kv_cache: KvCache = "dynamic") -> ir.Model:
    """As export stamps it, of one layer's trace that may have been kept since another test."""
    model, _ = traced_layer(config, "fp16", kv_cache)
    return stamp_layers(model, replace(config, num_hidden_layers=layers))


def test_each_pair_of_choices_is_in_a_variant() -> None:
    names = sorted({name for _, _, choices in VARIANTS for name in choices})
    rows = [(kv_cache, layers, *(choices.get(name, getattr(CONFIG, name)) for name in names)) for kv_cache, layers, choices in VARIANTS]
    for one, two in combinations(zip(*rows, strict=True), 2):
        assert set(zip(one, two, strict=True)) == set(product(set(one), set(two)))


@pytest.mark.trace
@pytest.mark.parametrize(
    ("kv_cache", "layers", "choices"), VARIANTS, ids=lambda value: "+".join(value) or "grouped" if isinstance(value, dict) else None
)
def test_stamped_graph_is_isomorphic_to_the_full_trace(kv_cache: KvCache, layers: int, choices: dict[str, Any]) -> None:
    config = replace(CONFIG, **choices)
    deep = replace(config, num_hidden_layers=layers)
    full, ours = trace_model(deep, "fp16", kv_cache), stamped(config, layers, kv_cache)
    difference = compare_graphs(full, ours)
    assert difference.same, difference
    assert ours.graph.num_nodes() == full.graph.num_nodes()
    for values in (lambda graph: graph.inputs, lambda graph: graph.outputs):
        assert [(value.name, value.dtype, str(value.shape)) for value in values(ours.graph)] == [
            (value.name, value.dtype, str(value.shape)) for value in values(full.graph)
        ]
    assert {name for name in ours.graph.initializers if name.startswith(("model.", "lm_head"))} - set(tensor_shapes(deep)) == {
        "model.rotary_emb.cos",
        "model.rotary_emb.sin",
    }


@pytest.mark.trace
@pytest.mark.parametrize("kv_cache", ["dynamic", "static"])
def test_trace_is_plain_operations_with_the_contract_io(kv_cache: KvCache) -> None:
    model = stamped(CONFIG, 2, kv_cache)
    kinds = Counter(node.op_type for node in model.graph)
    assert not {"RMSNormalization", "RotaryEmbedding", "Attention", "Swish"} & kinds.keys()
    assert kinds["Softmax"] == 2
    assert kinds["Sqrt"] == 5  # two norms a layer and the final one
    deep = replace(CONFIG, num_hidden_layers=2)
    for values, specs in (
        (model.graph.inputs, io_spec.graph_inputs(deep, "fp16", kv_cache)),
        (model.graph.outputs, io_spec.graph_outputs(deep, "fp16", kv_cache)),
    ):
        assert [value.name for value in values] == [spec.name for spec in specs]
        assert [tuple(size if isinstance(size, int) else size.value for size in value.shape or ()) for value in values] == [
            spec.shape for spec in specs
        ]
    assert all(set(node.metadata_props) == {MODULE_KEY} for node in model.graph)
    assert {node.metadata_props[MODULE_KEY] for node in model.graph} >= {"model.layers.1.self_attn.q_proj", "model.layers.1", "model.norm", "lm_head"}
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)


@pytest.mark.trace
def test_trace_is_the_same_every_time_and_its_stamp_of_one_layer() -> None:
    fresh = trace_model(CONFIG, "fp16")
    assert compare_graphs(fresh, stamped(CONFIG, 1)).same
    models = [stamped(CONFIG, 2), stamp_layers(fresh, replace(CONFIG, num_hidden_layers=2))]
    texts = [ir.to_proto(model).SerializeToString(deterministic=True) for model in models]
    assert texts[0] == texts[1]


@pytest.mark.trace
def test_softmax_runs_in_float32() -> None:
    softmax = next(node for node in stamped(CONFIG, 1).graph if node.op_type == "Softmax")
    assert softmax.inputs[0] is not None
    assert softmax.inputs[0].dtype == ir.DataType.FLOAT
