from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from artifact.config import LlamaConfig
from artifact.errors import UsageError, ValidationError
from validation.text import DEFAULT_TEXT, DEFAULT_TEXTS, encode_prompts, load_texts, load_tokens

WORDS = ["<unk>", "<s>", "one", "two", "three"]


def write_tokenizer(folder: Path, *, bos: bool = False, words: list[str] = WORDS) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_bos_id(config: LlamaConfig) -> LlamaConfig:
    return LlamaConfig(**{**config.__dict__, "bos_token_id": 1})


def test_load_tokens_uses_the_artifacts_tokenizer(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text("one two three two four")
    tokens = load_tokens(write_tokenizer(tmp_path), config, tmp_path / "t.txt", 4)
    assert tokens.ids.tolist() == [2, 3, 4, 3]
    assert (tokens.kind, tokens.name, tokens.bos) == ("text", "t.txt", None)
    assert tokens.as_report(3)["scored_tokens"] == 3


@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_used_where_the_tokenizer_puts_it(bos: bool, tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text("one two")
    tokens = load_tokens(write_tokenizer(tmp_path, bos=bos), with_bos_id(config), tmp_path / "t.txt", 2)
    assert tokens.bos == (1 if bos else None)
    assert tokens.ids.tolist() == [2, 3]


def test_load_tokens_reads_on_where_the_first_part_holds_too_few(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text(" " * 1000 + "one two")
    assert load_tokens(write_tokenizer(tmp_path), config, tmp_path / "t.txt", 2).ids.tolist() == [2, 3]


def test_without_a_tokenizer_the_ids_are_random_and_say_so(tmp_path: Path, config: LlamaConfig) -> None:
    tokens = load_tokens(tmp_path, config, None, 50)
    assert tokens.kind == "random ids"
    assert len(set(tokens.ids.tolist())) > 10
    assert tokens.ids.max() < config.vocab_size
    assert np.array_equal(tokens.ids, load_tokens(tmp_path, config, None, 50).ids)


def test_the_default_text_is_long_enough_for_the_demo(tmp_path: Path, config: LlamaConfig) -> None:
    tokens = load_tokens(write_tokenizer(tmp_path), config, None, 2049)
    assert tokens.name == DEFAULT_TEXT.name
    assert len(tokens.ids) == 2049


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.txt is empty"),
        (b" \n ", "t.txt is empty"),
        (b"one two", "t.txt has 2 tokens, 4 are needed"),
        (b"one \xff two", r"t.txt is not UTF-8 \(byte 4\)"),
    ],
)
def test_load_tokens_refuses_a_text_that_cannot_be_scored(content: bytes, message: str, tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValidationError, match=message) as caught:
        load_tokens(write_tokenizer(tmp_path), config, tmp_path / "t.txt", 4)
    assert caught.value.hint


def test_load_tokens_refuses_a_missing_text_and_a_text_without_tokenizer(tmp_path: Path, config: LlamaConfig) -> None:
    with pytest.raises(ValidationError, match=r"has no tokenizer\.json"):
        load_tokens(tmp_path, config, tmp_path / "t.txt", 4)
    with pytest.raises(ValidationError, match="can't be read: No such file"):
        load_tokens(write_tokenizer(tmp_path), config, tmp_path / "t.txt", 4)


def test_load_tokens_refuses_a_broken_or_foreign_tokenizer(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text("last last")
    write_tokenizer(tmp_path, words=[*WORDS, *map(str, range(config.vocab_size)), "last"])
    with pytest.raises(ValidationError, match="it belongs to another model"):
        load_tokens(tmp_path, config, tmp_path / "t.txt", 2)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValidationError, match="can't be read as a tokenizer"):
        load_tokens(tmp_path, config, tmp_path / "t.txt", 2)


def test_the_committed_texts_are_long_enough_for_published_figures(tmp_path: Path, config: LlamaConfig) -> None:
    texts = load_texts(write_tokenizer(tmp_path), config, None, [2000, 2000])
    assert [text.name for text in texts] == ["default.txt", "code.txt"]
    assert all(path.read_text(encoding="ascii").strip() for path in DEFAULT_TEXTS)
    assert min(path.stat().st_size for path in DEFAULT_TEXTS) > 4 * 8192  # 16,384 tokens of both, at four characters a token


def test_texts_of_one_name_are_told_apart(tmp_path: Path, config: LlamaConfig) -> None:
    paths = [tmp_path / folder / "t.txt" for folder in ("a", "b")]
    for path, words in zip(paths, ("one two", "three two"), strict=True):
        path.parent.mkdir()
        path.write_text(words)
    texts = load_texts(write_tokenizer(tmp_path), config, paths, [2, 1])
    assert [text.name for text in texts] == [str(path) for path in paths]
    assert [text.ids.tolist() for text in texts] == [[2, 3], [4]]


def test_the_same_text_under_two_paths_is_refused(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text("one two")
    with pytest.raises(UsageError, match=r"t\.txt is given twice") as caught:
        load_texts(write_tokenizer(tmp_path), config, [tmp_path / "t.txt", tmp_path / "." / "x" / ".." / "t.txt"], [1, 1])
    assert caught.value.hint == "--text FILE once for each text"


def test_random_ids_are_one_text(tmp_path: Path, config: LlamaConfig) -> None:
    (text,) = load_texts(tmp_path, config, None, [30, 50])
    assert (text.kind, len(text.ids)) == ("random ids", 50)


@pytest.mark.parametrize("bos", [True, False])
def test_prompts_begin_as_the_model_expects(bos: bool, tmp_path: Path, config: LlamaConfig) -> None:
    ((prompt, ids),) = encode_prompts(write_tokenizer(tmp_path, bos=bos), with_bos_id(config), ["one three"])
    assert prompt == "one three"
    assert ids.tolist() == ([1, 2, 4] if bos else [2, 4])
