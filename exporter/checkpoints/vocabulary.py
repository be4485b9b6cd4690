"""What a user should know of a model's shape: rows of the embedding that no token has, tokens without a row, and where a scaling ends."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from artifact.config import LlamaConfig


def model_notes(config: LlamaConfig, tokens: int | None) -> list[str]:
    """Notes, one line each.

    Args:
        config: the model's.
        tokens: one more than the largest id that its tokenizer gives; None where that is not known.
    """
    notes = []
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        length = config.max_position_embeddings
        notes.append(f"rope_type 'dynamic' scales texts longer than max_position_embeddings alone: up to {length}, where the graphs end, it is none")
    if tokens is not None and tokens < config.vocab_size:
        notes.append(f"the vocabulary is padded: the embedding has {config.vocab_size} rows, the tokenizer {tokens} tokens")
    if tokens is not None and tokens > config.vocab_size:
        notes.append(f"the tokenizer has {tokens} tokens, the embedding {config.vocab_size} rows: ids from {config.vocab_size} on can't be used")
    return notes


def tokenizer_size(folder: Path) -> int | None:
    """One more than the largest token id of a folder's tokenizer, added tokens included; None where there is no file that says so."""
    if (folder / "tokenizer.json").is_file():
        return _size_of_fast(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return sentencepiece_size(folder / "tokenizer.model")
    return None


def _size_of_fast(path: Path) -> int | None:
    try:
        ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
    except Exception:  # the library raises Exception itself; whoever needs the tokenizer says what is wrong with it
        return None
    return max(ids, default=-1) + 1


def sentencepiece_size(path: Path) -> int | None:
    """One more than the largest token id of a SentencePiece file, tokens added beside it included; None where it is another kind of file."""
    try:
        size = int(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())
        added = path.with_name("added_tokens.json")
        ids = json.loads(added.read_text(encoding="utf-8")).values() if added.is_file() else ()
        return max(size, *(int(number) + 1 for number in ids), 0)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return None
