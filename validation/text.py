"""The tokens that everything is measured on: a text through the artifact's own tokenizer, or seeded random ids where there is none."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from artifact.config import LlamaConfig
from artifact.errors import UsageError, ValidationError

TEXTS = Path(__file__).parent / "texts"
DEFAULT_TEXT = TEXTS / "default.txt"
DEFAULT_TEXTS = (DEFAULT_TEXT, TEXTS / "code.txt")
TOKENIZER = "tokenizer.json"
SEED = 0
CHARACTERS_PER_TOKEN = 32
"""Far more than any language needs: how much of a long text is tokenised at first."""


@dataclass(frozen=True)
class Tokens:
    """Token ids and where they come from.

    Attributes:
        ids: [n] int64, without BOS.
        bos: the id that the tokenizer puts first, or None.
        kind: ``text``, or ``random ids``: then no quality can be measured.
        sha256: of the text's bytes, or of the ids.
    """

    ids: NDArray[np.int64]
    bos: int | None
    name: str
    kind: Literal["text", "random ids"]
    sha256: str

    def as_report(self, scored: int) -> dict[str, Any]:
        """name, sha256, scored_tokens and kind."""
        return {"name": self.name, "sha256": self.sha256, "scored_tokens": scored, "kind": self.kind}


def load_tokens(artifact: Path, config: LlamaConfig, text: Path | None, needed: int) -> Tokens:
    """The first ``needed`` tokens of a text.

    Args:
        artifact: its ``tokenizer.json`` is used; without one the ids are random.
        config: for the vocabulary and BOS.
        text: a UTF-8 file; None is the text that comes with this package.
        needed: how many.

    Raises:
        ValidationError: the text is missing, empty, not UTF-8 or too short; the tokenizer can't be read or is another model's; there is a
            text and no tokenizer.
    """
    if not (artifact / TOKENIZER).is_file():
        if text is not None:
            hint = "leave out --text, or export a checkpoint that has one"
            raise ValidationError(f"{artifact} has no {TOKENIZER}, so {text} can't be tokenised", hint=hint)
        return random_tokens(config, needed)
    tokenizer = open_tokenizer(artifact / TOKENIZER)
    content = _read_text(text or DEFAULT_TEXT)
    ids = _encode(tokenizer, content, needed)
    name = (text or DEFAULT_TEXT).name
    if len(ids) < needed:
        raise ValidationError(f"{name} has {len(ids)} tokens, {needed} are needed", hint="give a longer text, or a smaller --tokens")
    if ids.max() >= config.vocab_size:
        largest = f"token {ids.max()}, the model's vocabulary has {config.vocab_size}"
        raise ValidationError(f"{artifact / TOKENIZER} gives {largest}: it belongs to another model", hint="export the checkpoint again")
    return Tokens(ids, bos_of(tokenizer, config), name, "text", hashlib.sha256(content.encode()).hexdigest())


def load_texts(artifact: Path, config: LlamaConfig, texts: Sequence[Path] | None, needed: Sequence[int]) -> list[Tokens]:
    """The first tokens of some texts; random ids, once, where there is no tokenizer and no text is asked for.

    Args:
        artifact: as in ``load_tokens``.
        config: as in ``load_tokens``.
        texts: UTF-8 files; None are the two that come with this package.
        needed: how many of each.

    Raises:
        UsageError: a text is given twice.
        ValidationError: as in ``load_tokens``.
    """
    files = tuple(texts or DEFAULT_TEXTS)
    if twice := [path for index, path in enumerate(files) if path.resolve() in {other.resolve() for other in files[:index]}]:
        raise UsageError(f"{twice[0]} is given twice", hint="--text FILE once for each text")
    if texts is None and not (artifact / TOKENIZER).is_file():
        return [random_tokens(config, max(needed))]
    loaded = [load_tokens(artifact, config, path, count) for path, count in zip(files, needed, strict=True)]
    names = [tokens.name for tokens in loaded]
    return [replace(tokens, name=str(path)) if names.count(tokens.name) > 1 else tokens for tokens, path in zip(loaded, files, strict=True)]


def encode_prompts(artifact: Path, config: LlamaConfig, prompts: Sequence[str]) -> list[tuple[str, NDArray[np.int64]]]:
    """(prompt, ids), BOS first where the model has one; the artifact has a tokenizer."""
    tokenizer = open_tokenizer(artifact / TOKENIZER)
    first = [bos] if (bos := bos_of(tokenizer, config)) is not None else []
    return [(prompt, np.asarray(first + tokenizer.encode(prompt, add_special_tokens=False).ids, np.int64)) for prompt in prompts]


def random_tokens(config: LlamaConfig, needed: int) -> Tokens:
    """Seeded random ids of the model's vocabulary."""
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, needed)
    return Tokens(ids, None, f"random ids, seed {SEED}", "random ids", hashlib.sha256(ids.tobytes()).hexdigest())


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer of an artifact.

    Raises:
        ValidationError: the file can't be read as one.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValidationError(f"{path} can't be read as a tokenizer: {error}", hint="export the checkpoint again") from error


def _read_text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValidationError(f"{path} can't be read: {error.strerror}", hint="--text FILE takes a UTF-8 text") from error
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path} is not UTF-8 (byte {error.start})", hint=f"iconv -t UTF-8 {path.name}") from error
    if not content.strip():
        raise ValidationError(f"{path} is empty", hint="give a text to score")
    return content


def _encode(tokenizer: Tokenizer, content: str, needed: int) -> NDArray[np.int64]:
    for part in (content[: needed * CHARACTERS_PER_TOKEN], content):
        ids = tokenizer.encode(part, add_special_tokens=False).ids
        if len(ids) >= needed:
            break
    return np.asarray(ids[:needed], np.int64)


def bos_of(tokenizer: Tokenizer, config: LlamaConfig) -> int | None:
    """BOS, where the model has one and its tokenizer puts it first."""
    ids = tokenizer.encode("a").ids
    return config.bos_token_id if ids and ids[0] == config.bos_token_id else None
