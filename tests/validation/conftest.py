"""A tiny artifact made by the real exporter, and ways to damage a graph as a bug in an earlier step would: before its hash was recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, models, pre_tokenizers

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.hashing import sha256_of
from artifact.layout import MODULE_KEY
from artifact.manifest import fingerprint, read_manifest, write_manifest
from artifact.steps import StepContext, run_step
from engines.one_position import gather_last_position
from engines.profiles import make_profiles
from exporter.checkpoints import Checkpoint, open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.int8 import quantize_int8
from validation import render
from validation.lone import report as lone_report
from validation.parity import validate_artifact
from validation.render import render_all
from validation.render import schema as published

Validate = Callable[[Path], dict[str, Any]]


class Editor:
    """Small integer arithmetic put before everything else in a graph, and fed to whatever used a value."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.made: list[ir.Node] = []

    def number(self, *values: int) -> ir.Value:
        name = f"saboteur.{len(self.graph.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
        self.graph.initializers.add(value)
        return value

    def op(self, name: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.Node("", name, inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()])
        self.made.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=int(ir.DataType.INT64))

    def single(self) -> ir.Value:
        """[1] int64: 1 in calls of one token, 0 in others."""
        length = self.op("Shape", self.input(io_spec.INPUT_IDS), start=1, end=2)
        return self.cast(self.op("Equal", length, self.number(1)))

    def is_padded(self) -> ir.Value:
        """[B, 1] int64: 1 in rows with padding."""
        return self.op("Sub", self.number(1), self.op("ReduceMin", self.input(io_spec.ATTENTION_MASK), self.number(1), keepdims=1))

    def input(self, name: str) -> ir.Value:
        return next(value for value in self.graph.inputs if value.name == name)

    def replace(self, value: ir.Value, make: Callable[[], ir.Value]) -> None:
        users = list(value.uses())
        new = make()
        new.type, new.shape = value.type, value.shape
        for node, index in users:
            node.replace_input_with(index, new)
        self.graph.extend(self.made)
        self.made = []
        self.graph.sort()


Edit = Callable[[Editor], None]


@pytest.fixture(scope="session")
def open_padding_in_steps() -> Edit:
    """A mask that leaks: calls of one token attend to padding."""

    def edit(editor: Editor) -> None:
        mask = editor.input(io_spec.ATTENTION_MASK)
        editor.replace(mask, lambda: editor.op("Max", mask, editor.single()))

    return edit


def _closed(schema: Any) -> Any:
    """The schema, refusing every key that it does not describe: whoever adds a key to the report describes it there."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return {"additionalProperties": False} | closed if schema.get("type") == "object" and "properties" in schema else closed


@pytest.fixture(scope="session")
def complaints() -> Callable[[dict[str, Any]], list[str]]:
    """``complaints(report)``: what of a report parity.schema.json does not allow or does not describe."""
    validator = Draft202012Validator(_closed(json.loads(published.FILE.read_text(encoding="utf-8"))))
    return lambda report: [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(report)]


@pytest.fixture(scope="session", autouse=True)
def every_report_fits_the_schema(complaints: Callable[[dict[str, Any]], list[str]]) -> Iterator[None]:
    """Whatever report a test has written, whole or failed, of an artifact or of a lone graph, is held against the published schema."""

    def checked(report: dict[str, Any]) -> dict[str, str]:
        assert complaints(report) == []
        return render_all(report)

    with pytest.MonkeyPatch.context() as patch:
        for module in (render, lone_report):
            patch.setattr(module, "render_all", checked)
        yield


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def config(checkpoint: Checkpoint) -> LlamaConfig:
    return checkpoint.config


@pytest.fixture(scope="session")
def validate(checkpoint: Checkpoint) -> Validate:
    return lambda artifact: validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=None, text=None, tokens=None)


@pytest.fixture(scope="session")
def sound_artifact(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported fp16 artifact; not to be changed."""
    artifact = tmp_path_factory.mktemp("artifacts") / "tiny"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    return artifact


