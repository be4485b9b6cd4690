"""Kept traces: a second export hits, each thing that a trace depends on changes its key, and a damaged file is never used."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.config import LlamaConfig
from artifact.rope_scaling import RopeScaling
from artifact.steps import StepContext, rules_hash
from exporter import trace_cache
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from exporter.stamp import stamp_layers
from exporter.trace import trace_model
from exporter.trace_cache import KEPT_FILES, RULES, key_ingredients, trace_key, traced_config, traced_layer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def as_bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(stamp_layers(model, CONFIG)).SerializeToString(deterministic=True))


@pytest.fixture(scope="module")
def fresh() -> ir.Model:
    """What the exporter gives; traced once for this file."""
    return trace_model(traced_config(CONFIG), "fp16")


@pytest.fixture
def traces(fresh: ir.Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each trace that is made, and saves the seconds."""
    made: list[str] = []

    def trace(config: LlamaConfig, dtype: str, kv_cache: str) -> ir.Model:
        assert config == traced_config(CONFIG)
        made.append(f"{dtype} {kv_cache}")
        return fresh.clone()

    monkeypatch.setattr(trace_cache, "trace_model", trace)
    return made


@pytest.mark.trace
def test_second_export_hits_the_cache_gives_the_same_bytes_and_says_which_it_is(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint")))
    deeper = open_checkpoint(str(make_checkpoint(tmp_path / "deep-checkpoint", num_hidden_layers=3, bos_token_id=5)))
    reports, said = [], []
    for name, source in (("first", checkpoint), ("second", checkpoint), ("deeper", deeper)):
        (tmp_path / name).mkdir()
        step = StepContext(tmp_path / name, lambda what, *_: said.append(what))
        reports.append(export_checkpoint(step, source))
    assert [report["trace_cached"] for report in reports] == [False, True, True]
    assert [what for what in said if "one layer" in what] == ["tracing one layer", *["reading the kept trace of one layer"] * 2]
    assert (tmp_path / "first" / "traced.onnx").read_bytes() == (tmp_path / "second" / "traced.onnx").read_bytes()
    assert len(list((tmp_path / "cache" / "llama2trt" / "traces").iterdir())) == 1


@pytest.mark.trace
def test_kept_and_fresh_traces_are_what_the_exporter_gives(traces: list[str], fresh: ir.Model, tmp_path: Path) -> None:
    (first, hit_first), (second, hit_second) = (traced_layer(CONFIG, "fp16", folder=tmp_path) for _ in range(2))
    assert (hit_first, hit_second, traces) == (False, True, ["fp16 dynamic"])
    assert as_bytes(first) == as_bytes(second) == as_bytes(fresh.clone())
    weights = {name: (value.dtype, str(value.shape)) for name, value in fresh.graph.initializers.items() if value.const_value is None}
    assert len(weights) == 14
    loaded = traced_layer(CONFIG, "fp16", folder=tmp_path)[0].graph.initializers
    assert {name: (loaded[name].dtype, str(loaded[name].shape)) for name in weights} == weights
    assert [path.stat().st_size < 30_000 for path in tmp_path.iterdir()] == [True]


def flip(raw: bytearray) -> bytearray:
    raw[len(raw) // 2] ^= 1
    return raw


@pytest.mark.trace
@pytest.mark.parametrize(
    "damage", [flip, lambda raw: raw[:-100], lambda raw: bytearray(), lambda raw: raw + b"\0"], ids=["changed", "truncated", "empty", "longer"]
)
def test_damaged_file_is_ignored_and_rewritten(traces: list[str], fresh: ir.Model, tmp_path: Path, damage: Callable[[bytearray], bytearray]) -> None:
    traced_layer(CONFIG, "fp16", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    path.write_bytes(damage(bytearray(sound)))
    model, hit = traced_layer(CONFIG, "fp16", folder=tmp_path)
    assert (hit, len(traces)) == (False, 2)
    assert as_bytes(model) == as_bytes(fresh.clone())
    assert path.read_bytes() == sound
    assert traced_layer(CONFIG, "fp16", folder=tmp_path)[1]


@pytest.mark.trace
def test_file_under_another_keys_name_is_not_used(traces: list[str], tmp_path: Path) -> None:
    traced_layer(CONFIG, "fp16", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    key = trace_key(key_ingredients(traced_config(CONFIG), "fp16", "static"))
    path.rename(tmp_path / f"{key}-{path.stem.split('-')[1]}.onnx")
    assert not traced_layer(CONFIG, "fp16", "static", folder=tmp_path)[1]
    assert traces == ["fp16 dynamic", "fp16 static"]


@pytest.mark.trace
def test_folder_that_cannot_be_used_costs_a_trace_and_a_warning(traces: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        assert not traced_layer(CONFIG, "fp16", folder=tmp_path / "file")[1]
    assert len(traces) == 2
    assert "the trace is not kept for the next export" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.trace
def test_folder_stays_small_and_the_least_used_go_first(traces: list[str], tmp_path: Path) -> None:
    traced_layer(CONFIG, "fp16", folder=tmp_path)
    (first,) = tmp_path.iterdir()
    os.utime(first, ns=(0, 0))
    for index in range(KEPT_FILES + 5):
        (tmp_path / f"tmp-{index}").touch()
        os.utime(tmp_path / f"tmp-{index}", ns=(index + 1, index + 1))
    assert traced_layer(CONFIG, "fp16", folder=tmp_path)[1]  # used, so young again
    traced_layer(CONFIG, "fp32", folder=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == KEPT_FILES
    assert first.name in left
    assert f"tmp-{KEPT_FILES + 4}" in left
    assert "tmp-0" not in left


def changed(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value * 2
    if isinstance(value, dict):
        name = next(iter(value))
        return value | {name: changed(value[name])}
    return f"{value}x"


@pytest.mark.parametrize("ingredient", key_ingredients(CONFIG, "fp16", "dynamic"))
def test_each_ingredient_changes_the_key(ingredient: str) -> None:
    before = key_ingredients(CONFIG, "fp16", "dynamic")
    assert trace_key(before) == trace_key(dict(reversed(before.items())))
    assert trace_key(before | {ingredient: changed(before[ingredient])}) != trace_key(before)


def test_ingredients_name_every_package_and_the_options() -> None:
    ingredients = key_ingredients(CONFIG, "fp32", "static")
    assert ingredients["versions"].keys() >= {"torch", "onnx", "onnxscript", "onnx-ir"}
    assert (ingredients["dtype"], ingredients["kv_cache"], ingredients["opset"]) == ("fp32", "static", 24)


@pytest.mark.parametrize("name", [field.name for field in fields(LlamaConfig)])
def test_only_depth_and_special_tokens_leave_the_key_alone(name: str) -> None:
    keys: list[Any] = [object(), object()]
    other = RopeScaling(rope_type="linear", factor=2.0) if name == "rope_scaling" else changed(getattr(CONFIG, name))
    for index, value in enumerate((getattr(CONFIG, name), other)):
        keys[index] = trace_key(key_ingredients(traced_config(replace(CONFIG, **{name: value})), "fp16", "dynamic"))
    assert (keys[0] == keys[1]) == (name in {"num_hidden_layers", "bos_token_id", "eos_token_id"})


def test_a_changed_source_file_changes_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artifact.steps.ROOT", tmp_path)
    hashes = set()
    for text in ("a = 1\n", "a = 2\n"):
        for path in ("exporter/model.py", "artifact/io_spec.py"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
            hashes.add(rules_hash(RULES))
    assert len(hashes) == 4


def test_rules_are_every_source_file_that_the_trace_imports() -> None:
    found, left = set(), [Path("exporter/trace.py")]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                names += [f"{names[0]}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
                candidates = [Path(*name.split(".")).with_suffix(".py") for name in names if name]
                left += [candidate for candidate in candidates if (ROOT / candidate).is_file()]
    assert {Path("exporter/model.py"), Path("exporter/rope.py"), Path("exporter/static_cache.py"), Path("artifact/io_spec.py")} < found
    covered = {path.relative_to(ROOT) for pattern in RULES for path in ROOT.glob(pattern)}
    assert found <= covered
