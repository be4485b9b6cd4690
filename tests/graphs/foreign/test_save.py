"""What is written: the graph whole, its weights beside it, nothing where something failed."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import shutil
import signal

import numpy as np
import onnx_ir as ir
import pytest

from artifact import manifest
from artifact.errors import ArtifactError, FusionError
from graphs.foreign import save
from graphs.foreign.fuse import fuse_graph
from graphs.foreign.save import save_graph

NAME = "optimum-18"
DATA = re.compile(r"fused\.onnx\.[0-9a-f]{12}\.data")


@pytest.fixture
def stored(pinned, tmp_path):
    """The pinned graph with its weights in two files beside it, one of them in a folder."""
    folder = tmp_path / "stored"
    (folder / "deep").mkdir(parents=True)
    ir.save(ir.load(pinned(NAME)), folder / "model.onnx", external_data="deep/weights.bin", size_threshold_bytes=500)
    return folder / "model.onnx"


def external(path):
    return [value.const_value for value in ir.load(path).graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]


def test_weights_are_copied_beside_the_graph(stored, tools, tmp_path) -> None:
    out = tmp_path / "other" / "folder" / "fused.onnx"
    report = fuse_graph(stored, out)
    graph, data = sorted(path.name for path in out.parent.iterdir())
    assert (graph, DATA.fullmatch(data) is not None) == ("fused.onnx", True)
    assert {tensor.location for tensor in external(out)} == {data}
    assert report["weights_bytes"] == (out.parent / data).stat().st_size > 0
    before = {tensor.name: tensor.numpy() for tensor in external(stored)}
    after = {tensor.name: tensor.numpy() for tensor in external(out)}
    assert after.keys() == before.keys()
    for name, weights in before.items():
        np.testing.assert_array_equal(after[name], weights)
    os.rename(stored.parent, tmp_path / "away")  # the new graph needs nothing of the old folder
    assert tools["worst_difference"](tmp_path / "away" / "model.onnx", out, tools["scenarios"]["batch"]) <= 1e-5


def test_in_the_same_folder_nothing_is_copied(stored, tools) -> None:
    out = stored.with_name("fused.onnx")
    report = fuse_graph(stored, out)
    assert report["weights_bytes"] == 0
    assert {tensor.location for tensor in external(out)} == {"deep/weights.bin"}
    assert sorted(path.name for path in out.parent.iterdir()) == ["deep", "fused.onnx", "model.onnx"]
    assert tools["worst_difference"](stored, out, tools["scenarios"]["decode"]) <= 1e-5


def test_weights_in_the_graph_stay_in_it(pinned, tmp_path) -> None:
    out = tmp_path / "fused.onnx"
    assert fuse_graph(pinned(NAME), out)["weights_bytes"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fused.onnx"]


def test_shared_bytes_are_copied_once(stored, tmp_path) -> None:
    model = ir.load(stored)
    first, second = [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)][:2]
    second.const_value = ir.ExternalTensor(
        first.const_value.location, first.const_value.offset, first.const_value.length, first.dtype, shape=first.shape, name=second.name
    )
    whole = sum(tensor.nbytes for tensor in external(stored))
    copied = save_graph(model, stored, tmp_path / "out" / "copy.onnx")
    assert copied < whole
    places = {tensor.name: tensor.offset for tensor in external(tmp_path / "out" / "copy.onnx")}
    assert places[first.name] == places[second.name]


def test_refuses_to_write_over_its_source(stored) -> None:
    content = stored.read_bytes()
    with pytest.raises(FusionError, match="is the graph that is read"):
        fuse_graph(stored, stored.parent / "deep" / ".." / "model.onnx")
    assert stored.read_bytes() == content


def full(*_arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failing", [(save, "_copy", full), (save.ir, "save", full)], ids=["data", "graph"])
def test_a_failed_write_leaves_what_was_there(stored, tmp_path, monkeypatch, existing, failing) -> None:
    out = tmp_path / "out" / "fused.onnx"
    out.parent.mkdir()
    if existing:
        out.write_bytes(b"old")
        (out.parent / "fused.onnx.000000000000.data").write_bytes(b"old data")

    monkeypatch.setattr(*failing)
    with pytest.raises(ArtifactError, match=r"can't be written: No space left"):
        fuse_graph(stored, out)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == (
        {"fused.onnx": b"old", "fused.onnx.000000000000.data": b"old data"} if existing else {}
    )


def die(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def fuse_and_die(source, out, module, name) -> None:
    """Fuse in a process that is killed at its first call of a function."""
    child = os.fork()
    if child == 0:
        setattr(module, name, die)
        try:
            fuse_graph(source, out)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def fused_before(stored, tmp_path):
    """A graph that was fused from other weights, and the numbers of its initializers."""
    other = tmp_path / "before" / "model.onnx"
    shutil.copytree(stored.parent, other.parent)
    (weights := other.parent / "deep" / "weights.bin").write_bytes(bytes(weights.stat().st_size))
    out = tmp_path / "out" / "fused.onnx"
    fuse_graph(other, out)
    return out, {tensor.name: tensor.numpy().copy() for tensor in external(out)}


@pytest.mark.parametrize("killed_at", [(save, "_copy"), (save.ir, "save")], ids=["data", "graph"])
def test_a_killed_run_leaves_the_graph_that_was_there_with_its_own_weights(stored, fused_before, killed_at) -> None:
    out, weights = fused_before
    fuse_and_die(stored, out, *killed_at)
    assert len(list(out.parent.iterdir())) == 3  # what the killed run left
    after = {tensor.name: tensor.numpy() for tensor in external(out)}
    assert after.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(after[name], array)
    fuse_graph(stored, out)
    graph, data = sorted(path.name for path in out.parent.iterdir())
    assert (graph, {tensor.location for tensor in external(out)}) == ("fused.onnx", {data})
    assert any(external(out)[0].numpy().flat)


def test_half_written_weights_are_removed_by_the_next_run_whatever_its_name(stored, tmp_path) -> None:
    out = tmp_path / "out" / "fused.onnx"
    fuse_and_die(stored, out, save, "_copy")
    (leftover,) = out.parent.iterdir()
    for kept in ("notes.data", ".llama2trt-notes.data"):
        (out.parent / kept).write_bytes(b"x")
    fuse_graph(stored, out.with_name("another.onnx"))
    assert not leftover.exists()
    assert sorted(path.name for path in out.parent.iterdir())[:2] == [".llama2trt-notes.data", "another.onnx"]
    assert len(list(out.parent.iterdir())) == 4


def test_weights_that_another_run_is_writing_are_not_removed(stored, tmp_path) -> None:
    being_written = tmp_path / "out" / ".llama2trt-another.onnx.0123456789ab.data"
    being_written.parent.mkdir()
    with being_written.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fuse_graph(stored, tmp_path / "out" / "fused.onnx")
        assert being_written.exists()


def test_weights_are_synced_before_the_graph_points_to_them(stored, tmp_path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr(manifest, "_sync", lambda path: synced.append((path.suffix, path.stat().st_size if path.is_file() else None)))
    size = fuse_graph(stored, tmp_path / "out" / "fused.onnx")["weights_bytes"]
    graph = (tmp_path / "out" / "fused.onnx").stat().st_size
    assert synced == [(".data", size), ("", None), (".onnx", graph), ("", None)]


def test_a_copy_holds_one_piece_at_a_time(tmp_path) -> None:
    """256 MiB of weights are copied with far less memory than that."""
    size = 256 * 2**20
    source = tmp_path / "source"
    source.mkdir()
    with (source / "weights.bin").open("wb") as file:
        file.truncate(size)
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[N] x, float[67108864] w) => (float[N] y) { y = Add(x, w) }'
    model = ir.from_onnx_text(text)
    weight = model.graph.inputs[1]
    model.graph.inputs.remove(weight)
    weight.const_value = ir.ExternalTensor("weights.bin", 0, size, ir.DataType.FLOAT, shape=ir.Shape([size // 4]), name="w", base_dir=source)
    model.graph.initializers.add(weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert save_graph(model, source / "model.onnx", tmp_path / "out.onnx") == size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
