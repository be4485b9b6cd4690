"""generate: the same greedy tokens from every stage, as a loop without a cache says them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from artifact.errors import ArtifactError, ValidationError
from commands.export import ExportOptions, export
from commands.generate import generate
from commands.graphs import fuse, quantize
from engines.engine_graph import write_engine_graph
from exporter.checkpoints import CheckpointRequest

WORDS = [f"w{index}" for index in range(64)]


@pytest.fixture(scope="module")
def artifact(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact with three stages and a tokenizer whose words are w0 … w63."""
    folder = tmp_path_factory.mktemp("generate")
    checkpoint = make_checkpoint(folder / "checkpoint", eos_token_id=None)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    out, _ = export(CheckpointRequest(str(checkpoint)), folder / "artifact", ExportOptions())
    fuse(out)
    quantize(out)
    return out


def greedy_without_cache(graph: Path, ids: list[int], count: int) -> list[int]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for _ in range(count):
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64), "position_ids": np.arange(len(ids))[None]}
        feeds |= {f"past_key_values.{layer}.{kind}": np.zeros((1, 2, 0, 8), np.float16) for layer in range(2) for kind in ("key", "value")}
        ids = [*ids, int(session.run(["logits"], feeds)[0][0, -1].argmax())]
    return ids


@pytest.mark.trace
@pytest.mark.parametrize("stage", ["traced", "fused"])
def test_generate_says_what_a_loop_without_cache_says(artifact: Path, stage: str) -> None:
    pieces: list[str] = []
    report = generate(artifact, "w3 w1 w4", stage=stage, max_new_tokens=12, say=pieces.append)
    expected = greedy_without_cache(artifact / "traced.onnx", [3, 1, 4], 12)[3:]
    assert report["text"].split() == [WORDS[token] for token in expected]
    assert "".join(pieces) == report["text"]
    assert (report["prompt_tokens"], report["new_tokens"], report["finished"]) == (3, 12, False)


@pytest.fixture(scope="module")
def static_artifact(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a static cache, and the engine graph of its fused stage, built for 20 slots."""
    checkpoint = artifact.parent / "checkpoint"
    out, _ = export(CheckpointRequest(str(checkpoint)), tmp_path_factory.mktemp("generate") / "static", ExportOptions(kv_cache="static"))
    fuse(out)
    quantize(out)
    write_engine_graph(out / "fused.onnx", out / "fused-engine.onnx", capacity=20)
    return out


@pytest.mark.trace
@pytest.mark.parametrize("stage", ["traced", "fused", "int8"])
def test_generate_says_the_same_from_a_static_cache(artifact: Path, static_artifact: Path, stage: str) -> None:
    dynamic, static = (generate(each, "w3 w1 w4", stage=stage, max_new_tokens=12) for each in (artifact, static_artifact))
    assert static["text"] == dynamic["text"]
    assert (dynamic["kv_cache"], dynamic["capacity"]) == ("dynamic", None)
    assert (static["kv_cache"], static["capacity"]) == ("static", 15)
    assert generate(static_artifact, "w3 w1 w4", stage=stage, max_new_tokens=12, capacity=90)["text"] == dynamic["text"]


@pytest.mark.trace
def test_generate_runs_a_static_engine_graph_with_its_own_capacity(artifact: Path, static_artifact: Path) -> None:
    report = generate(static_artifact, "w3 w1 w4", stage="fused-engine", max_new_tokens=12)
    assert report["capacity"] == 20
    assert report["text"] == generate(artifact, "w3 w1 w4", max_new_tokens=12)["text"]


@pytest.mark.trace
def test_generate_refuses_a_capacity_that_does_not_fit(artifact: Path, static_artifact: Path) -> None:
    with pytest.raises(ValidationError, match="the prompt has 3 tokens, and 12 more are asked for; the cache has 14 slots") as caught:
        generate(static_artifact, "w3 w1 w4", max_new_tokens=12, capacity=14)
    assert caught.value.hint == "--max-new-tokens 11"
    with pytest.raises(ValidationError, match="the cache has 2 slots") as caught:
        generate(static_artifact, "w3 w1 w4", capacity=2)
    assert caught.value.hint == "--capacity 35"
    with pytest.raises(ValidationError, match=r"--capacity 30: fused-engine\.onnx was built for 20"):
        generate(static_artifact, "w3 w1 w4", stage="fused-engine", max_new_tokens=12, capacity=30)
    with pytest.raises(ValidationError, match=r"--capacity 30 is for a static cache; fused\.onnx has a dynamic one"):
        generate(artifact, "w3 w1 w4", capacity=30)


@pytest.mark.trace
def test_generate_runs_the_quantised_stage(artifact: Path) -> None:
    assert generate(artifact, "w3 w1 w4", stage="int8", max_new_tokens=4)["new_tokens"] == 4


@pytest.mark.trace
def test_generate_refuses_a_prompt_longer_than_the_graph_allows(artifact: Path) -> None:
    with pytest.raises(ValidationError, match="the prompt has 100 tokens, and 8 more are asked for; the graph has 96 positions"):
        generate(artifact, " ".join(WORDS[:50] * 2), max_new_tokens=8)
    with pytest.raises(ValidationError) as caught:
        generate(artifact, " ".join(WORDS[:46] * 2), max_new_tokens=8)
    assert caught.value.hint == "--max-new-tokens 4"


@pytest.mark.trace
def test_generate_refuses_an_empty_prompt_and_a_stage_that_is_not_there(artifact: Path) -> None:
    with pytest.raises(ValidationError, match="the prompt is empty"):
        generate(artifact, "")
    with pytest.raises(ArtifactError, match=r"has no int4\.onnx"):
        generate(artifact, "w1", stage="int4")


@pytest.mark.trace
def test_generate_needs_a_tokenizer(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        generate(copy, "w1")
