"""The reference against Hugging Face's own Llama: equal where both are sound, and every kind of mistake on one side found and placed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_checkpoint, open_request
from validation import transformers_check, transformers_model
from validation.besides import Besides
from validation.lone.report import validate_graph
from validation.oracle import Oracle
from validation.parity import first_mismatch, overall, validate_artifact
from validation.prepare import prepare_oracle
from validation.render import render_all
from validation.transformers_check import check_reference, shortened
from validation.transformers_model import MINIMUM, TransformersModel, require_transformers

Judge = Callable[..., dict[str, Any]]
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "biases, tied, wide heads": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    "llama3 rope": {"rope_scaling": ROPE},
}


@pytest.fixture
def prepared(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[Checkpoint | None], Oracle]:
    """An oracle of the reference, which may be wrong: of another config or other weights than the checkpoint's."""
    return lambda ours=None: prepare_oracle(StepContext(tmp_path), ours or checkpoint, "fp32", text=None, tokens=None)


@pytest.fixture
def judge(checkpoint: Checkpoint, prepared: Callable[..., Oracle], tmp_path: Path) -> Judge:
    """The comparison of a maybe wrong reference with transformers' model of the sound checkpoint."""
    return lambda ours=None: check_reference(StepContext(tmp_path), prepared(ours), TransformersModel(checkpoint))


class Wrong:
    """A checkpoint as our side reads it, with one mistake."""

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig | None = None, read: Callable[[str], torch.Tensor] | None = None) -> None:
        self._checkpoint, self.config, self.read = checkpoint, config or checkpoint.config, read or checkpoint.read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


def failed(found: dict[str, Any]) -> dict[str, str | None]:
    return {check["check"]: check["where"] for check in found["entry"]["checks"] if check["passed"] is False}


