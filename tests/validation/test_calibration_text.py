"""The sequences that activations are measured on, and every text that none can be made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from artifact.calibration import TOKENS
from artifact.config import LlamaConfig
from artifact.errors import QuantizationError
from validation import calibration_text
from validation.calibration_text import DEFAULT, load_sequences, read_documents
from validation.text import DEFAULT_TEXTS

WORDS = ["<unk>", "<s>", *(f"w{number}" for number in range(40))]
"""Token id = number + 2."""


def write_tokenizer(folder: Path, *, bos: bool = False, words: list[str] = WORDS) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_bos_id(config: LlamaConfig) -> LlamaConfig:
    return LlamaConfig(**{**config.__dict__, "bos_token_id": 1})


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_cuts_a_document_into_sequences_that_begin_with_bos(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text(words(*range(6)))
    text = load_sequences(write_tokenizer(tmp_path, bos=True), with_bos_id(config), tmp_path / "t.txt", tokens=8, length=4)
    assert [ids.tolist() for ids in text.sequences] == [[1, 2, 3, 4], [1, 5, 6, 7]]
    assert (text.bos, text.tokens, text.name, text.documents) == (1, 8, "t.txt", 1)


def test_every_line_of_a_jsonl_is_a_document_and_no_sequence_spans_two(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": words(*part)}) for part in ((0, 1, 2), (3, 4), (5,))) + "\n\n")
    text = load_sequences(write_tokenizer(tmp_path), config, tmp_path / "t.jsonl", tokens=5, length=4)
    assert [ids.tolist() for ids in text.sequences] == [[2, 3, 4], [5, 6]]  # one token alone is no sequence
    assert (text.bos, text.documents) == (None, 3)


def test_pieces_come_from_all_over_the_text_and_the_last_one_is_cut(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text(words(*range(40)))
    text = load_sequences(write_tokenizer(tmp_path), config, tmp_path / "t.txt", tokens=15, length=4)
    assert text.tokens == 15
    starts = [int(ids[0]) - 2 for ids in text.sequences]
    assert starts == sorted(starts)
    assert starts[0] < 10
    assert starts[-1] > 24
    assert max(np.diff(starts)) <= 20
    chosen, rest = ({token for ids in part for token in ids.tolist()} for part in (text.sequences, text.rest))
    assert len(chosen) == 15
    assert not chosen & rest
    assert len(rest) == 24  # ten pieces of four, and one of four is cut


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_spread_is_every_index_once(count: int) -> None:
    assert sorted(calibration_text._spread(count)) == list(range(count))


def test_the_committed_text_is_enough_for_the_defaults_and_is_not_what_is_scored(tmp_path: Path, config: LlamaConfig) -> None:
    text = load_sequences(write_tokenizer(tmp_path), config, tokens=TOKENS)
    assert (text.tokens, text.name) == (TOKENS, DEFAULT.name)
    assert max(map(len, text.sequences)) == config.max_position_embeddings  # shorter than 256
    scored = "\n".join(path.read_text(encoding="utf-8") for path in DEFAULT_TEXTS)
    lines = [line.strip() for document in read_documents(DEFAULT) for line in document.splitlines() if len(line) > 60]
    assert len(lines) > 500
    assert [line for line in lines if line in scored] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", r"t\.txt is empty"),
        ("t.txt", b" \n ", r"t\.txt is empty"),
        ("t.txt", b"w1 w2", r"t\.txt has 2 tokens, 64 are needed for calibration"),
        ("t.txt", b"w1 \xff w2", r"t\.txt is not UTF-8 \(byte 3\)"),
        ("t.txt", b"w1 \xe2\x82", r"t\.txt is not UTF-8 \(byte 3\)"),
        ("t.jsonl", b'{"text": "w1"}\n{"text": ', r"t\.jsonl, line 2 is not JSON"),
        ("t.jsonl", b'{"text": "w1"}\n\n{"words": "w1"}', r't\.jsonl, line 3 has no "text" that is a string'),
        ("t.jsonl", b'["w1"]', r't\.jsonl, line 1 has no "text" that is a string'),
        ("t.jsonl", b'{"text": 3}', r't\.jsonl, line 1 has no "text" that is a string'),
        ("t.jsonl", b'{"text": "a \\ud83d b"}', r"t\.jsonl, line 1 escapes half a character"),
        ("t.jsonl", b'{"text": " "}', r"t\.jsonl is empty"),
        ("t.txt", None, r"t\.txt can't be read: No such file"),
    ],
)
def test_refuses_a_text_that_nothing_can_be_measured_on(name: str, content: bytes | None, message: str, tmp_path: Path, config: LlamaConfig) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(QuantizationError, match=message) as caught:
        load_sequences(write_tokenizer(tmp_path), config, tmp_path / name, tokens=64)
    assert caught.value.hint


def test_refuses_tokens_outside_the_vocabulary(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "t.txt").write_text("last " * 64)
    write_tokenizer(tmp_path, words=[*WORDS, *map(str, range(config.vocab_size)), "last"])
    with pytest.raises(QuantizationError, match=r"gives token 106, the model's vocabulary has 64: it belongs to another model"):
        load_sequences(tmp_path, config, tmp_path / "t.txt", tokens=64)


def test_refuses_sequences_longer_than_the_model_reads(tmp_path: Path, config: LlamaConfig) -> None:
    with pytest.raises(QuantizationError, match="--calibration-length 97: the model reads at most 96 tokens"):
        load_sequences(write_tokenizer(tmp_path), config, tokens=TOKENS, length=97)


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_of_a_long_text_the_beginning_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "READ_BYTES", 20)
    (tmp_path / name).write_text("é" * 30 if name == "t.txt" else '{"text": "a"}\n' * 3)
    (document,) = read_documents(tmp_path / name)
    assert document == ("é" * 10 if name == "t.txt" else "a")
    monkeypatch.setattr(calibration_text, "READ_BYTES", 21)  # in the middle of a character
    (document,) = read_documents(tmp_path / name)
    assert document == ("é" * 10 if name == "t.txt" else "a")
