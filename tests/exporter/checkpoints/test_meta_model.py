from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.rope_scaling import RopeScaling
from exporter.checkpoints import CheckpointRequest, open_checkpoint, open_request

Writer = Callable[..., Path]
ASSUMED = "params.json does not say the context length: 4096 assumed, as for Llama 2"


def sentencepiece_model(size: int) -> bytes:
    model = io.BytesIO()
    words = ["a few words of a text", "and a few more words", "the quick brown fox jumps over the lazy dog"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=model, vocab_size=size, model_type="bpe", hard_vocab_limit=False
    )
    return model.getvalue()


def edit(folder: Path, part: int, change: Callable[[dict[str, Tensor]], None]) -> Path:
    path = folder / f"consolidated.{part:02d}.pth"
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts", [1, 2])
def test_open_meta_merges_parts_into_hugging_faces_tensors(
    write_meta: Writer, weights: dict[str, Tensor], config: LlamaConfig, parts: int, dtype: torch.dtype
) -> None:
    whole = {name: tensor.to(dtype) for name, tensor in weights.items()}
    checkpoint = open_checkpoint(str(write_meta(parts=parts, tensors=whole)))
    assert (checkpoint.format, checkpoint.name, checkpoint.dropped) == ("meta", "tiny-meta", ["rope.freqs"])
    assert checkpoint.config == replace(config, max_position_embeddings=4096)
    assert checkpoint.notes[0] == ASSUMED
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, tensor in whole.items():
        assert checkpoint.read(name).dtype == dtype
        assert torch.equal(checkpoint.read(name), tensor), name


def test_open_meta_takes_an_embedding_that_is_split_by_rows(write_meta: Writer, weights: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(str(write_meta(parts=2, embedding_axis=0)))
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_open_meta_takes_both_published_epsilons_as_they_are(write_meta: Writer, epsilon: float) -> None:
    assert open_checkpoint(str(write_meta(params={"norm_eps": epsilon}))).config.rms_norm_eps == epsilon


def test_open_meta_says_what_it_assumes_for_missing_fields(write_meta: Writer, weights: dict[str, Tensor], config: LlamaConfig) -> None:
    every_head = replace(config, num_key_value_heads=4)
    tensors = {name: weights[name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")] for name in weights}
    checkpoint = open_checkpoint(str(write_meta(tensors=tensors, params={"n_kv_heads": None, "norm_eps": None, "vocab_size": None})))
    assert checkpoint.config == replace(every_head, max_position_embeddings=4096, rms_norm_eps=1e-5)
    assert checkpoint.notes[:2] == [ASSUMED, "params.json has no norm_eps: 1e-05 assumed"]


def test_open_meta_takes_the_context_from_params_or_from_the_size(write_meta: Writer) -> None:
    said = open_checkpoint(str(write_meta(params={"max_seq_len": 512, "rope_theta": 5e5}, name="said")))
    assert (said.config.max_position_embeddings, said.config.rope_theta) == (512, 5e5)
    assert not any("context" in note for note in said.notes)


def test_open_request_gives_a_llama_1_folder_its_context(write_meta: Writer) -> None:
    from exporter.checkpoints.folders import open_folder

    checkpoint = open_folder(write_meta(), size="llama1-7b")
    assert checkpoint.config.max_position_embeddings == 2048
    assert "2048 assumed, as for Llama 1" in checkpoint.notes[0]


def test_open_meta_checks_the_ffn_rule(write_meta: Writer) -> None:
    # 2/3 of 4·32 is 85; × 0.7 is 59, and 64 rows are in the weights
    assert open_checkpoint(str(write_meta(params={"multiple_of": 16, "ffn_dim_multiplier": 0.7}))).config.intermediate_size == 64
    with pytest.raises(CheckpointError, match=r"^params\.json: multiple_of 16 and ffn_dim_multiplier None give 96 rows of .*, the weights have 64$"):
        open_checkpoint(str(write_meta(params={"multiple_of": 16}, name="other")))


@pytest.mark.parametrize(
    ("dim", "multiple", "factor", "ffn"), [(4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672), (6656, 256, None, 17920)]
)
def test_config_from_meta_knows_the_published_widths(dim: int, multiple: int, factor: float | None, ffn: int) -> None:
    from exporter.checkpoints.meta_config import config_from_meta

    params = {"dim": dim, "n_layers": 2, "n_heads": dim // 128, "multiple_of": multiple, "ffn_dim_multiplier": factor, "vocab_size": -1}
    assert config_from_meta(params, ffn=ffn, vocab_size=32000)[0].intermediate_size == ffn
    with pytest.raises(CheckpointError, match=f"give {ffn} rows"):
        config_from_meta(params, ffn=ffn - 256, vocab_size=32000)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"dim": None}, "dim must be a positive integer, got None"),
        ({"n_layers": "2"}, "n_layers must be a positive integer, got '2'"),
        ({"n_heads": 5}, "dim 32 is not a multiple of n_heads 5"),
        ({"vocab_size": 95}, r"vocab_size 95 disagrees with tok_embeddings\.weight, which has 96 rows"),
        ({"norm_eps": "small"}, "norm_eps must be a positive number, got 'small'"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope = 'yes' is not supported; supported: False, True, None"),
        ({"use_scaled_rope": True, "rope_scale_factor": 0}, "rope_scale_factor must be a positive number, got 0"),
        ({"quantization_args": {"group_size": 32}}, r"quantization_args = .* is not supported"),
    ],
)
def test_open_meta_refuses_params_by_name(write_meta: Writer, params: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^params\.json: {message}"):
        open_checkpoint(str(write_meta(params=params)))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_layers": 1}, r"^config has 1 layers, weights hold 2$"),
        ({"n_kv_heads": 4}, r"tensor model\.layers\.0\.self_attn\.k_proj\.weight: config expects shape \[32, 32\], the checkpoint has \[16, 32\]"),
    ],
)
def test_open_meta_compares_tensors_with_params(write_meta: Writer, params: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(write_meta(params=params)))


