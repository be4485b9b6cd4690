"""What is which input and output: every exporter's spelling, and every refusal once."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from graphs.foreign.ports import read_ports

CACHED = ("optimum-14", "dynamo-18-eager-float32", "genai")
IN_TURN = ["0.key", "0.value", "1.key", "1.value"]


def rename(model, spelling, values=None):
    """Give the caches other names, by layer and kind."""
    for value in values or [*model.graph.inputs, *model.graph.outputs]:
        layer, kind = value.name.split(".")[1:] if "." in value.name else (None, None)
        if layer is not None:
            value.name = spelling(value.name.split(".")[0], layer, kind)
    return model


@pytest.mark.parametrize("name", CACHED)
def test_reads_keys_and_values_in_turn(pinned, name) -> None:
    ports = read_ports(ir.load(pinned(name)))
    assert [port.name for port in ports.past] == [f"past_key_values.{which}" for which in IN_TURN]
    assert [port.name for port in ports.present] == [f"present.{which}" for which in IN_TURN]
    assert (ports.input_ids.name, ports.logits.name, ports.caches) == ("input_ids", "logits", "by name")
    assert (ports.position_ids is None) == (name == "genai")
    assert ports.attention_mask is not None


@pytest.mark.parametrize(
    "spelling",
    [
        lambda owner, layer, kind: f"{owner}_{kind}_cache_{layer}",
        lambda owner, layer, kind: f"{owner}_{layer}_{['key', 'value'].index(kind)}",
        lambda owner, layer, kind: f"{'past' if 'past' in owner else 'present'}_{kind}_self_{layer}",
        lambda owner, layer, kind: f"{owner}_{layer}_decoder_{kind}",
    ],
)
def test_reads_other_spellings(pinned, spelling) -> None:
    model = rename(ir.load(pinned("genai")), spelling)  # its inputs are not in turn: all keys come first
    order = [value.name for value in model.graph.inputs if len(value.shape) == 4]
    ports = read_ports(model)
    assert ports.caches == "by name"
    assert [port.name for port in ports.past] == [order[index] for index in (0, 2, 1, 3)]


def test_takes_the_order_where_names_say_nothing(pinned) -> None:
    model = ir.load(pinned("optimum-18"))
    for index, value in enumerate(value for value in [*model.graph.inputs, *model.graph.outputs] if len(value.shape) == 4):
        value.name = f"onnx::Concat_{index}"
    ports = read_ports(model)
    assert ports.caches == "by order"
    assert [port.name for port in (*ports.past, *ports.present)] == [f"onnx::Concat_{index}" for index in range(8)]


def test_nameless_presents_follow_their_pasts(pinned) -> None:
    model = ir.load(pinned("genai"))
    for index, value in enumerate(value for value in model.graph.outputs if len(value.shape) == 4):
        value.name = f"out_{index}"
    assert [port.name for port in read_ports(model).present] == ["out_0", "out_2", "out_1", "out_3"]


def test_a_graph_without_caches_has_none(pinned) -> None:
    ports = read_ports(ir.load(pinned("dynamo-18-bare")))
    assert (ports.past, ports.present, ports.caches) == ((), (), "none")


def add_input(model, name, dtype, shape):
    model.graph.inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))


REFUSALS = {
    "neither token ids": lambda model: add_input(model, "num_logits_to_keep", ir.DataType.INT64, []),
    "is neither": lambda model: add_input(model, "pixels", ir.DataType.FLOAT, ["b", 3, 8, 8, 2]),
    "a cache of fixed capacity": lambda model: add_input(model, "cache_write_indices", ir.DataType.INT64, ["b"]),
    "no token ids": lambda model: setattr(model.graph.inputs[0], "type", ir.TensorType(ir.DataType.FLOAT)),
    "4 caches enter and 3 leave": lambda model: model.graph.outputs.pop(),
    "one output .B, S, V. must be its logits; it has none": lambda model: model.graph.outputs.pop(0),
    "input_ids has no shape": lambda model: setattr(model.graph.inputs[0], "shape", None),
}


@pytest.mark.parametrize("reason", list(REFUSALS))
def test_refuses_what_is_no_decoder(pinned, reason) -> None:
    model = ir.load(pinned("optimum-18"))
    REFUSALS[reason](model)
    with pytest.raises(FusionError, match=reason):
        read_ports(model)
