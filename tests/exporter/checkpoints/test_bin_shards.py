"""A ``.bin`` folder's index and shards: refused in the same words as safetensors'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from artifact.errors import CheckpointError
from exporter.checkpoints import open_checkpoint

Writer = Callable[..., Path]
INDEX, FIRST = "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"
NAME = "model.embed_tokens.weight"


def point(folder: Path, tensor: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][tensor] = file
    (folder / INDEX).write_text(json.dumps(index))


def link_out(folder: Path) -> None:
    shutil.move(folder / FIRST, folder.parent / "elsewhere")
    (folder / FIRST).symlink_to(folder.parent / "elsewhere")


def cut(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-50])


def twice(folder: Path) -> None:
    first, second = (torch.load(folder / FIRST.replace("-00001-", f"-{number:05d}-")) for number in (1, 2))
    torch.save(first | second, folder / FIRST)


def drop(folder: Path) -> None:
    tensors = torch.load(folder / FIRST)
    del tensors[NAME]
    torch.save(tensors, folder / FIRST)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / FIRST).unlink(), rf"{INDEX} names {FIRST}, which is not there$"),
        (lambda folder: point(folder, NAME, "../secret.bin"), r"the checkpoint names '\.\./secret\.bin', which is not a path inside the folder$"),
        (lambda folder: point(folder, NAME, "/etc/passwd"), r"the checkpoint names '/etc/passwd', which is not a path inside the folder$"),
        (link_out, rf"{FIRST} is a link to .*elsewhere, outside the folder$"),
        (cut, rf"^{FIRST}: truncated or damaged \([\d,]+ bytes"),
        (twice, rf"^tensor \S+ is in two files: {FIRST} and pytorch_model-00002-of-00002\.bin$"),
        (drop, rf"^{INDEX}: tensor {NAME} should be in {FIRST}, but is not there$"),
        (lambda folder: (folder / INDEX).write_text("{"), "no weight_map can be read from it"),
        (lambda folder: torch.save({}, folder / "pytorch_model.bin"), rf"has both pytorch_model\.bin and {INDEX}$"),
        (lambda folder: (folder / INDEX).unlink(), r"none of .*pytorch_model\.bin\.index\.json$"),
    ],
)
def test_open_checkpoint_refuses_damaged_shards_by_name(write_bin: Writer, damage: Callable[[Path], object], message: str) -> None:
    folder = write_bin(shards=2)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


def test_open_checkpoint_names_missing_extra_and_misshapen_tensors_of_a_bin_folder(write_bin: Writer, weights: dict[str, Tensor]) -> None:
    cases = {
        rf"^missing tensor {NAME}$": {name: weights[name] for name in weights if name != NAME},
        r"^extra tensor surprise: not a weight": weights | {"surprise": torch.ones(3)},
        rf"^tensor {NAME}: config expects shape \[96, 32\], the checkpoint has \[96, 31\]$": weights | {NAME: torch.ones(96, 31)},
        r"^config has 2 layers, weights hold 3$": weights | {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)},
    }
    for index, (message, tensors) in enumerate(cases.items()):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(write_bin(tensors=tensors, name=f"case-{index}")))
