"""A lazily read file is the same model; its weights stay where they are, and a damaged file is an error."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.message import DecodeError

from artifact.errors import FusionError
from graphs.foreign import lazy, source
from graphs.foreign.fuse import fuse_graph
from graphs.foreign.lazy import load_lazily

NAMES = ("optimum-18", "dynamo-18-eager-float16", "genai")


def weights(model):
    return {name: value.const_value for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("name", NAMES)
def test_is_the_model_that_a_whole_read_gives(pinned, name) -> None:
    path = pinned(name)
    whole, read = ir.load(path), load_lazily(path, lazy_bytes=200)
    assert [str(node) for node in read.graph] == [str(node) for node in whole.graph]
    assert weights(read).keys() == weights(whole).keys()
    for key, tensor in weights(whole).items():
        np.testing.assert_array_equal(weights(read)[key].numpy(), tensor.numpy())
        assert (weights(read)[key].dtype, weights(read)[key].shape) == (tensor.dtype, tensor.shape)
    assert (read.opset_imports, read.ir_version, read.producer_name) == (whole.opset_imports, whole.ir_version, whole.producer_name)


def test_large_weights_stay_in_the_file_and_small_ones_are_read(pinned) -> None:
    path = pinned("optimum-18")
    for tensor in weights(load_lazily(path, lazy_bytes=1000)).values():
        assert isinstance(tensor, ir.ExternalTensor) == (tensor.nbytes >= 1000)
    assert not any(isinstance(tensor, ir.ExternalTensor) for tensor in weights(load_lazily(path)).values())
    assert lazy.LAZY_BYTES == 1 << 20


def test_weights_that_lie_outside_already_stay_outside(pinned, tmp_path) -> None:
    ir.save(ir.load(pinned("optimum-18")), tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=500)
    tensors = [tensor for tensor in weights(load_lazily(tmp_path / "model.onnx", lazy_bytes=1)).values() if tensor.nbytes >= 500]
    assert {tensor.location for tensor in tensors} == {"weights.bin"}


def test_weights_in_typed_fields_are_read(tmp_path) -> None:
    tensor = onnx.TensorProto(name="w", dims=[300], data_type=onnx.TensorProto.FLOAT, float_data=np.arange(300, dtype=np.float32))
    graph = onnx.GraphProto(name="g", initializer=[tensor], node=[onnx.NodeProto(op_type="Identity", input=["w"], output=["y"])])
    graph.output.add(name="y")
    model = onnx.ModelProto(ir_version=10, graph=graph, opset_import=[onnx.OperatorSetIdProto(version=18)])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    read = weights(load_lazily(tmp_path / "model.onnx", lazy_bytes=100))["w"]
    assert not isinstance(read, ir.ExternalTensor)
    np.testing.assert_array_equal(read.numpy(), np.arange(300, dtype=np.float32))


def test_a_link_is_followed_to_the_bytes(pinned, tmp_path) -> None:
    (tmp_path / "link.onnx").symlink_to(pinned("optimum-18"))
    read = weights(load_lazily(tmp_path / "link.onnx", lazy_bytes=1000))
    np.testing.assert_array_equal(
        read["model.embed_tokens.weight"].numpy(), weights(ir.load(pinned("optimum-18")))["model.embed_tokens.weight"].numpy()
    )


@pytest.mark.parametrize("kept", [0.03, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_an_error(pinned, tmp_path, kept) -> None:
    content = pinned("optimum-18").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises((ValueError, DecodeError)):
        load_lazily(tmp_path / "cut.onnx", lazy_bytes=1000)
    with pytest.raises(FusionError, match="not a readable ONNX file, or is cut off"):
        source.open_graph(tmp_path / "cut.onnx")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>", "wire type 4"),
        (b"\xff" * 16, "more than 10 bytes"),
        (b"\x3a\x05ab", "field 7 at byte 0 ends at byte 7"),
        (b"\x08", "within a number"),
    ],
)
def test_what_is_no_message_says_why(tmp_path, content, reason) -> None:
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_lazily(tmp_path / "other.onnx")


@pytest.mark.parametrize("folder", [".", "other"])
def test_weights_of_the_file_itself_are_copied_beside_the_fused_graph(pinned, tools, tmp_path, monkeypatch, folder) -> None:
    monkeypatch.setattr(source, "load_lazily", partial(load_lazily, lazy_bytes=500))
    (tmp_path / "model.onnx").write_bytes(pinned("optimum-18").read_bytes())
    out = tmp_path / folder / "fused.onnx"
    report = fuse_graph(tmp_path / "model.onnx", out)
    assert report["weights_bytes"] > 0
    locations = {tensor.location for tensor in weights(ir.load(out)).values() if isinstance(tensor, ir.ExternalTensor)}
    assert [location for location in locations if not location.startswith("fused.onnx.")] == []
    os.rename(tmp_path / "model.onnx", tmp_path / "moved.onnx")
    assert tools["worst_difference"](tmp_path / "moved.onnx", out, tools["scenarios"]["left-padded"]) <= 1e-5
