"""exporter/audit.py: each silent corruption that users of other tools met is made here, and must be found and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from artifact.calibration import CALIBRATION
from artifact.errors import ArtifactError
from artifact.manifest import read_manifest
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor, plan_tensors, read_checksums, write_tensors
from commands.export import ExportOptions, export
from commands.graphs import fuse, quantize
from commands.summary import summarize
from commands.verify import verify_artifact
from exporter.audit import audit_artifact
from exporter.checkpoints import CheckpointRequest, open_checkpoint
from graphs.quantize.int8_smoothquant import quantize_int8_smoothquant
from graphs.quantize.statistics import Statistics
from validation.calibration import write_statistics
from validation.calibration_text import CalibrationText
from validation.reference import Reference

pytestmark = pytest.mark.trace
Q1 = "model.layers.1.self_attn.q_proj.weight"
GATE0, GATE1 = "model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight"
ABOUT = {"path": "art", "kind": "artifact folder"}
GRAPHS = ("traced.onnx", "fused.onnx", "int8.onnx")


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with three graphs."""
    out = tmp_path_factory.mktemp("audit") / "art"
    export(CheckpointRequest(str(tiny_checkpoint)), out, ExportOptions())
    fuse(out)
    quantize(out)
    return out


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(exported, tmp_path / "art")
    return tmp_path / "art"


def audit(artifact: Path, source: Path | None, graphs: tuple[str, ...] = GRAPHS) -> dict[str, Any]:
    checkpoint = None if source is None else open_checkpoint(str(source))
    return audit_artifact(artifact, read_manifest(artifact)["model"], graphs, checkpoint)


def reasons(report: dict[str, Any]) -> dict[str, str]:
    """Tensor or file → reason."""
    assert report["passed"] is (not report["failed"])
    return {failed["tensor"] or failed["graph"]: failed["reason"] for failed in report["failed"]}


