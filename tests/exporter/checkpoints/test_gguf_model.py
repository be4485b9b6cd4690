from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.rope_scaling import RopeScaling
from exporter.checkpoints import gguf_model, open_checkpoint
from exporter.checkpoints.gguf_header import read_gguf_header

Writer = Callable[..., Path]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_open_gguf_reads_floats_exactly(write_gguf: Writer, weights: dict[str, Tensor], config: LlamaConfig, kind: str) -> None:
    path = write_gguf(kind=kind)
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.source, checkpoint.name, checkpoint.format, checkpoint.config) == (str(path), "tiny", "gguf", config)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert checkpoint.dtypes[Q] == kind
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    for name, tensor in weights.items():
        ours = checkpoint.read(name)
        assert ours.dtype == (dtype if tensor.ndim == 2 else torch.float32)
        assert torch.equal(ours, tensor.to(ours.dtype)), name


@pytest.mark.parametrize(("kind", "step"), [("Q8_0", 1 / 127), ("Q5_1", 1 / 31), ("Q4_1", 1 / 15), ("Q4_0", 1 / 8)])
def test_open_gguf_dequantises_blocks_within_their_step(write_gguf: Writer, weights: dict[str, Tensor], kind: str, step: float) -> None:
    checkpoint = open_checkpoint(str(write_gguf(kind=kind)))
    for name, tensor in weights.items():
        ours = checkpoint.read(name)
        assert ours.dtype == torch.float32
        assert (ours - tensor).abs().max() <= step * 2, name  # values in [-1, 1]
    assert not torch.equal(checkpoint.read(Q), weights[Q])


def test_load_tensor_gives_the_same_numbers_in_any_number_of_pieces(write_gguf: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(write_gguf(kind="Q8_0")))
    whole = {name: checkpoint.read(name) for name in checkpoint.shapes}
    monkeypatch.setattr(gguf_model, "CHUNK_ELEMENTS", 5 * 32)  # five rows of 32: no weight here has a multiple of five rows
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in whole.items())


def test_open_gguf_ties_the_embedding_when_there_is_no_output(write_gguf: Writer, weights: dict[str, Tensor], config: LlamaConfig) -> None:
    tied = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    checkpoint = open_checkpoint(str(write_gguf(tensors=tied)))
    assert checkpoint.config == replace(config, tie_word_embeddings=True)
    assert "lm_head.weight" not in checkpoint.shapes


def test_open_gguf_reads_rope_factors_into_the_config(write_gguf: Writer, weights: dict[str, Tensor], config: LlamaConfig) -> None:
    ones = open_checkpoint(str(write_gguf(tensors=weights | {"rope_freqs.weight": torch.ones(4)}, name="ones.gguf")))
    assert (ones.config, ones.dropped) == (config, ["rope_freqs.weight"])
    scaled = open_checkpoint(str(write_gguf(tensors=weights | {"rope_freqs.weight": torch.tensor([1.0, 1.0, 4.0, 8.0])}, name="scaled.gguf")))
    assert scaled.config.rope_scaling == RopeScaling(rope_type="longrope", attention_factor=1.0, frequency_factors=(1.0, 1.0, 4.0, 8.0))
    assert "rope_freqs.weight holds factors that no published model has" in scaled.notes[0]
    assert LlamaConfig.from_hf(json.loads(scaled.sidecars["config.json"])) == scaled.config


def test_open_gguf_reads_biases_in_huggingface_order(write_gguf: Writer, biased_weights: dict[str, Tensor], config: LlamaConfig) -> None:
    checkpoint = open_checkpoint(str(write_gguf(tensors=biased_weights)))
    assert checkpoint.config == replace(config, attention_bias=True, mlp_bias=True)
    assert checkpoint.shapes.keys() == biased_weights.keys()
    for name, tensor in biased_weights.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    bias = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(checkpoint.read_rows(bias, 5, 19), biased_weights[bias][5:19])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": 3}, r"^config has 3 layers, weights hold 2$"),
        ({"block_count": 1}, r"^config has 1 layers, weights hold 2$"),
        ({"vocab_size": 95}, r"tensor model\.embed_tokens\.weight: config expects shape \[95, 32\], the checkpoint has \[96, 32\]"),
        (
            {"attention.head_count_kv": 4},
            r"tensor model\.layers\.0\.self_attn\.k_proj\.weight: config expects shape \[32, 32\], the checkpoint has \[16, 32\]",
        ),
    ],
)
def test_open_gguf_compares_tensors_with_metadata(write_gguf: Writer, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(write_gguf(metadata=metadata)))


def test_open_gguf_names_missing_and_extra_tensors(write_gguf: Writer, weights: dict[str, Tensor]) -> None:
    missing = {name: tensor for name, tensor in weights.items() if name != Q}
    with pytest.raises(CheckpointError, match=rf"^missing tensor {Q}$"):
        open_checkpoint(str(write_gguf(tensors=missing, name="missing.gguf")))
    with pytest.raises(CheckpointError, match=r"^extra tensor blk\.0\.attn_qkv\.weight"):
        open_checkpoint(str(write_gguf(tensors=weights | {"blk.0.attn_qkv.weight": torch.ones(32)}, name="extra.gguf")))
    with pytest.raises(CheckpointError, match=r"^missing 7 tensors: model\.layers\.0\.self_attn\.k_proj\.bias, ") as caught:
        open_checkpoint(str(write_gguf(tensors=weights | {"blk.0.attn_q.bias": torch.ones(32)}, name="partly.gguf")))
    assert "on all four linears of attention or on none" in str(caught.value.hint)


