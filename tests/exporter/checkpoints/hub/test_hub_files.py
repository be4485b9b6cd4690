from __future__ import annotations

from pathlib import Path

import pytest

from artifact.errors import CheckpointError
from exporter.checkpoints.hub_files import Wanted, choose_files, shard_names, usual_files

LLAMA_2_7B = [
    *(".gitattributes", "LICENSE.txt", "README.md", "USE_POLICY.md", "config.json", "generation_config.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    *("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
]
"""The repository meta-llama/Llama-2-7b-hf."""


def no_index(name: str) -> Path:
    raise AssertionError(f"no index is needed, and {name} was asked for")


def test_usual_files_of_llama_2_leaves_the_bin_twins_out() -> None:
    left = {*LLAMA_2_7B} - {*usual_files(LLAMA_2_7B)}
    assert left == {
        *(".gitattributes", "LICENSE.txt", "README.md", "USE_POLICY.md"),
        *("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
    }


def test_usual_files_of_another_form_are_none() -> None:
    assert usual_files(["config.json", "x.gguf", "original/model.safetensors"]) == []


def test_choose_files_prefers_one_file_of_safetensors() -> None:
    names = ["config.json", "model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "params.json", "tokenizer.model"]
    assert choose_files(names, no_index, "x") == Wanted(("config.json", "tokenizer.model"), ("model.safetensors",))


def test_choose_files_takes_metas_own_form_where_it_is_the_only_one() -> None:
    names = ["consolidated.01.pth", "consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk"]
    assert choose_files(names, no_index, "x") == Wanted(("params.json", "tokenizer.model"), ("consolidated.00.pth", "consolidated.01.pth"))


def test_choose_files_leaves_a_folder_of_metas_form_alone() -> None:
    with pytest.raises(CheckpointError, match="no weights that can be read"):
        choose_files(["config.json", "original/consolidated.00.pth", "original/params.json", "params.json"], no_index, "x")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 1}}'])
def test_shard_names_refuses_what_is_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        shard_names(tmp_path / "index.json")
