"""Files that are no decoder, or not whole: each is one error that says what is wrong."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from artifact.errors import FusionError
from graphs.foreign.fuse import fuse_graph
from graphs.foreign.source import open_graph

NAME = "dynamo-18-eager-float32"


@pytest.fixture
def stored(pinned, tmp_path):
    """The pinned graph with its weights in a file beside it."""
    folder = tmp_path / "stored"
    folder.mkdir()
    ir.save(ir.load(pinned(NAME)), folder / "model.onnx", external_data="weights.bin", size_threshold_bytes=200)
    assert len(list(external(folder / "model.onnx"))) == 16
    return folder / "model.onnx"


def external(path):
    return (value.const_value for value in ir.load(path).graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor))


def move_data(path, location, **changed):
    """Let the first external tensor point elsewhere."""
    model = ir.load(path)
    value = next(value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor))
    tensor = value.const_value
    place = {"offset": tensor.offset, "length": tensor.length} | changed
    value.const_value = ir.ExternalTensor(location, place["offset"], place["length"], tensor.dtype, shape=tensor.shape, name=tensor.name)
    ir.save(model, path)
    return tensor.name


def refused(path, reason, tmp_path):
    with pytest.raises(FusionError, match=reason):
        fuse_graph(path, tmp_path / "out" / "fused.onnx")
    assert not (tmp_path / "out").exists()


def test_refuses_a_file_that_is_not_there(tmp_path) -> None:
    refused(tmp_path / "none.onnx", r"there is no file .*none\.onnx", tmp_path)


@pytest.mark.parametrize("content", [b"<html>not a model</html>", b"\xff" * 100])
def test_refuses_a_file_that_is_not_onnx(tmp_path, content) -> None:
    (tmp_path / "page.onnx").write_bytes(content)
    refused(tmp_path / "page.onnx", "page.onnx is not a readable ONNX file, or is cut off", tmp_path)


def test_refuses_an_empty_file(tmp_path) -> None:
    (tmp_path / "empty.onnx").touch()
    refused(tmp_path / "empty.onnx", "is not an ONNX model: its graph is empty", tmp_path)


@pytest.mark.parametrize("part", [0.5, 0.99])
def test_refuses_a_file_that_is_cut_off(pinned, tmp_path, part) -> None:
    content = pinned(NAME).read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(len(content) * part)])
    refused(tmp_path / "cut.onnx", r"cut.onnx is not a readable ONNX file, or is cut off", tmp_path)


def test_refuses_an_opset_that_is_newer_than_known(pinned, tmp_path) -> None:
    model = ir.load(pinned(NAME))
    model.opset_imports[""] = 25
    ir.save(model, tmp_path / "new.onnx")
    refused(tmp_path / "new.onnx", "is of opset 25; the newest that is known here is 24", tmp_path)


def test_refuses_a_file_without_an_opset(pinned, tmp_path) -> None:
    model = ir.load(pinned(NAME))
    del model.opset_imports[""]
    model.opset_imports["com.example"] = 1
    ir.save(model, tmp_path / "odd.onnx")
    refused(tmp_path / "odd.onnx", "imports no ONNX opset, only com.example", tmp_path)


def test_refuses_control_flow(tmp_path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
        branch (bool c, float[2] x) => (float[2] y)
        { y = If (c) <then_branch = a () => (float[2] p) { p = Neg(x) }, else_branch = b () => (float[2] q) { q = Abs(x) }> }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "if.onnx")
    refused(tmp_path / "if.onnx", "is If, which holds graphs of its own", tmp_path)


def test_refuses_data_that_is_missing(stored, tmp_path) -> None:
    (stored.parent / "weights.bin").unlink()
    refused(stored, r"the external data of .* is missing: there is no file .*weights\.bin", tmp_path)


def test_refuses_data_that_is_cut_off(stored, tmp_path) -> None:
    content = (stored.parent / "weights.bin").read_bytes()
    (stored.parent / "weights.bin").write_bytes(content[:-1])
    refused(stored, rf"is cut off: bytes \d+ to {len(content)} of weights.bin, which has {len(content) - 1}", tmp_path)


def test_refuses_data_above_the_folder(stored, tmp_path) -> None:
    (stored.parent / "weights.bin").replace(tmp_path / "weights.bin")
    name = move_data(stored, "../weights.bin")
    refused(stored, rf"the external data of {name} lies outside its folder: \.\./weights\.bin", tmp_path)


def test_refuses_data_behind_a_link_out_of_the_folder(stored, tmp_path) -> None:
    (stored.parent / "weights.bin").replace(tmp_path / "weights.bin")
    (stored.parent / "weights.bin").symlink_to(tmp_path / "weights.bin")
    refused(stored, "lies outside its folder: weights.bin", tmp_path)


def test_refuses_data_of_another_length_than_its_shape(stored, tmp_path) -> None:
    name = move_data(stored, "weights.bin", length=8)
    refused(stored, rf"the external data of {name} has 8 bytes, expected \d+ for FLOAT", tmp_path)


def test_opens_a_whole_graph_without_reading_its_data(stored) -> None:
    model = open_graph(stored)
    assert sum(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()) == 16