def test_open_gguf_refuses_two_names_of_one_weight(write_gguf: Writer, weights: dict[str, Tensor]) -> None:
    twin = {"blk.00.attn_v.weight": torch.zeros(16, 32)}
    with pytest.raises(CheckpointError, match=r"^tensors blk\.0\.attn_v\.weight and blk\.00\.attn_v\.weight are two names of one weight$"):
        open_checkpoint(str(write_gguf(tensors=weights | twin)))


@pytest.mark.parametrize(
    ("metadata", "tokenizer", "message"),
    [
        ({"rope.scaling.type": ["linear"]}, {}, r"llama\.rope\.scaling\.type must be a str, got \['linear'\]"),
        ({}, {"tokenizer.ggml.tokens": 3}, r"tokenizer\.ggml\.tokens must be a list of str, got 3"),
        ({}, {"tokenizer.ggml.tokens": [1, 2]}, r"tokenizer\.ggml\.tokens must be a list of str, got \[1, 2\]"),
        ({}, {"tokenizer.ggml.scores": ["a"]}, r"tokenizer\.ggml\.scores must be a list of int or float, got \['a'\]"),
        ({}, {"tokenizer.ggml.model": ["gpt2"]}, r"tokenizer\.ggml\.model must be a str, got \['gpt2'\]"),
        ({}, {"split.count": "two"}, r"split\.count must be a int, got 'two'"),
        ({}, {"tokenizer.ggml.bos_token_id": "x"}, r"tokenizer\.ggml\.bos_token_id must be a token id, an integer from 0 on, got 'x'"),
        ({}, {"tokenizer.ggml.padding_token_id": [1]}, r"tokenizer\.ggml\.padding_token_id must be a token id, an integer from 0 on, got \[1\]"),
    ],
)
def test_open_gguf_refuses_a_value_of_another_type(write_gguf: Writer, metadata: dict[str, Any], tokenizer: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^GGUF: {message}"):
        open_checkpoint(str(write_gguf(metadata=metadata, tokenizer=tokenizer)))


def test_open_gguf_names_a_type_that_is_not_dequantised(write_gguf: Writer) -> None:
    path = write_gguf()
    header = read_gguf_header(path)
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8  # dimensions uint32 and uint64, then the type
    raw[entry : entry + 4] = int(gguf.GGMLQuantizationType.I32).to_bytes(4, "little")
    path.write_bytes(raw)
    assert header.tensors["blk.0.ffn_up.weight"].type == gguf.GGMLQuantizationType.F32
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight is stored as I32"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_open_gguf_refuses_a_truncated_file(write_gguf: Writer, share: float) -> None:
    path = write_gguf()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: the file is truncated: it needs at least [\d,]+ bytes and has [\d,]+"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\3\4" + bytes(100), b"GGUF" + bytes([9, 0, 0, 0]) + bytes(100)])
def test_open_gguf_refuses_what_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^x\.gguf: "):
        open_checkpoint(str(tmp_path / "x.gguf"))


def test_open_gguf_refuses_one_piece_of_a_split_file(write_gguf: Writer) -> None:
    with pytest.raises(CheckpointError, match="one of 3 pieces"):
        open_checkpoint(str(write_gguf(tokenizer={"split.count": 3})))


def test_read_gguf_header_agrees_with_the_package(write_gguf: Writer) -> None:
    path = write_gguf(
        kind="Q8_0", tokenizer={"a.texts": ["x", "", "日本"], "a.numbers": [1, -2, 3], "a.floats": [0.5, 1.5], "a.flags": [True, False]}
    )
    header, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    assert header.metadata == {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert header.header_bytes == theirs.data_offset
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.offset, ours.length, ours.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert np.prod(ours.shape) == tensor.n_elements


def test_fingerprint_tells_other_weights_apart(write_gguf: Writer, weights: dict[str, Tensor]) -> None:
    ours, again = (open_checkpoint(str(write_gguf(name=name))) for name in ("a.gguf", "b.gguf"))
    theirs = open_checkpoint(str(write_gguf(tensors=weights | {Q: weights[Q] * 2}, name="c.gguf")))
    assert ours.fingerprint == again.fingerprint != theirs.fingerprint


def test_write_sidecars_writes_the_config_and_notes_the_missing_tokenizer(write_gguf: Writer, tmp_path: Path, config: LlamaConfig) -> None:
    @contextmanager
    def write(relative: str) -> Iterator[Path]:
        yield tmp_path / relative

    checkpoint = open_checkpoint(str(write_gguf()))
    assert checkpoint.write_sidecars(write) == ["config.json"]
    assert "no tokenizer" in checkpoint.notes[0]
    assert LlamaConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == config
