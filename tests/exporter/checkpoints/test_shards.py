from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifact.errors import CheckpointError
from exporter.checkpoints.shards import INDEX, open_shards

Writer = Callable[..., Path]
FIRST = "model-00001-of-00002.safetensors"
EMBEDDING = "model.embed_tokens.weight"


def point(folder: Path, tensor: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][tensor] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_open_shards_finds_each_tensor_in_its_file(write_folder: Writer, weights: dict[str, Tensor]) -> None:
    files = open_shards(write_folder(shards=2))
    assert set(files) == set(weights)
    assert len({file.path for file in files.values()}) == 2
    assert all(torch.equal(files[name].tensors[name].read(), weights[name]) for name in weights)


def test_open_shards_names_a_shard_that_is_not_there(write_folder: Writer) -> None:
    folder = write_folder(shards=2)
    (folder / FIRST).unlink()
    with pytest.raises(CheckpointError, match=rf"names {FIRST}, which is not there"):
        open_shards(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "a/../../secret.safetensors", "/etc/passwd", "", "a\0b"])
def test_open_shards_refuses_a_path_outside_the_folder(write_folder: Writer, name: str) -> None:
    folder = write_folder(shards=2)
    point(folder, EMBEDDING, name)
    with pytest.raises(CheckpointError, match="not a path inside the folder"):
        open_shards(folder)


def test_open_shards_refuses_a_link_that_leaves_the_folder(write_folder: Writer, tmp_path: Path) -> None:
    folder = write_folder(shards=2)
    shutil.move(folder / FIRST, tmp_path / "elsewhere.safetensors")
    (folder / FIRST).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere\.safetensors, outside the folder"):
        open_shards(folder)


def test_open_shards_follows_links_into_the_blobs_of_a_hub_cache(write_folder: Writer, tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_folder(shards=2, name="models--org--tiny/snapshots/abc")
    blobs = tmp_path / "models--org--tiny" / "blobs"
    blobs.mkdir()
    shutil.move(folder / FIRST, blobs / "123")
    (folder / FIRST).symlink_to("../../blobs/123")
    assert set(open_shards(folder)) == set(weights)


def test_open_shards_refuses_a_tensor_that_is_not_where_the_index_says(write_folder: Writer) -> None:
    folder = write_folder(shards=2)
    point(folder, "model.layers.7.mlp.up_proj.weight", FIRST)
    with pytest.raises(CheckpointError, match=rf"tensor model\.layers\.7\.mlp\.up_proj\.weight should be in {FIRST}, but is not there"):
        open_shards(folder)


def test_open_shards_refuses_a_tensor_in_two_files(write_folder: Writer, weights: dict[str, Tensor]) -> None:
    folder = write_folder(shards=2)
    save_file(weights, folder / FIRST)
    with pytest.raises(CheckpointError, match=r"^tensor \S+ is in two files: \S+ and \S+$"):
        open_shards(folder)


def test_open_shards_refuses_one_file_and_an_index_together(write_folder: Writer, weights: dict[str, Tensor]) -> None:
    folder = write_folder(shards=2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        open_shards(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_open_shards_refuses_an_index_without_weight_map(write_folder: Writer, text: str) -> None:
    folder = write_folder(shards=2)
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="weight_map"):
        open_shards(folder)


@pytest.mark.parametrize(("file", "hint"), [("model-00001-of-00002.safetensors", "without its index"), ("README.md", "give a folder with")])
def test_open_shards_says_what_it_looked_for_and_what_to_do(write_folder: Writer, file: str, hint: str) -> None:
    folder = write_folder()
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, .*, pytorch_model\.bin, pytorch_model\.bin\.index\.json$") as caught:
        open_shards(folder)
    assert hint in (caught.value.hint or "")