def test_the_reference_is_what_transformers_computes(judge: Judge) -> None:
    found = judge()
    entry = found["entry"]
    assert found["passed"] is True
    assert (found["config"], found["weights"]) == ("the checkpoint's own config.json", "as stored")
    assert [scenario["scenario"] for scenario in entry["scenarios"]] == ["prefill", "decode", "chunked", "padded"]
    assert len(entry["hidden_errors"]) == 2
    assert 0 <= entry["max_abs_relative"] < 1e-5
    assert entry["first_layer_outside"] is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_right_for_variants(variant: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", **VARIANTS[variant])))
    step = StepContext(tmp_path)
    assert check_reference(step, prepare_oracle(step, checkpoint, "fp32", text=None, tokens=None), TransformersModel(checkpoint))["passed"] is True


@pytest.mark.parametrize(("field", "factor"), [("rope_theta", 1.001), ("rms_norm_eps", 2.0)])
def test_a_slightly_wrong_config_on_our_side_is_found(field: str, factor: float, checkpoint: Checkpoint, judge: Judge) -> None:
    wrong = replace(checkpoint.config, **{field: getattr(checkpoint.config, field) * factor})
    assert "hidden_error" in failed(judge(Wrong(checkpoint, config=wrong)))


def test_a_layer_that_our_side_lost_is_found(checkpoint: Checkpoint, judge: Judge) -> None:
    found = judge(Wrong(checkpoint, config=replace(checkpoint.config, num_hidden_layers=1)))
    assert found["passed"] is False
    (check,) = [check for check in found["entry"]["checks"] if check["check"] == "runs"]
    assert str(check["reason"]).startswith("the reference has 1 layers, transformers 5.")
    assert str(first_mismatch({"checksums": None, "floor": {"check": {"passed": None}}, "against": found})).startswith(
        "the reference could not be held against transformers: the reference has 1 layers"
    )


def test_an_embedding_of_another_shape_is_refused_and_the_table_is_read_once(checkpoint: Checkpoint) -> None:
    asked: list[str] = []
    counted: Any = Wrong(checkpoint, read=lambda name: (asked.append(name), checkpoint.read(name))[1])
    model = TransformersModel(counted)
    assert [tuple(state.shape) for state in model.embed([torch.zeros(1, 3, dtype=torch.int64)] * 2)] == [(1, 3, 32)] * 2
    assert asked == ["model.embed_tokens.weight"]
    counted.shapes = {**checkpoint.shapes, "model.embed_tokens.weight": (65, 32)}
    with pytest.raises(ValidationError, match=r"embed_tokens.weight is \(64, 32\) in transformers .*, \(65, 32\) in the checkpoint"):
        TransformersModel(counted)


def test_swapped_heads_in_one_layer_are_found_and_placed(checkpoint: Checkpoint, judge: Judge) -> None:
    name, size = "model.layers.1.self_attn.q_proj.weight", checkpoint.config.head_dim

    def read(asked: str) -> torch.Tensor:
        weight = checkpoint.read(asked)
        return torch.cat((weight[size : 2 * size], weight[:size], weight[2 * size :])) if asked == name else weight

    found = judge(Wrong(checkpoint, read=read))
    assert found["passed"] is False
    assert failed(found)["hidden_error"] == "layer 1"
    assert found["entry"]["first_layer_outside"] == 1
    assert found["entry"]["hidden_errors"][0] < 1e-6


def test_a_lost_bias_is_found(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", mlp_bias=True)))
    ours: Any = Wrong(checkpoint, config=replace(checkpoint.config, mlp_bias=False))
    step = StepContext(tmp_path)
    assert check_reference(step, prepare_oracle(step, ours, "fp32", text=None, tokens=None), TransformersModel(checkpoint))["passed"] is False


def test_a_reference_that_is_wrong_fails_the_report_and_is_named_first(checkpoint: Checkpoint, judge: Judge, sound_report: dict[str, Any]) -> None:
    found = judge(Wrong(checkpoint, config=replace(checkpoint.config, rope_theta=9000.0)))
    report = sound_report | {"against": found}
    assert overall(report) is False
    assert str(first_mismatch(report)).startswith("the reference is not the model that transformers computes in float32: hidden_error")


def test_the_report_has_it_in_all_formats(artifact: Path, checkpoint: Checkpoint) -> None:
    report = validate_artifact(
        StepContext(artifact),
        checkpoint=checkpoint,
        stages=["traced"],
        text=None,
        tokens=None,
        besides=Besides(transformers=TransformersModel(checkpoint)),
    )
    rendered = render_all(report)
    assert report["passed"] is True
    assert json.loads(rendered["json"])["against"]["entry"]["hidden_error"] < 1e-6
    assert "The reference against transformers" in rendered["md"]
    assert "The reference against transformers" in rendered["html"]
    assert 'testsuite name="reference against transformers"' in rendered["xml"]
    assert {row["check"] for row in report["tolerances"] if row["stage"] == "transformers"} == {
        "hidden_error", "max_abs_relative", "cache_error", "mean_kl",
    }  # fmt: skip


def test_a_lone_graph_has_it_too(sound_artifact: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    besides = Besides(transformers=TransformersModel(checkpoint))
    report = validate_graph(sound_artifact / "traced.onnx", checkpoint, out=tmp_path, text=None, tokens=None, besides=besides)
    assert report["against"]["passed"] is True
    assert report["passed"] is True


def test_streamed_caches_lie_on_disk_and_change_nothing(checkpoint: Checkpoint, judge: Judge, tmp_path: Path) -> None:
    oracle = prepare_oracle(StepContext(tmp_path), checkpoint, "fp32", text=None, tokens=None, streamed=True)
    streamed, whole = check_reference(StepContext(tmp_path), oracle, TransformersModel(checkpoint)), judge()
    assert streamed["entry"]["scenarios"] == whole["entry"]["scenarios"]


def test_decode_is_cut_to_eight_steps(prepared: Callable[..., Oracle]) -> None:
    prefill, decode, chunked, padded = map(shortened, prepared().scenarios)
    assert len(prefill.chunks) == 1
    assert decode.chunks[1:] == (1,) * 8
    assert sum(decode.chunks) == len(decode.rows[0])
    assert len(chunked.chunks) == 3
    assert padded.chunks[1:] == (1,) * 8


def test_transformers_that_is_missing_or_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "4.57.1")
    with pytest.raises(ValidationError, match=re.escape("needs transformers 5.23 or newer, installed is 4.57.1")) as refused:
        require_transformers()
    assert refused.value.hint == "pip install 'transformers>=5.23'"

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ValidationError, match="not installed"):
        require_transformers()


def test_the_minimum_is_what_the_package_asks_for() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"transformers>={".".join(map(str, MINIMUM))}"' in project


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"initializer_range": 2.0}, "Validation error for field 'initializer_range'"),
        ({"attention_dropout": "none"}, "Validation error for field 'attention_dropout'"),
    ],
)
def test_a_config_that_transformers_refuses_is_one_error(
    config: dict[str, Any], said: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path / "checkpoint", **config)))
    with pytest.raises(ValidationError, match=f"transformers 5.* can't express this model: {said}") as refused:
        TransformersModel(checkpoint)
    assert refused.value.hint == "leave out --against transformers"


def test_a_module_that_does_not_take_the_call_is_one_error_before_a_weight_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(module: Any, state: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{tuple(state.shape)} on {state.device}")

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", other)
    untouched: Any = Wrong(checkpoint, read=lambda name: pytest.fail(f"{name} was read"))
    with pytest.raises(ValidationError, match=r"can't express this model: \(1, 2, 32\) on meta"):
        TransformersModel(untouched)


def test_a_part_of_transformers_that_is_not_there_is_one_error(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(ValidationError, match=r"needs a part of transformers 5.* that can't be imported: .*masking_utils") as refused:
        TransformersModel(checkpoint)
    assert refused.value.hint == "pip install 'transformers>=5.23'"


def test_weights_that_transformers_has_no_place_for_are_one_error(checkpoint: Checkpoint) -> None:
    more: Any = Wrong(checkpoint)
    more.shapes = {**checkpoint.shapes, "model.layers.1.self_attn.q_norm.weight": (8,)}
    with pytest.raises(ValidationError, match=r"layers.1.self_attn.q_norm.weight is not there in transformers .*, \(8,\) in the checkpoint"):
        TransformersModel(more)


def test_config_of_another_format_is_said_to_be_ours(tmp_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint = open_request(CheckpointRequest("random:0", config=tiny_checkpoint / "config.json"))
    assert transformers_model.config_source(checkpoint) == "a config.json written from what was read of the random checkpoint"
    for form in ("gguf", "meta", "safetensors+lora"):
        assert transformers_model.weights_source(SimpleNamespace(format=form)).startswith("reordered, dequantised or merged")  # type: ignore[arg-type]
    assert transformers_check.PACKAGE == "transformers"