def change(artifact: Path, name: str, values: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Rewrite one stored float16 weight where it lies."""
    tensor = read_checksums(artifact)[name]
    path = artifact / tensor.file
    stored = np.fromfile(path, np.float16, tensor.length // 2, offset=tensor.offset).reshape(tensor.shape)
    raw = bytearray(path.read_bytes())
    raw[tensor.offset : tensor.offset + tensor.length] = np.ascontiguousarray(values(stored)).tobytes()
    path.write_bytes(raw)


def repoint(artifact: Path, graph: str, places: dict[str, StoredTensor]) -> None:
    """Make weights of a graph point somewhere else."""
    model = ir.load(artifact / graph)
    words = {"F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT}
    for name, place in places.items():
        shape = ir.Shape(place.shape)
        tensor = ir.ExternalTensor(place.file, place.offset, place.length, words[place.dtype], shape=shape, name=name)
        model.graph.initializers[name].const_value = tensor
    ir.save(model, artifact / graph)


def test_a_sound_artifact_passes_and_every_byte_is_accounted_for(artifact: Path, tiny_checkpoint: Path) -> None:
    report = audit(artifact, tiny_checkpoint)
    assert report["failed"] == []
    assert report["passed"] is True
    assert (report["not_compared"], report["duplicated_bytes"], report["orphaned_bytes"]) == (0, 0, 0)
    weights = sum(tensor.length for tensor in read_checksums(artifact).values())
    assert audit(artifact, tiny_checkpoint, ("traced.onnx", "fused.onnx"))["bytes_by_dtype"] == {"F16": weights}
    assert report["bytes_by_dtype"]["I8"] == sum(1 * np.prod(shape) for shape in linear_shapes(artifact))


def linear_shapes(artifact: Path) -> list[tuple[int, ...]]:
    return [tensor.shape for name, tensor in read_checksums(artifact).items() if "_proj" in name]


def test_all_zero_query_key_value_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    for part in "qkv":
        change(artifact, f"model.layers.1.self_attn.{part}_proj.weight", np.zeros_like)
    found = reasons(audit(artifact, tiny_checkpoint))
    assert found == {f"model.layers.1.self_attn.{part}_proj.weight": "is all zeros" for part in ("q", "k", "v", "qkv")}


def test_rows_left_interleaved_are_found(artifact: Path, tiny_checkpoint: Path) -> None:
    change(artifact, Q1, lambda stored: stored.reshape(4, 2, 4, -1).swapaxes(1, 2).reshape(stored.shape))
    assert "rows in another order" in reasons(audit(artifact, tiny_checkpoint))[Q1]


def test_two_layers_weights_swapped_are_found(artifact: Path, tiny_checkpoint: Path) -> None:
    first, second = (np.array(read_checksums_values(artifact, name)) for name in (GATE0, GATE1))
    change(artifact, GATE0, lambda _: second)
    change(artifact, GATE1, lambda _: first)
    found = reasons(audit(artifact, tiny_checkpoint))
    assert found[GATE0] == f"holds {GATE1}"
    assert found[GATE1] == f"holds {GATE0}"


def read_checksums_values(artifact: Path, name: str) -> NDArray[np.float16]:
    tensor = read_checksums(artifact)[name]
    return np.fromfile(artifact / tensor.file, np.float16, tensor.length // 2, offset=tensor.offset).reshape(tensor.shape)


def test_a_graph_that_swaps_two_layers_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    stored = read_checksums(artifact)
    repoint(artifact, "traced.onnx", {GATE0: stored[GATE1], GATE1: stored[GATE0]})
    assert reasons(audit(artifact, tiny_checkpoint)) == {GATE0: f"holds {GATE1}", GATE1: f"holds {GATE0}"}
    checkpoint, model = open_checkpoint(str(tiny_checkpoint)), read_manifest(artifact)["model"]
    found = audit_artifact(artifact, model, ["traced.onnx"], checkpoint, written=stored)  # as export does, without reading a byte
    assert reasons(found) == {GATE0: "does not lie where it was written", GATE1: "does not lie where it was written"}


def test_one_changed_bit_is_found_and_measured(artifact: Path, tiny_checkpoint: Path) -> None:
    def flip(stored: NDArray[Any]) -> NDArray[Any]:
        changed = stored.copy()
        changed.view(np.uint16)[3, 3] ^= 1
        return changed

    change(artifact, Q1, flip)
    words = reasons(audit(artifact, tiny_checkpoint))[Q1]
    found = re.fullmatch(
        r"differs from the checkpoint: correlation 1 − (\S+), norm × \(1 ([+-]\S+)\), 1 of 1,024 values, the largest by (\S+)", words
    )
    assert found, words
    off, longer, largest = map(float, found.groups())
    assert 0 <= off < 1e-6
    assert 0 < abs(longer) < 1e-5
    assert 0 < largest < 1e-2


def rewrite_layer(artifact: Path, wide: str) -> dict[str, StoredTensor]:
    """Store one weight of layer 1 as float32 in its file."""
    file = "weights/layer-001.safetensors"
    values = load_file(artifact / file)
    order = [name for name, tensor in read_checksums(artifact).items() if tensor.file == file]
    values[wide] = values[wide].astype(np.float32)
    header, planned = plan_tensors(file, {name: ("F32" if name == wide else "F16", values[name].shape) for name in order})
    written = write_tensors(artifact / file, header, planned, (memoryview(np.ascontiguousarray(values[name])).cast("B") for name in order))
    return {tensor.name: tensor for tensor in written}


def test_float32_inside_a_float16_artifact_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    repoint(artifact, "traced.onnx", rewrite_layer(artifact, "model.layers.1.mlp.down_proj.weight"))
    found = reasons(audit(artifact, tiny_checkpoint, ("traced.onnx",)))
    assert found["model.layers.1.mlp.down_proj.weight"] == "is F32 in an artifact of F16"


def test_float32_bytes_that_a_graph_takes_for_float16_are_found(artifact: Path, tiny_checkpoint: Path) -> None:
    rewrite_layer(artifact, "model.layers.1.mlp.down_proj.weight")
    found = reasons(audit(artifact, tiny_checkpoint, ("traced.onnx",)))
    assert "is F16 in the graph and F32 in weights/layer-001.safetensors" in found["model.layers.1.mlp.down_proj.weight"]


def test_a_blob_twice_as_large_as_its_live_bytes_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    path = artifact / "weights" / "layer-000.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw + raw[4096:])
    report = audit(artifact, tiny_checkpoint)
    assert report["orphaned_bytes"] == len(raw) - 4096
    assert f"{len(raw) - 4096:,} of" in reasons(report)["weights/layer-000.safetensors"]


def test_a_file_that_no_graph_uses_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    (artifact / "weights" / "old.data").write_bytes(bytes(1000))
    assert "1,000 of 1,000 bytes belong to no weight" in reasons(audit(artifact, tiny_checkpoint))["weights/old.data"]


def test_a_tied_lm_head_stored_twice_is_found(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    out = tmp_path / "art"
    export(CheckpointRequest(str(source)), out, ExportOptions())
    assert audit(out, source, ("traced.onnx",))["duplicated_bytes"] == 0
    embedding = read_checksums(out)["model.embed_tokens.weight"]
    save_file({"lm_head.weight": read_checksums_values(out, embedding.name)}, out / "weights" / "head.safetensors")
    lists = json.loads((out / "weights" / "checksums.json").read_text())
    lists["lm_head.weight"] = lists[embedding.name] | {"file": "weights/head.safetensors"}
    (out / "weights" / "checksums.json").write_text(json.dumps(lists))
    report = audit(out, source, ("traced.onnx",))
    assert report["duplicated_bytes"] == embedding.length
    assert "tied weights are stored once" in reasons(report)["weights"]


def test_a_weight_that_a_graph_lost_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    model = ir.load(artifact / "traced.onnx")
    del model.graph.initializers["model.norm.weight"]
    model.graph.inputs.append(ir.Value(name="model.norm.weight"))
    ir.save(model, artifact / "traced.onnx")
    assert reasons(audit(artifact, tiny_checkpoint))["model.norm.weight"] == "is not in the graph"


def test_a_graph_that_points_beyond_its_file_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    place = read_checksums(artifact)[Q1]
    repoint(artifact, "traced.onnx", {Q1: StoredTensor(Q1, place.file, "F16", place.shape, 1 << 40, place.length)})
    assert "ends at byte" in reasons(audit(artifact, tiny_checkpoint))[Q1]


def test_a_wrong_rotary_table_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    change(artifact, "model.rotary_emb.sin", lambda stored: -stored)
    assert reasons(audit(artifact, tiny_checkpoint)) == {"model.rotary_emb.sin": "is not the table that the config gives"}


def test_an_int8_weight_beyond_its_error_bound_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight_int8_t"
    tensor = read_checksums(artifact, "weights/int8-checksums.json")[name]
    raw = bytearray((artifact / tensor.file).read_bytes())
    raw[tensor.offset + 5] = (raw[tensor.offset + 5] + 1) % 256
    (artifact / tensor.file).write_bytes(raw)
    found = reasons(audit(artifact, tiny_checkpoint))
    assert list(found) == [name]
    assert "scales from the checkpoint's; half a scale is the limit" in found[name]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 0.0])
def test_a_scale_that_is_no_scale_is_found(artifact: Path, tiny_checkpoint: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    scale = read_checksums(artifact, "weights/int8-checksums.json")[f"{name}_scale"]
    raw = bytearray((artifact / scale.file).read_bytes())
    raw[scale.offset + 2 : scale.offset + 4] = np.float16(value).tobytes()
    (artifact / scale.file).write_bytes(raw)
    rows = scale.shape[0]
    assert reasons(audit(artifact, tiny_checkpoint)) == {f"{name}_int8_t": f"1 of {rows} scales are not finite and positive"}


def test_a_scale_of_another_length_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight_scale"
    place = read_checksums(artifact, "weights/int8-checksums.json")[name]
    repoint(artifact, "int8.onnx", {name: replace(place, shape=(8,), length=16)})
    found = reasons(audit(artifact, tiny_checkpoint))
    assert "is [8] in the graph and [32] in the checkpoint" in found[name]
    assert found["model.layers.1.mlp.down_proj.weight_int8_t"] == "has a scale of [8]"


@pytest.fixture(scope="module")
def wide(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose widths have blocks, and its artifact with four bits and with smoothed weights."""
    folder = tmp_path_factory.mktemp("wide")
    source, out = make_checkpoint(folder / "checkpoint", intermediate_size=64), folder / "art"
    export(CheckpointRequest(str(source)), out, ExportOptions())
    fuse(out)
    quantize(out, scheme="int4")
    checkpoint = open_checkpoint(str(source))
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (2, 24))
    text = CalibrationText(tuple(ids), None, "t.txt", "abc", 1)
    write_statistics(StepContext(out), Reference(checkpoint.config, checkpoint.read), text, "fingerprint", CALIBRATION)
    quantize_int8_smoothquant(StepContext(out), Statistics(out / "calibration.safetensors"))
    return source, out