@pytest.fixture(scope="session")
def static_artifact(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported fp16 artifact with a static cache, fused and quantised; not to be changed."""
    artifact = tmp_path_factory.mktemp("artifacts") / "static"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16", kv_cache="static"))
    run_step(artifact, "fuse", {}, fuse_artifact)
    run_step(artifact, "quantize-int8", {}, quantize_int8)
    return artifact


@pytest.fixture(scope="session")
def sound_report(sound_artifact: Path, validate: Validate) -> dict[str, Any]:
    """The report of the undamaged artifact; its floor stays in the folder."""
    return validate(sound_artifact)


@pytest.fixture(scope="session")
def write_number_tokenizer() -> Callable[[Path], None]:
    """Writes a tokenizer of 64 words, the ids themselves."""

    def write(artifact: Path) -> None:
        tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(artifact / "tokenizer.json"))

    return write


@pytest.fixture(scope="session")
def quantized(
    sound_artifact: Path,
    sound_report: dict[str, Any],
    write_number_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Traced, fused and int8, with a tokenizer whose words are the ids; not to be changed."""
    assert sound_report["passed"]
    artifact = Path(shutil.copytree(sound_artifact, tmp_path_factory.mktemp("quantized") / "tiny"))
    write_number_tokenizer(artifact)
    run_step(artifact, "fuse", {}, fuse_artifact)
    run_step(artifact, "quantize-int8", {}, quantize_int8)
    return artifact


@pytest.fixture
def artifact(sound_artifact: Path, sound_report: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the exported artifact, with its floor, to be changed."""
    assert sound_report["passed"]
    return Path(shutil.copytree(sound_artifact, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def rewrite_graph() -> Callable[..., None]:
    """``rewrite_graph(artifact, edit)`` changes traced.onnx; ``to`` names another file. The manifest takes the result for what a step wrote."""

    def rewrite(artifact: Path, edit: Callable[[ir.Model], None], *, to: str = "traced.onnx") -> None:
        model = ir.load(artifact / "traced.onnx")
        edit(model)
        ir.save(model, artifact / to)
        manifest = read_manifest(artifact)
        manifest["steps"]["export"]["outputs"][to] = fingerprint(artifact / to)
        write_manifest(artifact, manifest)

    return rewrite


@pytest.fixture
def write_plan(artifact: Path, config: LlamaConfig, plan_on_cpu: ModuleType, rewrite_graph: Callable[..., None]) -> Callable[..., dict[str, Any]]:
    """Gather the last position of traced.onnx, damage it, and say that a plan was built of it."""

    def write(
        edit: Callable[[ir.Model], None] = lambda model: None, *, max_batch: int = 2, max_length: int = config.max_position_embeddings, **entry: Any
    ) -> dict[str, Any]:
        def gather(model: ir.Model) -> None:
            edit(model)
            gather_last_position(model.graph, "traced.onnx")

        rewrite_graph(artifact, gather, to="traced-engine.onnx")
        profiles = make_profiles(config, "fp16", max_batch=max_batch, max_length=max_length)
        made: dict[str, Any] = plan_on_cpu.write_plan(
            artifact, "traced-engine.onnx", {profile.name: dict(profile.axes) for profile in profiles}, **entry
        )
        return made

    return write


@pytest.fixture(scope="session")
def shift_decode_positions() -> Callable[[ir.Model], None]:
    """An edit of a graph: every call with one new token sees the position before."""
    return _shift_decode_positions


@pytest.fixture(scope="session")
def overflow_around() -> Callable[[ir.Model, str, float], None]:
    """``overflow_around(model, module, factor)`` multiplies what enters the MatMul of a module and divides what leaves it: the same in float32."""
    return _overflow_around


@pytest.fixture(scope="session")
def sabotage() -> Callable[[Path, Path, str, Edit], Path]:
    """``sabotage(artifact, to, stage, edit)``: a copy with one graph edited, as a bug of the step that made it would: recorded as its output."""
    return _sabotage


@pytest.fixture(scope="session")
def measure(checkpoint: Checkpoint) -> Callable[[Path, str], tuple[dict[str, Any], dict[str, str | None]]]:
    """``measure(artifact, stage)``: the report of one stage, and check → where of what failed."""
    return lambda artifact, stage: _measure(artifact, checkpoint, stage)


def _sabotage(stages: Path, to: Path, stage: str, edit: Edit) -> Path:
    artifact = Path(shutil.copytree(stages, to))
    graph = artifact / f"{stage}.onnx"
    model = ir.load(graph)
    edit(Editor(model))
    ir.save(model, graph)
    manifest = read_manifest(artifact)
    for step in manifest["steps"].values():
        for files in (step["inputs"], step["outputs"]):
            if graph.name in files:
                files[graph.name] = fingerprint(graph) if files is step["outputs"] else sha256_of(graph)
    write_manifest(artifact, manifest)
    return artifact


def _measure(artifact: Path, checkpoint: Checkpoint, stage: str) -> tuple[dict[str, Any], dict[str, str | None]]:
    report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=[stage], text=None, tokens=None)
    (entry,) = report["stages"]
    return report, {check["check"]: check["where"] for check in entry["checks"] if check["passed"] is False}


def _overflow_around(model: ir.Model, module: str, factor: float) -> None:
    linear = next(node for node in model.graph if node.op_type == "MatMul" and node.metadata_props.get(MODULE_KEY) == module)
    before, after = linear.inputs[0].producer(), linear.outputs[0].consumers()
    _insert_factor(model.graph, before if before.op_type == "Cast" else linear, factor, entering=True)
    _insert_factor(model.graph, after[0] if after and after[0].op_type == "Cast" else linear, 1 / factor, entering=False)


def _insert_factor(graph: ir.Graph, linear: ir.Node, factor: float, *, entering: bool) -> None:
    value = linear.inputs[0] if entering else linear.outputs[0]
    assert value is not None
    module = linear.metadata_props[MODULE_KEY]
    name = f"{module}.{'before' if entering else 'after'}"
    constant = ir.Value(name=name, const_value=ir.tensor(np.float16(factor), name=name), type=value.type, shape=ir.Shape([]))
    graph.register_initializer(constant)
    users = [(linear, 0)] if entering else list(value.uses())
    scaled = ir.node("Mul", [value, constant], name=f"{name}.Mul", metadata_props={MODULE_KEY: module})
    output = scaled.outputs[0]
    output.name, output.type, output.shape = f"{name}.scaled", value.type, value.shape
    for user, index in users:
        user.replace_input_with(index, output)
    if not entering and value.is_graph_output():
        value.name, output.name = f"{name}.unscaled", value.name
        graph.outputs[list(graph.outputs).index(value)] = output
    (graph.insert_before if entering else graph.insert_after)(linear, scaled)


def _shift_decode_positions(model: ir.Model) -> None:
    position_ids = next(value for value in model.graph.inputs if value.name == io_spec.POSITION_IDS)
    users = list(position_ids.uses())
    one = ir.Value(name="one", const_value=ir.tensor(np.array([1], np.int64), name="one"))
    model.graph.initializers.add(one)
    length = ir.Node("", "Shape", [position_ids], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
    single = ir.Node("", "Equal", [length.outputs[0], one])
    step = ir.Node("", "Cast", [single.outputs[0]], [ir.AttrInt64("to", ir.DataType.INT64)])
    shifted = ir.Node("", "Sub", [position_ids, step.outputs[0]])
    for node, index in users:
        node.replace_input_with(index, shifted.outputs[0])
    model.graph.extend([length, single, step, shifted])
    model.graph.sort()
