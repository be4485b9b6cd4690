"""What a decoder is made of, read from its graph, and which part is missing where it is none."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from graphs.foreign.decoder import DecoderShape, fused_by_others, read_decoder
from graphs.foreign.fuse import fuse_graph
from graphs.foreign.prepare import prepare
from graphs.foreign.source import open_graph

NAME = "dynamo-18-sdpa-float32"
CONVOLUTIONS = """<ir_version: 10, opset_import: ["" : 18]>
agraph (float[1,3,8,8] picture) => (float[1,3,8,8] y) { z = Relu(picture) y = Sigmoid(z) }"""
IDS = """<ir_version: 10, opset_import: ["" : 18]>
agraph (int64[B,S] input_ids) => (float[B,S,8] y) <float[4,8] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}>
{ y = Gather(table, input_ids) }"""


def change(path, out, edit):
    model = ir.load(path)
    edit(list(model.graph), model.graph)
    ir.save(model, out)
    return out


def test_shape_is_read_from_the_graph(pinned) -> None:
    model = open_graph(pinned(NAME))
    prepare(model)
    assert read_decoder(model) == DecoderShape(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=16, intermediate_size=24, vocab_size=32
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [(CONVOLUTIONS, "no token embedding, a Gather from a constant"), (IDS, "no attention, a soft-max over")],
)
def test_names_the_part_that_a_foreign_graph_lacks(tmp_path, text, reason) -> None:
    ir.save(ir.from_onnx_text(text), tmp_path / "model.onnx")
    with pytest.raises(FusionError, match=f"no decoder: {reason}"):
        fuse_graph(tmp_path / "model.onnx", tmp_path / "out.onnx")


def replace_gate(nodes, graph):
    next(node for node in nodes if node.op_type == "Sigmoid").op_type = "Tanh"


def hide_logits(nodes, graph):
    graph.outputs.pop(0)


def feed_embeddings(nodes, graph):
    """The hidden states come from outside, as in a model for several kinds of input."""
    embedding = next(node for node in nodes if node.op_type == "Gather")
    fed = ir.Value(name="inputs_embeds", shape=embedding.outputs[0].shape, type=embedding.outputs[0].type)
    graph.inputs.append(fed)
    ir.convenience.replace_all_uses_with(embedding.outputs[0], fed)
    graph.remove(embedding, safe=True)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (replace_gate, "the gated feed-forward, one Sigmoid over .* was found 1 times in 2 layers"),
        (hide_logits, r"no logits, an output \[B, S, 32\]"),
        (feed_embeddings, "input inputs_embeds FLOAT .* is neither token ids, positions, a mask nor a cache"),
    ],
)
def test_names_the_part_that_a_changed_decoder_lacks(pinned, tmp_path, edit, reason) -> None:
    path = change(pinned(NAME), tmp_path / "changed.onnx", edit)
    with pytest.raises(FusionError, match=f"no decoder: {reason}"):
        fuse_graph(path, tmp_path / "out.onnx")


@pytest.mark.parametrize(("name", "operator"), [("genai", "com.microsoft::GroupQueryAttention"), (NAME, None)])
def test_attention_of_another_domain_is_seen(pinned, name, operator) -> None:
    assert fused_by_others(open_graph(pinned(name))) == operator
