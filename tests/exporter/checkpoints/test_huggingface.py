from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from exporter.checkpoints import open_checkpoint

Writer = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_open_huggingface_reads_every_weight_as_stored(
    write_folder: Writer, weights: dict[str, Tensor], config: LlamaConfig, shards: int, dtype: torch.dtype
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    folder = write_folder(tensors=stored, shards=shards)
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.source, checkpoint.name, checkpoint.format, checkpoint.config) == (str(folder), "tiny-llama", "safetensors", config)
    assert checkpoint.shapes.keys() == weights.keys()
    assert set(checkpoint.dtypes.values()) == {{torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]}
    for name in checkpoint.shapes:
        ours = checkpoint.read(name)
        assert ours.dtype == dtype
        assert torch.equal(ours, stored[name]), name


def test_read_refuses_a_name_that_the_model_does_not_have(write_folder: Writer) -> None:
    with pytest.raises(KeyError):
        open_checkpoint(str(write_folder())).read("model.layers.2.mlp.up_proj.weight")


def test_open_huggingface_reports_unknown_keys_dropped_tensors_and_the_missing_tokenizer(
    write_folder: Writer, weights: dict[str, Tensor], config: LlamaConfig
) -> None:
    folder = write_folder(config=config.to_hf() | {"surprise": 1}, tensors=weights | {"rope.freqs": torch.ones(4)})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.unknown_config_keys == ["surprise"]
    assert checkpoint.dropped == ["rope.freqs"]
    assert "rope.freqs" not in checkpoint.shapes
    assert "no tokenizer" in checkpoint.notes[0]


def test_open_huggingface_compares_a_stored_lm_head_with_the_embedding_it_is_tied_to(
    write_folder: Writer, weights: dict[str, Tensor], config: LlamaConfig
) -> None:
    tied = replace(config, tie_word_embeddings=True).to_hf()
    same = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    assert open_checkpoint(str(write_folder(tied, same, name="same"))).dropped == ["lm_head.weight"]
    with pytest.raises(CheckpointError, match="the config ties lm_head to the embedding"):
        open_checkpoint(str(write_folder(tied, weights, name="other")))


def test_fingerprint_tells_other_weights_of_the_same_shapes_apart(write_folder: Writer, weights: dict[str, Tensor]) -> None:
    tuned = weights | {UP: weights[UP] + 1 / 1024}
    ours, again, theirs = (
        open_checkpoint(str(write_folder(tensors=tensors, name=name))) for name, tensors in zip("abc", (weights, weights, tuned), strict=True)
    )
    assert ours.fingerprint == again.fingerprint
    assert ours.fingerprint != theirs.fingerprint
    assert len(ours.fingerprint) == 64


def test_fingerprint_tells_another_config_apart(write_folder: Writer, config: LlamaConfig) -> None:
    other = write_folder(config=replace(config, rope_theta=5e5).to_hf(), name="b")
    assert open_checkpoint(str(write_folder(name="a"))).fingerprint != open_checkpoint(str(other)).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"model_type is 'mistral'; supported: 'llama'"),
        ({"num_hidden_layers": 3}, r"^config has 3 layers, weights hold 2$"),
        (
            {"intermediate_size": 65},
            r"tensor model\.layers\.0\.mlp\.gate_proj\.weight: config expects shape \[65, 32\], the checkpoint has \[64, 32\]",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"the checkpoint is quantised \('gptq'\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"the checkpoint is quantised \('awq'\)"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 8}}, r"rope_type = 'ntk' is not supported"),
        ({"hidden_size": "32"}, r"hidden_size must be an integer"),
    ],
)
def test_open_huggingface_refuses_a_config_by_name(write_folder: Writer, config: LlamaConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(write_folder(config=config.to_hf() | change)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_open_huggingface_names_a_tensor_of_an_unsupported_dtype(write_folder: Writer, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=rf"tensor {UP} has dtype \S+; supported: F16, BF16, F32"):
        open_checkpoint(str(write_folder(tensors=weights | {UP: weights[UP].to(dtype)})))


def test_open_huggingface_refuses_a_folder_without_config(write_folder: Writer) -> None:
    folder = write_folder()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json$"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_open_huggingface_refuses_a_config_that_is_no_json_object(write_folder: Writer, text: str) -> None:
    folder = write_folder()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: (not JSON|expected a JSON object)"):
        open_checkpoint(str(folder))


def test_open_huggingface_takes_the_name_of_a_hub_cache(write_folder: Writer) -> None:
    assert open_checkpoint(str(write_folder(name="models--org--Tiny-7b-hf/snapshots/0123abc"))).name == "tiny-7b-hf"


def test_write_sidecars_copies_config_and_tokenizer_as_real_files_and_no_code(write_folder: Writer, tmp_path: Path) -> None:
    folder = write_folder()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "modeling.py", "README.md"):
        (folder / name).write_text(name)
    (folder / "merges.txt").symlink_to("tokenizer.json")
    target = tmp_path / "out"
    target.mkdir()

    @contextmanager
    def write(relative: str) -> Iterator[Path]:
        yield target / relative

    checkpoint = open_checkpoint(str(folder))
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja", "generation_config.json"]
    assert checkpoint.notes == []
    assert checkpoint.write_sidecars(write) == names
    assert sorted(path.name for path in target.iterdir()) == sorted(names)
    assert not any(path.is_symlink() for path in target.iterdir())
    assert json.loads((target / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_open_huggingface_refuses_a_sidecar_that_links_out_of_the_folder(write_folder: Writer, tmp_path: Path) -> None:
    folder = write_folder()
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to .*secret, outside the folder"):
        open_checkpoint(str(folder))