@pytest.mark.parametrize("graph", ["int4.onnx", "int8-smoothquant.onnx"])
def test_four_bits_and_smoothed_weights_are_held_to_their_shapes(wide: tuple[Path, Path], tmp_path: Path, graph: str) -> None:
    source, out = wide
    shutil.copytree(out, tmp_path / "art")
    graphs = ("traced.onnx", "fused.onnx", "int4.onnx", "int8-smoothquant.onnx")
    report = audit(tmp_path / "art", source, graphs)
    assert report["failed"] == []
    assert report["not_compared"] > 0
    name = "model.layers.1.mlp.down_proj.weight_scale"
    place = read_checksums(out, f"weights/{graph.removesuffix('.onnx')}-checksums.json")[name]
    repoint(tmp_path / "art", graph, {name: replace(place, shape=(8, *place.shape[1:]), length=place.length // 4)})
    found = reasons(audit(tmp_path / "art", source, graphs))
    assert found[name].startswith("is [8")
    assert found[name].endswith("in the checkpoint")


@pytest.mark.parametrize("written", [False, True])
def test_a_weight_declared_transposed_over_the_same_bytes_is_found(artifact: Path, tiny_checkpoint: Path, written: bool) -> None:
    stored = read_checksums(artifact)
    name = "model.layers.1.self_attn.k_proj.weight"
    repoint(artifact, "traced.onnx", {name: replace(stored[name], shape=stored[name].shape[::-1])})
    checkpoint, model = open_checkpoint(str(tiny_checkpoint)), read_manifest(artifact)["model"]
    found = reasons(audit_artifact(artifact, model, ["traced.onnx"], checkpoint, written=stored if written else None))
    rows, columns = stored[name].shape
    assert found[name] == f"is {[columns, rows]} in the graph and {[rows, columns]} in the checkpoint"


def test_a_weight_with_rows_too_many_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    """The rows behind q_proj are k_proj's."""
    place = read_checksums(artifact)[Q1]
    rows, columns = place.shape
    repoint(artifact, "traced.onnx", {Q1: replace(place, shape=(rows + 16, columns), length=place.length + 32 * columns)})
    assert reasons(audit(artifact, tiny_checkpoint)) == {Q1: f"is {[rows + 16, columns]} in the graph and {[rows, columns]} in the checkpoint"}


def test_every_graph_is_held_to_the_shape(artifact: Path, tiny_checkpoint: Path) -> None:
    """A weight that a graph before it declares as it should be."""
    place = read_checksums(artifact)[name := "model.embed_tokens.weight"]
    repoint(artifact, "fused.onnx", {name: replace(place, shape=place.shape[::-1])})
    failed = audit(artifact, tiny_checkpoint)["failed"]
    assert [(entry["graph"], entry["tensor"]) for entry in failed] == [("fused.onnx", name)]


def test_a_packed_weight_of_another_shape_is_found(artifact: Path, tiny_checkpoint: Path) -> None:
    stored = read_checksums(artifact)
    parts = [stored[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    place = replace(parts[0], shape=(columns, rows), length=sum(part.length for part in parts))
    repoint(artifact, "fused.onnx", {"model.layers.0.self_attn.qkv_proj.weight": place})
    found = reasons(audit(artifact, tiny_checkpoint))
    assert found["model.layers.0.self_attn.qkv_proj.weight"] == f"is {[columns, rows]} in the graph and {[rows, columns]} in the checkpoint"


def test_without_its_checkpoint_the_census_is_still_taken(artifact: Path) -> None:
    report = audit(artifact, None)
    assert report["passed"] is None
    assert report["compared"] == 0
    assert report["not_compared"] > 0
    (artifact / "weights" / "old.data").write_bytes(bytes(1000))
    report = audit(artifact, None)
    assert (report["orphaned_bytes"], report["passed"]) == (1000, False)


class TestVerify:
    """commands/verify.py: hashes, audit, and what could not be checked."""

    def test_finds_what_hashes_alone_would_not(self, artifact: Path) -> None:
        assert verify_artifact(artifact, read_manifest(artifact), lambda *_: None)["passed"] is True
        change(artifact, Q1, np.zeros_like)
        manifest = read_manifest(artifact)
        for step in manifest["steps"].values():
            for record in step["outputs"].values():
                record["sha256"] = "?"
        report = verify_artifact(artifact, manifest, lambda *_: None)
        assert report["passed"] is False
        assert report["audit"]["failed"][0] == {"graph": "traced.onnx", "tensor": Q1, "reason": "is all zeros"}

    def test_says_that_the_checkpoint_is_gone(self, artifact: Path, tmp_path: Path) -> None:
        manifest = read_manifest(artifact)
        manifest["model"]["request"]["source"] = str(tmp_path / "moved")
        report = verify_artifact(artifact, manifest, lambda *_: None)
        assert report["passed"] is None
        assert report["audit"]["compared"] == 0
        assert "compared with nothing" in report["not_verified"][0]
        assert "no such file or folder" in report["not_verified"][0]
        assert report["verified"] == report["checked"]
        first, *_, last = summarize("inspect", report | ABOUT)
        assert last.title == f"not all could be verified: {report['words']}"
        assert first.title.endswith(last.title)
        (artifact / "fused.onnx").unlink()
        assert verify_artifact(artifact, manifest, lambda *_: None)["passed"] is False

    def test_says_that_the_checkpoint_is_another_one_now(self, artifact: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
        manifest = read_manifest(artifact)
        manifest["model"]["request"]["source"] = str(make_checkpoint(tmp_path / "other", seed=1))
        assert "is another checkpoint now" in verify_artifact(artifact, manifest, lambda *_: None)["not_verified"][0]


def test_int8_of_a_float32_checkpoint_is_judged_by_what_float16_made_of_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rounding to float16 comes before quantisation: a value beside a step's edge may lie beyond half a scale of the float32 one."""
    folder = tmp_path / "float32"
    shutil.copytree(tiny_checkpoint, folder)
    rng = np.random.default_rng(0)
    tensors = {name: values.astype(np.float32) for name, values in load_file(folder / "model.safetensors").items()}
    tensors = {name: (values * (1 + rng.uniform(-4e-4, 4e-4, values.shape))).astype(np.float32) for name, values in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out, _ = export(CheckpointRequest(str(folder)), tmp_path / "art", ExportOptions())
    fuse(out)
    quantize(out)
    levels = [weight for weight in read_checksums(out, "weights/int8-checksums.json").values() if weight.name.endswith("_int8_t")]
    beyond = sum(_worst_error(out, weight.name, tensors) > 0.501 for weight in levels if "down_proj" in weight.name or "o_proj" in weight.name)
    assert beyond > 0
    assert reasons(audit(out, folder)) == {}


def _worst_error(artifact: Path, name: str, tensors: dict[str, NDArray[np.float32]]) -> float:
    """Of a dequantised weight against the float32 one, in scales."""
    stored = read_checksums(artifact, "weights/int8-checksums.json")
    scale_name = name.removesuffix("_int8_t") + "_scale"
    values = {
        one: np.fromfile(artifact / stored[one].file, kind, offset=stored[one].offset, count=int(np.prod(stored[one].shape)))
        for one, kind in ((name, np.int8), (scale_name, np.float16))
    }
    levels, scale = values[name].reshape(stored[name].shape).astype(np.float32).T, values[scale_name].astype(np.float32)[:, None]
    return float((np.abs(levels * scale - tensors[name.removesuffix("_int8_t")]) / scale).max())


def test_quantize_names_a_weight_file_that_is_gone(artifact: Path) -> None:
    (artifact / "weights" / "layer-001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no weights/layer-001\.safetensors") as caught:
        quantize(artifact, force=True)
    assert "cli.py export" in (caught.value.hint or "")
