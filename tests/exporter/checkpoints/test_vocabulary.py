from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models

from artifact.config import LlamaConfig
from artifact.rope_scaling import RopeScaling
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.vocabulary import model_notes, tokenizer_size


def save_tokenizer(folder: Path, tokens: int, added: int = 0) -> None:
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(tokens)}, unk_token="0"))
    tokenizer.add_tokens([AddedToken(f"<{number}>") for number in range(added)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("tokens", "added", "note"),
    [
        (96, 0, None),
        (90, 6, None),
        (90, 2, "the vocabulary is padded: the embedding has 96 rows, the tokenizer 92 tokens"),
        (96, 1, "the tokenizer has 97 tokens, the embedding 96 rows: ids from 96 on can't be used"),
    ],
)
def test_a_folder_says_how_tokens_and_rows_differ(write_folder: Callable[..., Path], tokens: int, added: int, note: str | None) -> None:
    folder = write_folder()
    save_tokenizer(folder, tokens, added)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.notes == ([] if note is None else [note])
    assert checkpoint.config.vocab_size == 96


def test_a_gguf_file_says_how_tokens_and_rows_differ(write_gguf: Callable[..., Path]) -> None:
    tokens: dict[str, Any] = {"tokenizer.ggml.tokens": [f"t{number}" for number in range(90)]}
    assert "the embedding has 96 rows, the tokenizer 90 tokens" in open_checkpoint(str(write_gguf(tokenizer=tokens))).notes[0]


def test_tokenizer_size_reads_sentencepiece_and_what_was_added(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words of a text", "and a few more words"] * 20), model_writer=model, vocab_size=30, model_type="bpe"
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    assert tokenizer_size(tmp_path) == 30
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 30, "[MASK]": 33}))
    assert tokenizer_size(tmp_path) == 34
    save_tokenizer(tmp_path, 7)
    assert tokenizer_size(tmp_path) == 7


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_tokenizer_size_is_not_known_of_a_broken_file(tmp_path: Path, name: str) -> None:
    assert tokenizer_size(tmp_path) is None
    (tmp_path / name).write_text("broken")
    assert tokenizer_size(tmp_path) is None


def test_dynamic_scaling_is_said_to_end_where_the_graphs_end(config: LlamaConfig) -> None:
    assert model_notes(config, None) == []
    (note,) = model_notes(replace(config, rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0)), 96)
    assert "up to 128, where the graphs end, it is none" in note
