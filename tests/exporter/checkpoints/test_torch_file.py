from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifact.errors import CheckpointError
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.torch_file import open_torch

Writer = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"


class RunsCode:
    """What a malicious checkpoint does: a call of its choice when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def saved(folder: Path, value: Any, name: str = "x.bin", **options: Any) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def test_open_torch_finds_views_and_shared_storages(tmp_path: Path) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    tensors = {
        **{"base": base, "tied": base, "columns": base[:, 2:5], "turned": base.t(), "rows": base[2:4], "vector": base[3]},
        **{"parameter": torch.nn.Parameter(base.half()), "brain": base.bfloat16(), "one": torch.tensor(3.0), "none": torch.empty(0, 4)},
    }
    opened = open_torch(saved(tmp_path, tensors))
    assert set(opened.tensors) == set(tensors)
    for name, tensor in tensors.items():
        where = opened.tensors[name]
        assert where.shape == tuple(tensor.shape)
        if tensor.ndim:
            assert torch.equal(where.read(), tensor), name
    assert opened.tensors["base"].offset == opened.tensors["tied"].offset
    assert opened.header_bytes == opened.tensors["base"].offset


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_open_torch_looks_into_a_training_checkpoint(tmp_path: Path, key: str) -> None:
    assert list(open_torch(saved(tmp_path, {key: {"a": torch.ones(2)}, "step": 3})).tensors) == ["a"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_open_torch_refuses_a_pickle_that_runs_code_and_never_runs_it(tmp_path: Path, legacy: bool, beside: bool) -> None:
    trap = RunsCode(tmp_path / "pwned")
    path = saved(tmp_path, {"a": torch.ones(2), "b": trap} if beside else trap, _use_new_zipfile_serialization=not legacy)
    reason = "file format from before version 1.6" if legacy else r"its pickle would run code \(posix\.mkdir\); refused, and nothing of it was run"
    with pytest.raises(CheckpointError, match=rf"^x\.bin: .*{reason}") as caught:
        open_torch(path)
    assert "safetensors" in (caught.value.hint or "") or "weights_only=True" in (caught.value.hint or "")
    assert not trap.target.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.target.exists()  # the trap is real


@pytest.mark.parametrize("form", ["folder", "shard", "meta"])
def test_open_checkpoint_names_the_file_whose_pickle_runs_code(
    write_bin: Writer, write_meta: Writer, weights: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    trap = RunsCode(tmp_path / "pwned")
    if form == "meta":
        folder, name = write_meta(parts=2), "consolidated.01.pth"
    else:
        folder, name = write_bin(shards=1 + (form == "shard")), "pytorch_model.bin" if form == "folder" else "pytorch_model-00002-of-00002.bin"
    saved(folder, {**torch.load(folder / name), "extra": trap}, name)
    with pytest.raises(CheckpointError, match=rf"^{name}: its pickle would run code \(posix\.mkdir\)"):
        open_checkpoint(str(folder))
    assert not trap.target.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "holds a list; expected tensors by name"),
        ({"a": torch.ones(2), "b": 3}, "'b' is a int; expected tensors by name"),
        ({3: torch.ones(2)}, "3 is a Tensor; expected tensors by name"),
        ({"a": torch.ones(3, 3).to_sparse()}, "'a' is a Tensor; expected tensors by name"),
        ({"a": torch._neg_view(torch.ones(2, 2))}, "tensor a is stored with a negative or conjugate bit"),
        ({"a": torch.ones(2, 2, dtype=torch.complex64).conj()}, "tensor a is stored with a negative or conjugate bit"),
        ({"a": torch.ones(1, 4).expand(3, 4)}, r"tensor a is a view with strides \[0, 1\]"),
        ({"a": torch.ones(6, 6)[::2, ::2]}, r"tensor a is a view with strides \[12, 2\]"),
    ],
)
def test_open_torch_refuses_what_is_not_tensors_by_name(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x\.bin: {message}"):
        open_torch(saved(tmp_path, value))


def test_open_torch_refuses_a_folder_of_the_files_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^/.*: expected a file, it is a folder$"):
        open_torch(tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_open_torch_refuses_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, {"a": torch.ones(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"^x\.bin: (truncated or damaged \([\d,]+ bytes|not a torch file)"):
        open_torch(path)


def rezipped(path: Path, name: str, change: Callable[[str, bytes], tuple[bytes, int]]) -> Path:
    """Write the archive again as ``name``, each record's bytes and compression changed."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(path.with_name(name), "w") as target:
        for info in archive.infolist():
            data, kind = change(info.filename, archive.read(info))
            target.writestr(info.filename, data, kind)
    return path.with_name(name)


def test_open_torch_refuses_a_storage_that_is_compressed_or_shorter_than_its_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    packed = rezipped(path, "packed.bin", lambda name, data: (data, zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED))
    short = rezipped(path, "short.bin", lambda name, data: (data[:-4] if name.endswith("data/0") else data, zipfile.ZIP_STORED))
    for file, held in ((packed, "0"), (short, "3,996")):
        with pytest.raises(CheckpointError, match=rf"^{file.name}: tensor a needs 4,000 bytes of its storage, which holds {held}$"):
            open_torch(file)


def test_open_torch_refuses_a_file_of_another_byte_order(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(4)})
    big = rezipped(path, "big.bin", lambda name, data: (b"big" if name.endswith("byteorder") else data, zipfile.ZIP_STORED))
    with pytest.raises(CheckpointError, match=r"^big\.bin: written on a big-endian machine; expected little-endian$"):
        open_torch(big)


def test_open_torch_survives_any_three_bytes_changed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(30.0).reshape(5, 6), "b": torch.ones(4).half()})
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        for place in torch.randint(len(whole), (3,), generator=generator).tolist():
            changed[place] = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(changed)
        try:
            for tensor in open_torch(path).tensors.values():
                if tensor.dtype in ("F16", "F32"):
                    tensor.read_rows(0, min(2, tensor.shape[0]))
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_open_checkpoint_reads_a_bin_folder_as_stored(write_bin: Writer, weights: dict[str, Tensor], shards: int, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    checkpoint = open_checkpoint(str(write_bin(tensors=stored | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, shards=shards)))
    assert (checkpoint.format, checkpoint.dropped) == ("bin", ["model.layers.0.self_attn.rotary_emb.inv_freq"])
    for name, tensor in stored.items():
        assert checkpoint.read(name).dtype == dtype
        assert torch.equal(checkpoint.read(name), tensor), name


def test_open_checkpoint_names_a_bin_tensor_of_an_unsupported_dtype(write_bin: Writer, weights: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=rf"^pytorch_model\.bin: tensor {UP} has dtype F64; supported: F16, BF16, F32$"):
        open_checkpoint(str(write_bin(tensors=weights | {UP: weights[UP].double()})))


def test_open_checkpoint_takes_safetensors_where_a_folder_has_its_twin_in_bin(write_folder: Writer, write_bin: Writer) -> None:
    folder = write_folder()
    (write_bin() / "pytorch_model.bin").rename(folder / "pytorch_model.bin")
    assert open_checkpoint(str(folder)).format == "safetensors"


def test_fingerprint_of_a_bin_folder_tells_other_weights_apart(write_bin: Writer, weights: dict[str, Tensor]) -> None:
    ours, again, theirs = (
        open_checkpoint(str(write_bin(tensors=tensors, name=name)))
        for name, tensors in zip("abc", (weights, weights, weights | {UP: weights[UP] * 2}), strict=True)
    )
    assert ours.fingerprint == again.fingerprint != theirs.fingerprint
