"""Which graphs are judged at all, and which are no graph of the checkpoint."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from artifact.errors import FusionError, UsageError, ValidationError
from exporter.checkpoints import open_checkpoint
from validation.lone.graph import open_lone_graph


def fix(name, axis, size):
    """Give one axis of an input a size."""

    def edit(model):
        value = next(value for value in model.graph.inputs if value.name == name)
        value.shape = ir.Shape([size if index == axis else old for index, old in enumerate(value.shape)])

    return edit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the graph's 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, the graph's 2"),
        ({"head_dim": 4}, "head_dim is 4, the graph's 8"),
        ({"vocab_size": 48, "hidden_size": 32}, "hidden_size is 32, the graph's 16; vocab_size is 48, the graph's 32"),
    ],
)
def test_refuses_a_graph_of_another_model(pinned, exported_from, make_checkpoint, tmp_path, change, said) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 64}
    other = open_checkpoint(str(make_checkpoint(tmp_path / "other", **sizes | change)))
    with pytest.raises(UsageError, match=said) as refusal:
        open_lone_graph(pinned("optimum-18.onnx"), other.config, other.source)
    assert refusal.value.exit_code == 2
    open_lone_graph(pinned("optimum-18.onnx"), exported_from.config, exported_from.source)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (fix("input_ids", 1, 8), "the sequence length of input_ids INT64 .*8.* is fixed"),
        (fix("past_key_values.0.value", 2, 128), "the past length of past_key_values.0.value FLOAT .*128.* is fixed"),
        (fix("attention_mask", 1, 64), "the total length of attention_mask INT64 .*64.* is fixed"),
        (fix("input_ids", 0, 4), "the batch of input_ids INT64 .*4.* is fixed"),
    ],
)
def test_refuses_fixed_axes(damaged, exported_from, edit, reason) -> None:
    with pytest.raises(ValidationError, match=reason):
        open_lone_graph(damaged("optimum-18", edit), exported_from.config, exported_from.source)


def test_refuses_a_merged_decoder_by_its_name(damaged, exported_from) -> None:
    def merge(model):
        model.graph.inputs.append(ir.Value(name="use_cache_branch", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL)))

    with pytest.raises(FusionError, match="is a merged decoder") as refusal:
        open_lone_graph(damaged("optimum-18", merge), exported_from.config, exported_from.source)
    assert "--no-post-process" in refusal.value.hint


def test_refuses_weights_outside_the_folder(pinned, exported_from, tmp_path) -> None:
    (tmp_path / "inner").mkdir()
    ir.save(ir.load(pinned("optimum-18.onnx")), tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=500)
    model = ir.load(tmp_path / "model.onnx")
    for value in model.graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                "../weights.bin", tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name
            )
    ir.save(model, tmp_path / "inner" / "model.onnx")
    with pytest.raises(FusionError, match=r"lies outside its folder: \.\./weights\.bin"):
        open_lone_graph(tmp_path / "inner" / "model.onnx", exported_from.config, exported_from.source)


def test_constants_are_no_results(pinned, exported_from) -> None:
    graph = open_lone_graph(pinned("optimum-14.onnx"), exported_from.config, exported_from.source)
    assert [node for node in graph.model.graph if node.op_type == "Constant"] == []
    assert not graph.one_position
    assert not graph.names_layers
