from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from exporter.checkpoints.gguf_tokenizer import tokenizer_files
from exporter.checkpoints.pre_tokenizers import SPLITS, pre_tokenizer

TEXT = [
    "The capital of France is Paris. It's 1234 km from here, they'll say.",
    "She sells sea shells by the sea shore; the shells she sells are sea shells.",
    "for i in range(100):\n    print(i ** 2)\n\n\ttabs  and   spaces ",
    "élan, naïve, 日本語, emoji 🎉, ½ — dashes… DON'T WE'RE",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """Metadata of a byte-level BPE, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE as Llama 2's: byte fallback, a space in front, spaces kept."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT[:3] * 4),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def sentence_pieces(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(processor.get_piece_size())
    kinds = {i: 2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1 for i in ids}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kinds[i] for i in ids],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }


def opened(metadata: dict[str, Any]) -> Tokenizer:
    files, notes = tokenizer_files(metadata)
    assert notes == []
    return Tokenizer.from_str(files["tokenizer.json"])


@pytest.mark.parametrize("name", ["smollm", *SPLITS])
def test_byte_level_tokenizer_gives_every_text_back(byte_level: dict[str, Any], name: str) -> None:
    tokenizer = opened(byte_level | {"tokenizer.ggml.pre": name})
    for text in TEXT:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_byte_level_tokenizer_matches_the_one_it_was_taken_from(byte_level: dict[str, Any]) -> None:
    vocab = {token: index for index, token in enumerate(byte_level["tokenizer.ggml.tokens"])}
    theirs = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in byte_level["tokenizer.ggml.merges"]]))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = opened(byte_level | {"tokenizer.ggml.pre": "gpt-2"})
    for text in TEXT:
        assert ours.encode(text).ids == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("smollm", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "!!", "ĊĊ", "Ġok"]),
        ("gpt-2", ["I", "'ll", "Ġpay", "Ġ12345", "!!", "ĊĊ", "Ġok"]),
        ("llama-bpe", ["I", "'ll", "Ġpay", "Ġ", "123", "45", "!!ĊĊ", "Ġok"]),
        ("default", ["I", "'", "ll", "Ġpay", "Ġ", "123", "45", "!!", "ĊĊ", "Ġok"]),
    ],
)
def test_pre_tokenizer_splits_as_the_model_was_trained(name: str, pieces: list[str]) -> None:
    splitter = pre_tokenizer(name)
    assert splitter is not None
    assert [piece for piece, _ in splitter.pre_tokenize_str("I'll pay 12345!!\n\n ok")] == pieces


def test_llama3_words_in_the_vocabulary_stay_whole(byte_level: dict[str, Any]) -> None:
    # "xyz" has no merges: only ignore_merges finds it
    tokens = [*byte_level["tokenizer.ggml.tokens"], "xyz"]
    added = byte_level | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [*byte_level["tokenizer.ggml.token_type"], 1]}
    assert len(opened(added | {"tokenizer.ggml.pre": "llama-bpe"}).encode("xyz").ids) == 1
    assert len(opened(added | {"tokenizer.ggml.pre": "gpt-2"}).encode("xyz").ids) == 3


def test_special_tokens_are_one_id_each(byte_level: dict[str, Any]) -> None:
    assert opened(byte_level).encode("<|im_start|>7<|im_end|><|endoftext|>").ids[::2] == [1, 2]
    assert opened(byte_level).encode("<|endoftext|>").ids == [0]


def test_user_defined_tokens_are_one_id_and_stay_in_the_text(byte_level: dict[str, Any]) -> None:
    tokens = [*byte_level["tokenizer.ggml.tokens"], "<tool>"]
    tokenizer = opened(byte_level | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [*byte_level["tokenizer.ggml.token_type"], 4]})
    ids = tokenizer.encode("<|im_start|><tool>").ids
    assert ids == [1, len(tokens) - 1]
    assert tokenizer.decode(ids) == "<tool>"


@pytest.mark.parametrize(("flags", "ids"), [({}, []), ({"tokenizer.ggml.add_bos_token": True}, [1]), ({"tokenizer.ggml.add_eos_token": True}, [2])])
def test_bos_and_eos_are_added_as_the_file_says(byte_level: dict[str, Any], flags: dict[str, bool], ids: list[int]) -> None:
    assert opened(byte_level | flags).encode("").ids == ids


@pytest.mark.parametrize("text", [*TEXT, "", " ", "  two  spaces  ", "a\tb\n", "12.5%"])
def test_sentencepiece_tokenizer_matches_sentencepiece(
    processor: sentencepiece.SentencePieceProcessor, sentence_pieces: dict[str, Any], text: str
) -> None:
    tokenizer = opened(sentence_pieces)
    ids = tokenizer.encode(text).ids
    assert ids == [processor.bos_id(), *processor.encode(text)]
    assert tokenizer.decode(ids) == text


def test_sentencepiece_tokenizer_never_merges_text_into_a_byte_token() -> None:
    tokens = ["<unk>", "<0x41>", *"<0x41>", "<0x4", "1>", "<0", "x4"]  # six different characters and four pieces of them
    kinds = [2, 6, *[1] * (len(tokens) - 2)]
    scores = [0.0, 0.0, *[-10.0] * 6, -1.0, -2.0, -3.0, -4.0]
    keys = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "add_bos_token": False, "add_space_prefix": False}
    assert opened({f"tokenizer.ggml.{key}": value for key, value in keys.items()}).encode("<0x41>").tokens == ["<0x4", "1>"]


def test_sentencepiece_tokenizer_leaves_the_space_out_when_told(sentence_pieces: dict[str, Any]) -> None:
    tokenizer = opened(sentence_pieces | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("The").tokens[1] == "T"
    assert tokenizer.decode(tokenizer.encode(" The").ids) == " The"


@pytest.mark.parametrize("kind", ["byte_level", "sentence_pieces"])
def test_transformers_opens_the_files(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    metadata = request.getfixturevalue(kind)
    files, _ = tokenizer_files(metadata)
    for name, text in (files | {"config.json": '{"model_type": "llama"}'}).items():
        (tmp_path / name).write_text(text)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_str(files["tokenizer.json"])
    for text in TEXT:
        assert theirs(text).input_ids == ours.encode(text).ids
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    if kind == "byte_level":
        assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|im_start|>Hi<|im_end|>"
        assert theirs.pad_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"tokenizer.ggml.pre": "surprise"}, "tokenizer.ggml.pre 'surprise' is not known"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens, 1 of them different"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.bos_token_id": 4000}, "special token id 4000 is not in the vocabulary"),
        ({"tokenizer.ggml.merges": ["q z"]}, "merge 'q z' is not of tokens"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": []}, "scores has 0 entries"),
    ],
)
def test_tokenizer_that_is_not_known_is_a_note(byte_level: dict[str, Any], change: dict[str, Any], note: str) -> None:
    files, notes = tokenizer_files(byte_level | change)
    assert files == {}
    assert len(notes) == 1
    assert note in notes[0]