def test_open_meta_lists_params_that_no_table_knows(write_meta: Writer) -> None:
    assert open_checkpoint(str(write_meta(params={"surprise": 1}))).unknown_config_keys == ["surprise"]


def test_open_meta_refuses_a_folder_without_params(write_meta: Writer) -> None:
    folder = write_meta()
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"no params\.json$"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_open_meta_refuses_params_that_are_no_json_object(write_meta: Writer, text: str) -> None:
    folder = write_meta()
    (folder / "params.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"params\.json: (not JSON|expected a JSON object)"):
        open_checkpoint(str(folder))


def test_open_meta_names_a_part_that_is_missing_in_between(write_meta: Writer) -> None:
    folder = write_meta(parts=4)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is missing; there are: consolidated\.00\.pth, .*02.*, .*03\.pth$"):
        open_checkpoint(str(folder))


def test_open_meta_counts_parts_that_are_missing_at_the_end(write_meta: Writer) -> None:
    folder = write_meta(parts=4)
    for number in (2, 3):
        (folder / f"consolidated.{number:02d}.pth").unlink()
    with pytest.raises(CheckpointError, match=r"2 of 4 model-parallel parts; consolidated\.00\.pth holds 1/4 of every layer$") as caught:
        open_checkpoint(str(folder))
    assert "consolidated.03.pth" in (caught.value.hint or "")


def test_open_meta_refuses_parts_that_disagree(write_meta: Writer) -> None:
    name = "layers.1.feed_forward.w2.weight"
    shape = edit(write_meta(parts=2, name="shape"), 1, lambda tensors: tensors.update({name: tensors[name][:, :8].clone()}))
    with pytest.raises(CheckpointError, match=rf"^tensor {name}: consolidated\.00\.pth has F32 \[32, 32\], consolidated\.01\.pth has F32 \[32, 8\]$"):
        open_checkpoint(str(shape))
    lacking = edit(write_meta(parts=2, name="lacking"), 1, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"^consolidated\.01\.pth: tensor {name} is missing, another part has it$"):
        open_checkpoint(str(lacking))
    norm = "layers.0.ffn_norm.weight"
    values = edit(write_meta(parts=2, name="values"), 1, lambda tensors: tensors.update({norm: tensors[norm] + 1}))
    with pytest.raises(CheckpointError, match=rf"^tensor {norm} differs between consolidated\.00\.pth and consolidated\.01\.pth"):
        open_checkpoint(str(values))


def test_open_meta_names_missing_extra_and_unsupported_tensors(write_meta: Writer) -> None:
    name = "layers.1.attention.wo.weight"
    missing = edit(write_meta(name="missing"), 0, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"^missing tensor model\.layers\.1\.self_attn\.o_proj\.weight$"):
        open_checkpoint(str(missing))
    extra = edit(write_meta(name="extra"), 0, lambda tensors: tensors.update({"layers.0.attention.wq.bias": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"^extra tensor layers\.0\.attention\.wq\.bias: not a weight"):
        open_checkpoint(str(extra))
    double = edit(write_meta(name="double"), 0, lambda tensors: tensors.update({name: tensors[name].double()}))
    with pytest.raises(CheckpointError, match=r"^consolidated\.00\.pth: tensor model\.layers\.1\.self_attn\.o_proj\.weight has dtype F64; supported"):
        open_checkpoint(str(double))


def test_open_meta_refuses_a_truncated_part(write_meta: Writer) -> None:
    path = write_meta(parts=2) / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"^consolidated\.01\.pth: truncated or damaged"):
        open_checkpoint(str(path.parent))


def test_open_meta_refuses_a_part_that_links_out_of_the_folder(write_meta: Writer, tmp_path: Path) -> None:
    path = write_meta() / "consolidated.00.pth"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is a link to .*elsewhere, outside the folder"):
        open_checkpoint(str(path.parent))


def test_open_checkpoint_reads_the_meta_twin_only_where_it_is_alone(write_folder: Writer, write_meta: Writer) -> None:
    folder, meta = write_folder(), write_meta(name="Tiny Llama/original")
    assert open_checkpoint(str(folder)).format == "safetensors"
    assert (open_checkpoint(str(meta)).format, open_checkpoint(str(meta)).name) == ("meta", "tiny-llama")


@pytest.mark.parametrize("above", [False, True])
def test_write_sidecars_brings_the_tokenizer_along(write_meta: Writer, tmp_path: Path, above: bool) -> None:
    folder = write_meta(name="family/7B")
    stored = sentencepiece_model(96)
    ((folder.parent if above else folder) / "tokenizer.model").write_bytes(stored)
    target = tmp_path / "out"
    target.mkdir()

    @contextmanager
    def write(relative: str) -> Iterator[Path]:
        yield target / relative

    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.write_sidecars(write) == ["config.json", "tokenizer.model", "tokenizer_config.json"]
    assert (target / "tokenizer.model").read_bytes() == stored
    assert json.loads((target / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert LlamaConfig.from_hf(json.loads((target / "config.json").read_text())) == checkpoint.config
    assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_id) == (1, 2)
    assert not any("tokenizer" in note for note in checkpoint.notes)


def test_a_tokenizer_of_another_kind_than_llama_2s_is_not_taken_for_it(write_meta: Writer, tmp_path: Path) -> None:
    folder = write_meta()
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")  # tiktoken, as Llama 3's
    target = tmp_path / "out"
    target.mkdir()

    @contextmanager
    def write(relative: str) -> Iterator[Path]:
        yield target / relative

    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_id) == (None, None)
    assert checkpoint.write_sidecars(write) == ["config.json", "tokenizer.model"]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.model"]
    assert any(note.startswith("tokenizer.model is not SentencePiece") for note in checkpoint.notes)


@pytest.mark.parametrize("copied", [1, 3])
def test_open_meta_refuses_a_part_that_is_a_copy_of_another(write_meta: Writer, copied: int) -> None:
    folder = write_meta(parts=4)
    (folder / f"consolidated.{copied:02d}.pth").write_bytes((folder / "consolidated.00.pth").read_bytes())
    with pytest.raises(CheckpointError, match=rf"^consolidated\.{copied:02d}\.pth is a copy of consolidated\.00\.pth: "):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_open_meta_reads_use_scaled_rope_as_llama_3s(write_meta: Writer, factor: float) -> None:
    checkpoint = open_checkpoint(str(write_meta(params={"use_scaled_rope": True, "rope_scale_factor": factor})))
    assert checkpoint.config.rope_scaling == RopeScaling(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert checkpoint.unknown_config_keys == []


def test_open_meta_does_not_guess_by_how_much_rope_is_scaled(write_meta: Writer) -> None:
    with pytest.raises(CheckpointError, match="use_scaled_rope without rope_scale_factor") as caught:
        open_checkpoint(str(write_meta(params={"use_scaled_rope": True})))
    assert "8 for Llama 3.1, 32 for Llama 3.2" in (caught.value.hint or "")


@pytest.mark.parametrize(("name", "message"), [("params.json", r"no params\.json$"), ("consolidated.00.pth", "expected a file, it is a folder$")])
def test_open_meta_names_a_folder_in_a_files_place(write_meta: Writer, name: str, message: str) -> None:
    folder = write_meta()
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


def test_open_meta_refuses_two_names_of_one_weight(write_meta: Writer) -> None:
    twin = edit(write_meta(), 0, lambda tensors: tensors.update({"layers.00.attention.wv.weight": torch.zeros(16, 32)}))
    with pytest.raises(CheckpointError, match=r"^tensors layers\.0\.attention\.wv\.weight and layers\.00\.attention\.wv\.weight are two names"):
        open_checkpoint(str(twin))


def test_fingerprint_of_a_meta_folder_tells_other_weights_apart(write_meta: Writer, weights: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    ours, again, theirs = (
        open_checkpoint(str(write_meta(parts=2, tensors=tensors, name=folder)))
        for folder, tensors in zip("abc", (weights, weights, weights | {name: weights[name] * 2}), strict=True)
    )
    assert ours.fingerprint == again.fingerprint != theirs.fingerprint
    assert open_request(CheckpointRequest(ours.source)).fingerprint == ours.fingerprint
